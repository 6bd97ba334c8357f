"""Code that all subjects share. It runs in the audited environment, with only the standard library and torch.

A subject is a module with a function ``run(spec)``, which ``child.py`` calls, and a literal ``SUBJECTS`` that
says how it is audited. ``run`` lets a framework train a tiny model, with a ``Recorder``, on a case's rows.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attempt import Attempt
from recorder import Recorder, flat, logits_of, parameters_of
from tiny import tiny_model
from torch import Tensor, nn

__all__ = ["Recorder", "Spec", "flat", "parameters_of", "tiny_model"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Spec:
    """One case in one configuration, and the folder for its observations."""

    def __init__(self, folder: Path, case: dict[str, Any], raw: dict[str, Any]) -> None:
        self.folder, self.case = folder, case
        self.options: dict[str, Any] = raw["options"]
        self.rows: list[dict[str, list[int]]] = case["rows"]
        self.accumulation: int = case["accumulation"]
        self.rows_per_microbatch: int = case["rows_per_microbatch"]
        self.epochs: int = case["epochs"]
        self.steps: int = case["steps"]
        self.vocabulary: int = case["vocabulary"]
        self.lr: float = raw["learning_rate"]
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.dtype = DTYPES[self.options.get("dtype", "float32")]

    @property
    def max_grad_norm(self) -> float:
        """The configured clip; 0 means no clip."""
        return float(self.case.get("max_grad_norm") or self.options.get("max_grad_norm") or 0.0)

    @property
    def decays(self) -> bool:
        return bool(self.case.get("decay"))

    @property
    def is_relation(self) -> bool:
        """Whether the case tests more than the weights in single steps."""
        return self.decays or bool(self.case.get("max_grad_norm"))

    def scheduler(self, optimizer: Any, ticks: int = 1) -> torch.optim.lr_scheduler.LambdaLR:
        """Return a scheduler for ``ticks`` calls per step, which decays linearly to zero or is constant."""
        last = self.steps * ticks
        share = (lambda i: max(0.0, 1 - i / last)) if self.decays else (lambda i: 1.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    def parts(self) -> list[list[list[list[int]]]]:
        """Return the windows before and after resuming, or all in one list if the case does not resume."""
        windows, at = self.windows(), self.case.get("resume_after", 0)
        return [windows[:at], windows[at:]] if at else [windows]

    def labels(self, row: int) -> list[int]:
        """Return the row's tokens, with −100 in place of those that are not trained."""
        tokens = zip(self.rows[row]["ids"], self.rows[row]["trained"], strict=True)
        return [t if on else -100 for t, on in tokens]

    def count(self, batches: Sequence[Sequence[int]]) -> float:
        """Return the number of trained tokens in these batches of rows."""
        return float(sum(sum(self.rows[row]["trained"][1:]) for batch in batches for row in batch))

    def batches(self, rows: Sequence[int] | None = None) -> list[list[int]]:
        """Return this rank's micro-batches of one epoch, in order, as lists of row numbers. Subjects without
        a loader use these."""
        size, chosen = self.rows_per_microbatch, range(len(self.rows)) if rows is None else rows
        micro = [list(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        return micro[self.rank :: self.world_size]

    def windows(self, rows: Sequence[int] | None = None) -> list[list[list[int]]]:
        """Return this rank's micro-batches by step, over all epochs; an epoch's last window may be short."""
        mine = self.batches(rows)
        return [mine[i : i + self.accumulation] for i in range(0, len(mine), self.accumulation)] * self.epochs

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if self.options.get("optimizer", "sgd") == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=self.case.get("momentum", 0.0))
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)


def main(run: Callable[[Spec], None]) -> None:
    """Run the subject on every case in one process, because importing a framework takes most of the time."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    raw = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    failed: list[BaseException] = []
    for case in raw["cases"]:
        place = folder / case["name"]
        place.mkdir(exist_ok=True)
        spec = Spec(place, case, raw)
        with Attempt() as attempt:
            run(spec)
        if attempt.error is None:
            continue
        failed.append(attempt.error)
        # If one case cannot be run, the step can still be judged by the others. Ranks would wait for each other.
        if spec.world_size > 1 and not spec.is_relation:
            raise attempt.error
        (place / "not-run.txt").write_text(why_not(attempt.error), encoding="utf-8")
    if failed and len(failed) == len(raw["cases"]):
        raise failed[0]


def why_not(error: BaseException) -> str:
    """Return an error as one short line."""
    # torch prints some words in bold.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    return " ".join(plain.split()).partition(". ")[0][:160]


def versions(*names: str) -> dict[str, str]:
    """Return the versions of those named distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def join_ranks(spec: Spec) -> None:
    """Create a gloo group of all ranks, once. One rank gets a group too, since some frameworks need it."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=spec.rank, world_size=spec.world_size)


def everywhere(value: float) -> float:
    """Return the sum of ``value`` over all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total)


def average_gradients(spec: Spec, model: nn.Module) -> None:
    """Average the gradients over all ranks, as DDP does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= spec.world_size


def deepspeed_without_compiler() -> None:
    """Turn off a shared-memory collective that takes two minutes to compile; gloo does the same work."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_settings(spec: Spec, stage: int, batch: int | str, accumulation: int | str) -> dict[str, Any]:
    """Return a user's DeepSpeed settings for torch's optimizer, as DeepSpeed's CPU Adam needs a compiler."""
    zero: dict[str, Any] = {"stage": stage}
    if spec.options.get("offload", False):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "gradient_clipping": spec.max_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": spec.dtype is torch.bfloat16},
    }


def padded(lines: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Return the lines as one tensor, padded on the right."""
    longest = max(map(len, lines))
    return torch.tensor([[*line, *[filler] * (longest - len(line))] for line in lines])


def token_losses(spec: Spec, model: nn.Module, batch: list[int]) -> tuple[Tensor, Tensor]:
    """Return −log p and the mask [R, T − 1] of a micro-batch's trained tokens, in one padded forward pass."""
    ids = padded([spec.rows[row]["ids"] for row in batch], 0)
    labels = padded([spec.labels(row) for row in batch], -100)[:, 1:]
    logits = logits_of(model(input_ids=ids))[:, :-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    return nn.functional.cross_entropy(wide, labels, ignore_index=-100, reduction="none"), labels != -100


def summed_loss(spec: Spec, model: nn.Module, batch: list[int]) -> Tensor:
    """Return −Σ log p over the trained tokens of a micro-batch, from one padded forward pass."""
    return token_losses(spec, model, batch)[0].sum()
