"""Finds the weights that FSDP1 (``FullyShardedDataParallel``) keeps as parts of one flat parameter.

There, a linear module has no weight of its own outside of the forward and backward pass: each rank has a run of
entries of the flattened weight. A projection uᵀGv is linear in G, so it is the sum over ranks of the projections of
their parts. Shapes: a weight is [out, in], or [in, out] as in GPT-2's Conv1D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truestep.guard.ranks import summed

MARK = "_fsdp_flattened"  # set by torch on flat parameters and on the views of them


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's part of one flattened weight."""

    owner: Tensor  # what the optimizer has: the weight's own view, or the flat parameter of several weights
    shape: tuple[int, ...]  # of the whole weight
    start: int  # of the part in the flattened weight
    offset: int  # of the part in the owner
    count: int  # entries of the part; 0 if other ranks have all of them
    group: Any  # the ranks that have the other parts; None if this rank has the whole weight

    def spread(self, value: Tensor | None) -> Tensor:
        """Return a tensor in the whole weight's shape, from a value in the owner's shape, with zeros for the parts
        of the other ranks. None is all zeros."""
        made = torch.zeros(
            self.shape, dtype=self.owner.dtype if value is None else value.dtype, device=self.owner.device
        )
        if value is not None and self.count:
            part = value.detach().flatten()[self.offset : self.offset + self.count]
            made.flatten()[self.start : self.start + self.count] = part.to(made.device)
        return made

    def sum(self, projections: Tensor) -> Tensor:
        """Return the sum over the ranks [K]. All ranks of the group must call it."""
        return projections if self.group is None else summed(projections, self.group)


def is_flat(parameter: Tensor) -> bool:
    """Return whether FSDP1 has this parameter."""
    return bool(getattr(parameter, MARK, False))


def parts_of(model: nn.Module) -> dict[int, Part]:
    """Return the part of the weight of each module that FSDP1 has, by the module's ``id``. Weights that several
    modules share are left out."""
    found: dict[int, Part] = {}
    for handle in _handles(model):
        flat = handle.flat_param
        shared = {id(m) for one in flat._shared_param_infos for m in (one.module, one.prim_module)}
        group = handle.process_group if handle.uses_sharded_strategy else None
        own = flat._params or [flat] * len(flat._param_infos)
        for (name, module, _), owner, shape, place in zip(
            flat._param_infos, own, flat._shapes, flat._shard_param_infos, strict=True
        ):
            if name != "weight" or id(module) in shared:
                continue
            offset = 0 if flat._params else place.offset_in_shard or 0
            found[id(module)] = Part(
                owner=owner, shape=tuple(shape), start=place.intra_param_start_idx or 0, offset=offset,
                count=place.numel_in_shard or 0, group=group,
            )  # fmt: skip
    return found


def entries_of(model: nn.Module) -> int:
    """Return the number of trainable entries of whole weights that FSDP1 has."""
    found = 0
    for handle in _handles(model):
        flat = handle.flat_param
        own = flat._params or [flat] * len(flat._shapes)
        found += sum(int(s.numel()) for s, p in zip(flat._shapes, own, strict=True) if p.requires_grad)
    return found


def _handles(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" and (handle := module._handle) is not None:
            yield handle
