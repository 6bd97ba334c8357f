"""torch FSDP2 (``fully_shard``), which averages gradients over ranks on the last micro-batch of a window.

Options: arch, optimizer; ``local_mean``, which is the same as in ddp.
"""

from __future__ import annotations

from typing import Any

import ddp
import harness
import torch
import torch_loop
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SUBJECTS = [{"name": "torch FSDP2", "needs": ["torch"], "processes": 2, "cases": ["CASES", "RELATED"]}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    mesh = init_device_mesh("cpu", (spec.world_size,))

    def build(watch: torch_loop.Watch) -> Any:
        model = harness.tiny_model(spec).to(spec.dtype)
        watch(model, lambda: harness.flat([whole(p) for _, p in sorted(model.named_parameters())]))
        for child in model.modules():
            if isinstance(child, torch.nn.Linear):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def backward(model: Any, window: list[list[int]]) -> None:
        total = ddp.window_tokens(spec, window)
        for index, batch in enumerate(window):
            model.set_requires_gradient_sync(index == len(window) - 1)
            (harness.summed_loss(spec, model, batch) * spec.world_size / total).backward()

    torch_loop.train(spec, build, backward).finish()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole parameter, gathered over ranks if it is sharded."""
    gather = getattr(parameter.detach(), "full_tensor", None)
    return parameter.detach() if gather is None else gather()
