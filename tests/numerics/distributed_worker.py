"""What each rank of test_distributed.py runs: every case, then its own parameters and reports into a folder.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python distributed_worker.py FOLDER

The test calls ``run_case`` itself for the same cases in one process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from step_cases import (
    FAMILIES,
    LLAMAS,
    PLAIN_SGD,
    VOCABULARY,
    batches_of,
    demonstrations,
    make_policy,
    one_each,
    plan_for,
    rollouts,
    run_step,
)
from torch import Tensor
from transformers import Gemma2Config

from truestep.objective.schedule import learning_rate
from truestep.records import Origin, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import Ranks, full, join, leave, replicate, shard
from truestep.train.step import count_totals

ADAMW = OptimizerSettings(
    lr=1e-2, schedule="cosine", warmup_fraction=0.5, weight_decay=0.1, max_grad_norm=0.5
)
CLIPPED_SGD = OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.5)


# It cannot be packed: in one micro-batch, a rank with three sequences runs its layers three times, one with five, five times.
ONE_BY_ONE = "gemma2"
MODELS = {
    **LLAMAS,
    ONE_BY_ONE: Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, query_pre_attn_scalar=8,
        attn_logit_softcapping=1.0, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    cut: str  # how the sequences are dealt to the ranks
    optimizer: str
    parallel: str = "ddp"
    model: str = "gqa"
    dtype: torch.dtype = torch.float64
    lora: bool = False

    @property
    def name(self) -> str:
        dtype, adapted = str(self.dtype).removeprefix("torch."), ["lora"] * self.lora
        return "-".join([self.parallel, self.model, dtype, self.family, self.cut, self.optimizer, *adapted])


def cases() -> list[Case]:
    found = []
    for parallel in ("ddp", "fsdp2"):
        for family in ("sft", "grpo_token_mean"):
            found += [
                Case(family=family, cut=c, optimizer="adamw", parallel=parallel)
                for c in ("uneven", "one idle")
            ]
            found.append(
                Case(family=family, cut="uneven", optimizer="sgd", parallel=parallel, dtype=torch.float32)
            )
        found.append(Case(family="grpo", cut="uneven", optimizer="clipped", parallel=parallel))
        found.append(Case(family="dr_grpo", cut="one idle", optimizer="sgd", parallel=parallel, model="tied"))
        found.append(Case(family="sft", cut="uneven", optimizer="adamw", parallel=parallel, model=ONE_BY_ONE))
        for family, cut in (("sft", "one idle"), ("grpo", "uneven")):
            found.append(
                Case(family=family, cut=cut, optimizer="adamw", parallel=parallel, model="tied", lora=True)
            )
    return found


LORA = LoraSettings(rank=3, alpha=4, targets=("all-linear", "lm_head"), train_also=("*norm.weight",))
OPTIMIZERS = {"adamw": (ADAMW, 2), "sgd": (PLAIN_SGD, 1), "clipped": (CLIPPED_SGD, 2)}


def sequences_of(case: Case, step: int) -> list[TrainSequence]:
    """Eight of very unequal lengths; the groups of the rollouts stay whole on a rank."""
    if FAMILIES[case.family].origin is Origin.EXPERT:
        return demonstrations((2, 27, 2, 17, 5, 9, 3, 12), seed=step)
    return rollouts([(2, 21, 4), (3, 9, 2, 14, 5)], FAMILIES[case.family], seed=step)


def dealt(case: Case, sequences: list[TrainSequence], ranks: Ranks) -> list[TrainSequence]:
    """Three to rank 0 and five to rank 1, or all to rank 0; everything where there is one process."""
    if ranks.world_size == 1:
        return sequences
    border = {"uneven": 3, "one idle": len(sequences)}[case.cut]
    return sequences[:border] if ranks.rank == 0 else sequences[border:]


def run_case(case: Case, ranks: Ranks) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What the parameters moved by (whole, on every rank), and what each step reported."""
    family = FAMILIES[case.family]
    # Every rank starts from other weights: replicate must make them rank 0's.
    policy = make_policy(MODELS[case.model], case.dtype, seed=ranks.rank, lora=LORA if case.lora else None)
    if ranks.world_size > 1:
        replicate(policy, ranks)
        if case.parallel == "fsdp2":
            shard(policy, policy.model.base_model.layers)
    before = {name: full(p.detach()).clone() for name, p in policy.named_parameters()}
    settings, num_steps = OPTIMIZERS[case.optimizer]
    optimizer = MasterOptimizer(policy, settings)
    rate = learning_rate(
        peak=settings.lr, kind=settings.schedule, total_steps=4, warmup_fraction=0.5, min_ratio=0.1
    )
    reports = []
    for step in range(num_steps):
        mine = dealt(case, sequences_of(case, step), ranks)
        batches = batches_of(mine) if case.model == ONE_BY_ONE else one_each(mine, case.dtype)
        # A large update is read from float32 parameters with a small rounding.
        speed = rate(step) if case.optimizer == "adamw" else 1.0 if case.dtype is torch.float64 else 1024.0
        plan = plan_for(family.method, step=step, learning_rate=speed, ranks=ranks)
        totals = count_totals(plan.terms, batches, ranks)
        report = run_step(policy, optimizer, batches, plan)
        reports.append({"totals": asdict(totals), "report": asdict(report), "num_batches": len(batches)})
    moved = {name: full(p.detach()) - before[name] for name, p in policy.named_parameters()}
    return moved, reports


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join()
    moved, reports = {}, {}
    for case in cases():
        found, reports[case.name] = run_case(case, ranks)
        moved |= {f"{case.name}/{name}": tensor.clone().contiguous() for name, tensor in found.items()}
    gathered = ranks.gather({"rank": ranks.rank, "text": "ü" * (3 + 40 * ranks.rank)})
    save_file(moved, folder / f"rank-{ranks.rank}.safetensors")
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps({"reports": reports, "gathered": gathered}))
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
