"""OpenRLHF SFTTrainer (torch 2.13.0+cpu, openrlhf 0.10.2, deepspeed 0.18.9, transformers 5.5.4): mean of micro-batch mea
Run: python FILE
One SGD step over 4 micro-batches; prints the weight that each one's tokens had in it. Right is 1 each."""
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
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attn_implementation="eager"))
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
import sys, types, deepspeed, deepspeed.ops, peft
from types import SimpleNamespace as NS
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
torch.cuda.current_device = lambda: "cpu"
for name, parts in {"flash_attn": "", "flash_attn.bert_padding": "index_first_axis pad_input rearrange unpad_input",
                    "flash_attn.utils": "", "flash_attn.utils.distributed": "all_gather"}.items():
    sys.modules[name] = types.ModuleType(name)  # needs a GPU's compiler; nothing here calls it
    vars(sys.modules[name]).update(dict.fromkeys(parts.split()), __path__=[])
from openrlhf.models import Actor
from openrlhf.trainer.sft_trainer import SFTTrainer
from openrlhf.utils.deepspeed import DeepspeedStrategy
model = make_model()
before, never = flat(model.parameters()), 10**9
engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "zero_optimization": {'stage': 2},
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0})
engine.step = torch.no_grad()(engine.step)
args = NS(model=NS(aux_loss_coef=0.0), ds=NS(packing_samples=False, param_dtype="fp32"), eval=NS(steps=never),
          logger=NS(wandb=NS(key=None), tensorboard_dir=None, logging_steps=never), ckpt=NS(save_steps=never),
          train=NS(batch_size=4 * RANKS, dynamic_batch_enable=False), local_rank=-1)
strategy, actor = DeepspeedStrategy(train_batch_size=4 * RANKS, args=args), Actor(engine)
strategy.accumulated_gradient, strategy.world_size, actor.packing_samples = 4, RANKS, False
masks = [torch.tensor([0.0] * (PROMPT - 1) + [1.0] * (len(r) - PROMPT) + [0.0]) for r in ROWS]  # of the predicting token
batches = [(r[None, None], torch.ones_like(r)[None, None], m[None, None]) for r, m in zip(ROWS, masks)]
loader = torch.utils.data.DataLoader(batches[RANK::RANKS], batch_size=None)
SFTTrainer(actor, strategy, optimizer, loader, None, NS(get_last_lr=lambda: [LR]), max_epochs=1).fit(args)
report(before, flat(model.parameters()))
