"""Gives new weights to the engine, and proves that it has them."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Sequence

import torch
from torch import Tensor

from truestep.model.lora import is_adapter, layers_of, merged
from truestep.rollout.engine import Engine, Receipt, StaleWeightsError
from truestep.rollout.fingerprints import PRIME, fingerprint
from truestep.train.layout import compute_dtype, computed, share_of
from truestep.train.parallel import Ranks, full, local
from truestep.train.policy import Policy

ROWS = 16  # of each merged matrix that are computed again


class Gathered(UserDict[str, Tensor]):
    """Parameters by name, gathered one at a time if they are sharded. For an engine without adapters, the matrices of
    layers with an adapter are merged."""

    def __init__(self, policy: Policy, *, merges: bool = False) -> None:
        self.policy = policy
        parameters = dict(policy.model.named_parameters())
        self.layers = {f"{n}.weight": layer for n, layer in layers_of(policy.model).items()} if merges else {}
        if self.layers:
            parameters = {name: p for name, p in parameters.items() if not is_adapter(name)}
        super().__init__(parameters | {name: layer.weight for name, layer in self.layers.items()})

    def __getitem__(self, name: str) -> Tensor:
        if (layer := self.layers.get(name)) is None:
            return self._whole(self.data[name])
        return merged(layer.scale, *map(self._whole, (self.data[name], layer.lora_A, layer.lora_B)))

    def _whole(self, parameter: Tensor) -> Tensor:
        return full(computed(self.policy, parameter))

    def empty(self, name: str) -> Tensor:
        """Return the whole tensor on the meta device, without gathering it."""
        dtype = compute_dtype(self.policy, self.data[name])
        return torch.empty(self.data[name].shape, dtype=dtype, device="meta")

    def part(self, name: str) -> Tensor:
        """Return what this rank has of the tensor: its shard, or the whole if it is not sharded or is merged."""
        return self[name] if name in self.layers else computed(self.policy, self.data[name])


def publish(policy: Policy, engine: Engine, version: int, ranks: Ranks | None = None) -> Receipt:
    """Give the engine the policy's weights and return its receipt (a collective).

    Raises StaleWeightsError on all ranks, naming the tensor, if on any rank a bit of a tensor, or the version,
    is not the trainer's. Held by: tests/contract/test_publish.py"""
    ranks = ranks or Ranks()
    weights = Gathered(policy, merges=not engine.has_adapters)
    receipt = engine.publish(weights, version)
    mine = [] if receipt.version == engine.policy_version == version else ["the version"]
    mine += different(weights, receipt, ranks)
    if engine.has_adapters:
        trained = {name: layer.scale for name, layer in layers_of(policy.model).items()}
        mine += [name for name in trained if receipt.adapters.get(name) != trained[name]]
    else:
        mine += wrongly_merged(weights)
    for rank, names in enumerate(ranks.gather(mine)):
        if names:
            told = f"{receipt.version}, {engine.policy_version}" if rank == ranks.rank else "?"
            raise StaleWeightsError(
                f"version {version} was published, but the engine of rank {rank} does not have it: {len(names)} of "
                f"{len(weights)} tensors differ from the trainer's, the first is {names[0]} (the engine says "
                f"version {told})"
            )
    return receipt


def different(weights: Gathered, receipt: Receipt, ranks: Ranks) -> list[str]:
    """Return the names of the tensors for which this rank's receipt is not that of the trainer's bits."""
    names = [name for name in weights if name not in receipt.addresses]
    found = [n for n, address in receipt.addresses.items() if local(weights.part(n)).data_ptr() != address]
    if receipt.unread:
        return found
    own = fingerprints(weights, names, ranks)
    return found + [name for name in names if receipt.fingerprints.get(name) != own[name]]


@torch.no_grad()
def wrongly_merged(weights: Gathered) -> list[str]:
    """Return the names of matrices that are not W + s·B·A, rounded once. What is published and what it is compared with
    are merged by the same function, so its result is computed here again, for some rows in float64 (a collective)."""
    found = []
    for name, layer in weights.layers.items():
        told, first = weights[name], full(layer.lora_A.detach()).double()
        rows = torch.linspace(0, len(told) - 1, min(ROWS, len(told)), device=told.device).long()
        base, second = (full(t.detach())[rows].double() for t in (layer.weight, layer.lora_B))
        right = base + layer.scale * (second @ first)
        parts = base.abs() + abs(layer.scale) * (second.abs() @ first.abs())
        wide = torch.promote_types(told.dtype, torch.float32)
        # Half a unit in the last place, and the rounding of the products and sums before.
        limit = 0.5 * torch.finfo(told.dtype).eps * right.abs() + 8 * torch.finfo(wide).eps * parts
        if not bool(((told[rows].double() - right).abs() <= limit).all()):  # NaN is wrong
            found.append(name)
    return found


def fingerprints(weights: Gathered, names: Sequence[str], ranks: Ranks) -> dict[str, int]:
    """Return the fingerprints of whole tensors (a collective: shards are added over ranks)."""
    parts, sharded = {}, []
    for name in names:
        part = weights.part(name)
        parts[name] = fingerprint(local(part), _offset(part))
        sharded += [name] if local(part) is not part else []
    summed = [sum(values) % PRIME for values in zip(*ranks.gather([parts[n] for n in sharded]), strict=True)]
    return parts | dict(zip(sharded, summed, strict=True))


def _offset(tensor: Tensor) -> int:
    """Return where this rank's part begins in the flattened whole tensor, in elements."""
    share = share_of(tensor)
    return 0 if share is None else share.start * math.prod(tensor.shape[1:])
