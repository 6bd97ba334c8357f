"""The collectives of training on several ranks, and FSDP2 with its averaging switched off.

Gradients are SUMMED over ranks, here in float32 (ddp) or by FSDP's reduce-scatter with a divide factor of one
(fsdp2), because the loss is already divided by a global total.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from truestep.device import collective_backend, compute_device, world

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank, and the few collectives that training needs."""

    rank: int = 0
    world_size: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=compute_device())
        dist.all_reduce(tensor, op=operation)
        return [float(v) for v in tensor]

    def sum_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Sum the gradients over ranks in place, in their own (wide) dtype."""
        if self.world_size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient, op=dist.ReduceOp.SUM)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value in rank order, sent as JSON (torch's object collectives use pickle)."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        mine = [len(data) if rank == self.rank else 0 for rank in range(self.world_size)]
        lengths = [int(n) for n in self.sum(mine)]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded, device=compute_device()) for _ in range(self.world_size)]
        dist.all_gather(found, padded.to(compute_device()))
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(found, lengths, strict=True)]

    def mine(self, items: list[Item]) -> list[Item]:
        """Return this rank's share of a list that is the same on all ranks."""
        return items[self.rank :: self.world_size]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def join() -> Ranks:
    """Join the other ranks if torchrun has started any."""
    rank, world_size = world()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(collective_backend(), timeout=timedelta(hours=12))
    return Ranks(rank=rank, world_size=world_size)


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def replicate(module: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's parameters to every rank."""
    if ranks.world_size > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), src=0)


def shard(module: nn.Module, layers: Iterable[nn.Module], compute_dtype: torch.dtype) -> None:
    """Apply FSDP2 over all ranks. Parameters are sharded in their (master) dtype, computation is in
    ``compute_dtype``, and gradients are reduced in at least float32 and never divided."""
    parameter_dtype = next(module.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == parameter_dtype else compute_dtype,
        reduce_dtype=torch.promote_types(parameter_dtype, torch.float32),
    )
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # the only divider is objective.normalise
            part.set_force_sum_reduction_for_comms(True)


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP's root keeps gathered after a forward pass without a backward."""
    if isinstance(module, FSDPModule):
        module.reshard()


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank, gathered if it is sharded (a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
