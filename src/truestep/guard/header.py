"""Describes a guarded run: what is watched, and what cannot be seen. It is the first record of a run's log."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from typing import Any

import torch
from torch import nn

from truestep import __version__
from truestep.guard.flat import entries_of, is_flat
from truestep.guard.modules import head_of, linear_modules, shape_of

PACKAGES = ("transformers", "accelerate", "deepspeed", "trl", "peft")


def describe(guard: Any) -> dict[str, Any]:
    """Return the header of a ``Guard`` that is attached. It has no data of the user and no value of a tensor.

    Units: ``time`` is in UTC; ``parameters`` counts trainable entries.
    """
    model: nn.Module = guard.model
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    declared = guard.declared
    group = guard.group
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "truestep": __version__,
        "torch": torch.__version__,
        "packages": _packages(),
        "model": type(model).__name__,
        "parameters": entries_of(model)
        + sum(int(torch.Size(shape_of(p)).numel()) for _, p in trained if not is_flat(p)),
        "tensors": len(trained),
        "linear": sum(1 for _ in linear_modules(model)),
        "watched": [w.name for w in guard.watched],
        "gradient": guard.reader.source,
        "ranks": 1 if group is None else torch.distributed.get_world_size(group),
        "every": guard.every,
        "declared": {
            "accumulation": declared.accumulation,
            "loss": declared.loss,
            "gradient": declared.gradient,
            "max_grad_norm": declared.max_grad_norm,
            "rate": declared.rate is not None,
        },
        "unseen": unseen(guard, trained),
    }


def _packages() -> dict[str, str]:
    """Return the versions of the frameworks that this process has imported."""
    found = {}
    for name in PACKAGES:
        if name in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def unseen(guard: Any, trained: list[tuple[str, Any]]) -> list[str]:
    """Return what this run's guard cannot see or was not told, as sentences."""
    found = []
    fused = sum(1 for _, p in trained if len(shape_of(p)) == 3)
    if fused:
        found.append(f"the weights of {fused} fused tensors, such as experts, are not in the watched modules")
    if head_of(guard.model) is None:
        found.append(
            "the module that computes the logits was not found; only logits that the model returns are read"
        )
    if guard.is_deepspeed:
        found.append("DeepSpeed's formula of the update is not checked")
    elif kinds := sorted(
        {type(o).__name__ for o, f in zip(guard.optimizers, guard.formulas, strict=True) if not f.kind}
    ):
        found.append(f"the formula of the update is not checked for {', '.join(kinds)}")
    if not guard.sketch.tokens.stop_ids:
        found.append(
            "the model does not name a stop token, so it is not checked whether answers end with one"
        )
    declared = guard.declared
    missing = [
        name
        for name, known in (
            ("the number of micro-batches", declared.accumulation),
            ("the clip", declared.max_grad_norm),
            ("the learning rate", declared.rate is not None),
        )
        if not known
    ]
    if missing:
        found.append(f"not declared, so not checked: {', '.join(missing)}")
    if declared.gradient == "any":
        found.append("the sum of the micro-batches is not checked, because the gradient was declared as any")
    if declared.loss == "any":
        found.append("the denominator of the loss is not checked, because the loss was declared as any")
    return found
