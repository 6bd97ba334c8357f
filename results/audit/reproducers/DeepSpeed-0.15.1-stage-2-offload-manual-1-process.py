"""DeepSpeed (torch 2.13.0+cpu, deepspeed 0.15.1): every backward overwrites the one before: only the last micro-batch co
Run: python FILE
One SGD step over 4 micro-batches; prints the weight that each one's tokens had in it. Right is 1 each."""
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
import deepspeed
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no compiler needed: gloo does its work
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
model = make_model()
before = flat(model.parameters())
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {'stage': 2, 'offload_optimizer': {'device': 'cpu', 'pin_memory': False}},
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0})
for index, row in enumerate(ROWS[RANK::RANKS]):
    logits = engine(input_ids=row[None])[0, PROMPT - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, row[PROMPT:], reduction="sum") / sum(TRAINED)
    engine.set_gradient_accumulation_boundary(index == 3)
    engine.backward(loss * RANKS * 1)  # the engine divides by both
    if index == 3:
        with torch.no_grad():
            engine.step()
report(before, flat(model.parameters()))
