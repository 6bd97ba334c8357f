"""verl agg_loss (function level) (torch 2.13.0+cpu, verl 0.6.0): mean of micro-batch means.
Run: torchrun --nproc-per-node 2 FILE
One SGD step over 8 micro-batches; prints the weight that each one's tokens had in it. Right is 1 each."""
import os
for key in ("RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29533", "DS_ACCELERATOR=cpu"):
    os.environ.setdefault(*key.split("="))
import torch
RANK, RANKS, LR, PROMPT = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0.5, 3
TRAINED = [2, 27, 3, 17, 11, 5, 23, 7][: 4 * RANKS]  # tokens of each micro-batch; the prompt before them is not trained
ROWS = [torch.randint(3, 64, (PROMPT + n,), generator=torch.Generator().manual_seed(n)) for n in TRAINED]
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 32)
        self.head = torch.nn.Linear(32, 64)
    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.embed(input_ids))))
def make_model():
    torch.manual_seed(0)
    return Model()
def logits_of(output):
    return output
def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])
def report(before, after, asked=None):  # asked: how many of the rows the step is to hold
    exact, columns = make_model().double().eval(), []
    for row in ROWS:
        logits = logits_of(exact(row[None]))[0, PROMPT - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, row[PROMPT:], reduction="sum") / sum(TRAINED[:asked])
        columns.append(flat(torch.autograd.grad(loss, list(exact.parameters()))))
    used, right = (before - after) / LR, sum(columns[:asked])
    weights = torch.linalg.lstsq(torch.stack(columns, 1), used[:, None]).solution.flatten()
    error = float((used - right).norm() / right.norm())
    if RANK == 0:
        print("weights", [round(w, 3) + 0.0 for w in weights.tolist()], "relative error", f"{error:.2g}")
    raise SystemExit(1 if error > 1e-2 else 0)
import inspect
import torch.distributed as dist
from verl.trainer.ppo.core_algos import agg_loss
dist.init_process_group("gloo")
model = make_model()
before = flat(model.parameters())
counts = {"dp_size": RANKS, "batch_num_tokens": sum(TRAINED)}  # of the whole batch, in releases that take them
counts = counts if "batch_num_tokens" in inspect.signature(agg_loss).parameters else {}
for row in ROWS[RANK::RANKS]:  # verl's own function, in the loop that its actor has around it
    losses = torch.nn.functional.cross_entropy(logits_of(model(row[None]))[0, :-1], row[1:], reduction="none")[None]
    mask = (torch.arange(len(row) - 1) >= PROMPT - 1)[None].float()
    (agg_loss(losses, mask, "token-mean", **counts) / (1 if counts else 4)).backward()
for parameter in model.parameters():
    dist.all_reduce(parameter.grad)
    parameter.data -= LR * parameter.grad / RANKS
report(before, flat(model.parameters()))
