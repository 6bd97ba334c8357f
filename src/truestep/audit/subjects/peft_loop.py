"""PEFT's adapters in the loops of torch_loop, ddp and fsdp2. Options: those of adapters; ``wrap`` is ddp or fsdp2."""

from __future__ import annotations

from typing import Any

import adapters
import ddp
import harness
import torch
import torch_loop
from fsdp2 import whole

SUBJECTS = [{
    "name": "PEFT in a torch loop", "needs": ["peft", "transformers", "torch"],
    "configurations": [
        {"arch": "llama", "adapter": "lora", "cases": ["CASES", "RELATED"]},
        {"arch": "llama", "adapter": "rslora"},
        {"arch": "llama", "adapter": "dora"},
        {"arch": "tied", "adapter": "lora"},
        {"arch": "reused", "adapter": "lora"},
        {"arch": "llama", "adapter": "lora", "wrap": "ddp", "processes": 2},
        {"arch": "llama", "adapter": "lora", "wrap": "fsdp2", "processes": 2},
        {"arch": "llama", "adapter": "dora", "wrap": "fsdp2", "processes": 2},
    ],
}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    wrap = spec.options.get("wrap")

    def build(watch: torch_loop.Watch) -> Any:
        model = adapters.with_peft(spec)
        watch(adapters.reference(spec))
        watch(model, snapshot_of(model))
        if wrap == "ddp":
            return torch.nn.parallel.DistributedDataParallel(model)
        if wrap == "fsdp2":
            shard(spec, model)
        return model

    def backward(model: Any, window: list[list[int]]) -> None:
        total = ddp.window_tokens(spec, window)
        for batch in window:
            (harness.summed_loss(spec, model, batch) * spec.world_size / total).backward()

    torch_loop.train(spec, build, backward).finish(**harness.versions("peft", "transformers"))


def snapshot_of(model: torch.nn.Module) -> Any:
    """Return a function that reads the trained parameters, by name, even after they were sharded."""
    names = sorted(name for name, p in model.named_parameters() if p.requires_grad)

    def snapshot() -> torch.Tensor:
        now = dict(model.named_parameters())
        return harness.flat([whole(now[name]) for name in names])

    return snapshot


def shard(spec: harness.Spec, model: torch.nn.Module) -> None:
    """Shard every decoder layer and the rest, as the documentation of FSDP2 does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (spec.world_size,))
    for module in list(model.modules()):
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
