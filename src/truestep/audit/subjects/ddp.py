"""torch DistributedDataParallel as its documentation shows it, with ``no_sync`` inside the window.

The summed loss is divided by the tokens of all ranks and multiplied by the world size, since DDP averages
over ranks. Options: arch, optimizer; ``local_mean`` divides by this rank's tokens (a common rank-wise mean).
"""

from __future__ import annotations

import contextlib
from typing import Any

import harness
import torch
import torch_loop

SUBJECTS = [{"name": "torch DDP", "needs": ["torch"], "processes": 2, "cases": ["CASES", "RELATED"]}]  # fmt: skip


def window_tokens(spec: harness.Spec, window: list[list[int]]) -> float:
    """Return the number of trained tokens of this window on all ranks."""
    mine = spec.count(window)
    return mine * spec.world_size if spec.options.get("local_mean") else harness.everywhere(mine)


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)

    def build(watch: torch_loop.Watch) -> Any:
        model = harness.tiny_model(spec).to(spec.dtype)
        watch(model)
        return torch.nn.parallel.DistributedDataParallel(model)

    def backward(wrapped: Any, window: list[list[int]]) -> None:
        total = window_tokens(spec, window)
        for index, batch in enumerate(window):
            last = index == len(window) - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                (harness.summed_loss(spec, wrapped, batch) * spec.world_size / total).backward()

    torch_loop.train(spec, build, backward).finish()
