"""torchtune SFT recipe (torch 2.13.0+cpu, torchtune 0.6.1, torchao 0.9.0): steps were taken after 4, 6 micro-batches, as
Run: python FILE
Two epochs of six micro-batches, four to a step; prints the weights in the second epoch's first step.
Right is 1 for its own four and 0 for the two that the first epoch left over."""
import os
for key in ("RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29533", "DS_ACCELERATOR=cpu"):
    os.environ.setdefault(*key.split("="))
import torch
RANK, RANKS, LR, PROMPT = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0.5, 3
TRAINED = [2, 27, 3, 17, 11, 5, 23, 7][: 6 * RANKS]  # tokens of each micro-batch; the prompt before them is not trained
ROWS = [torch.randint(3, 64, (PROMPT + n,), generator=torch.Generator().manual_seed(n)) for n in TRAINED]
from torchtune.models.llama3 import llama3
def make_model():
    torch.manual_seed(0)
    return llama3(vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=256,
                  intermediate_dim=64)
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
import contextlib, copy, importlib.util, pathlib, torchtune
from types import SimpleNamespace as NS
from torchtune.modules.loss import CEWithChunkedOutputLoss
path = pathlib.Path(torchtune.__file__).parent.parent / "recipes" / "full_finetune_single_device.py"
spec = importlib.util.spec_from_file_location("recipe", path)  # recipes are files beside the package
spec.loader.exec_module(recipe := importlib.util.module_from_spec(spec))
batches = [{"tokens": row[None], "labels": torch.cat([torch.full((PROMPT,), -100), row[PROMPT:]])[None]} for row in ROWS]
model, loss, kept = make_model(), CEWithChunkedOutputLoss(), []
model.set_num_output_chunks(loss.num_output_chunks)
sampler = torch.utils.data.DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)
made = recipe.FullFinetuneRecipeSingleDevice.__new__(recipe.FullFinetuneRecipeSingleDevice)
vars(made).update(  # what its setup reads from files
    _device=torch.device("cpu"), _compile=False, _optimizer_in_bwd=False, _gradient_accumulation_steps=4,
    _clip_grad_norm=None, _log_every_n_steps=1, _log_peak_memory_stats=False, _model=model, _tokenizer=NS(pad_id=0),
    _optimizer=torch.optim.SGD(model.parameters(), lr=LR), _loss_fn=loss, _lr_scheduler=None,
    _profiler=torchtune.training.DummyProfiler(), profiler_profile_memory=False, epochs_run=0, total_epochs=2,
    _metric_logger=NS(log_dict=lambda told, step: kept.append(copy.deepcopy(model))), max_steps_per_epoch=None,
    activations_handling_ctx=contextlib.nullcontext(), ignore_labels_cache=torch.full((1, 1), -100), global_step=0,
    save_checkpoint=lambda epoch: None, _steps_per_epoch=1, _dataloader=torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=sampler))
made.train()
first, second = (flat(m.parameters()) for m in kept)  # one step an epoch, and nothing after the last
assert torch.equal(second, flat(model.parameters()))
kept[0].set_num_output_chunks(0)
make_model = lambda: kept[0]
report(first, second, asked=4)
