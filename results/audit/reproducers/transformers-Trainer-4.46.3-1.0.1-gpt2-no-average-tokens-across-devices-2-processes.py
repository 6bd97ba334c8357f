"""transformers Trainer (torch 2.13.0+cpu, transformers 4.46.3, accelerate 1.0.1): mean of micro-batch means, and the div
Run: torchrun --nproc-per-node 2 FILE
One SGD step over 8 micro-batches; prints the weight that each one's tokens had in it. Right is 1 each."""
import os
for key in ("RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29533", "DS_ACCELERATOR=cpu"):
    os.environ.setdefault(*key.split("="))
import torch
RANK, RANKS, LR, PROMPT = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0.5, 3
TRAINED = [2, 27, 3, 17, 11, 5, 23, 7][: 4 * RANKS]  # tokens of each micro-batch; the prompt before them is not trained
ROWS = [torch.randint(3, 64, (PROMPT + n,), generator=torch.Generator().manual_seed(n)) for n in TRAINED]
import transformers
def make_model():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
def logits_of(output):
    return output.logits
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
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)
    def __getitem__(self, index):
        row = ROWS[index]
        return {"input_ids": row, "labels": torch.cat([torch.full((PROMPT,), -100), row[PROMPT:]])}
model = make_model()
before = flat(model.parameters())
settings = transformers.TrainingArguments(
    output_dir="/tmp/reproduce", per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
    learning_rate=LR, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True, save_strategy="no",
    report_to=[], remove_unused_columns=False, logging_steps=1, average_tokens_across_devices=False, ddp_backend="gloo")
trainer = transformers.Trainer(model=model, args=settings, train_dataset=Rows())
trainer.train()
report(before, flat(model.parameters()))
