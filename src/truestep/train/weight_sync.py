"""Gives new weights to the engine, and proves that it has them."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Mapping

from torch import Tensor

from truestep.rollout.engine import Engine, Receipt, StaleWeightsError
from truestep.rollout.fingerprints import PRIME, fingerprint
from truestep.train.layout import share_of
from truestep.train.parallel import Ranks, full, local
from truestep.train.policy import Policy


class Gathered(UserDict[str, Tensor]):
    """Parameters by name, gathered one at a time if they are sharded."""

    def __getitem__(self, name: str) -> Tensor:
        return full(self.data[name].detach())


def publish(policy: Policy, engine: Engine, version: int, ranks: Ranks | None = None) -> Receipt:
    """Give the engine the policy's weights and return its receipt (a collective).

    Raises StaleWeightsError on all ranks, naming the tensor, if on any rank a bit of a tensor, or the version,
    is not the trainer's. Held by: tests/contract/test_publish.py"""
    ranks = ranks or Ranks()
    parameters = dict(policy.model.named_parameters())
    receipt = engine.publish(Gathered(parameters), version)
    mine = [] if receipt.version == engine.policy_version == version else ["the version"]
    mine += different(parameters, receipt, ranks)
    for rank, names in enumerate(ranks.gather(mine)):
        if names:
            told = f"{receipt.version}, {engine.policy_version}" if rank == ranks.rank else "?"
            raise StaleWeightsError(
                f"version {version} was published, but the engine of rank {rank} does not have it: {len(names)} of "
                f"{len(parameters)} tensors differ from the trainer's, the first is {names[0]} (the engine says "
                f"version {told})"
            )
    return receipt


def different(parameters: Mapping[str, Tensor], receipt: Receipt, ranks: Ranks) -> list[str]:
    """Return the names of the tensors for which this rank's receipt is not that of the trainer's bits."""
    compared = {name: p.detach() for name, p in parameters.items() if name not in receipt.addresses}
    found = [n for n, address in receipt.addresses.items() if local(parameters[n]).data_ptr() != address]
    if receipt.unread:
        return found
    own = fingerprints(compared, ranks)
    return found + [name for name in compared if receipt.fingerprints.get(name) != own[name]]


def fingerprints(parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """Return the fingerprint of every whole tensor (a collective: shards are added over ranks)."""
    parts = {name: fingerprint(local(p), _offset(p)) for name, p in parameters.items()}
    sharded = [name for name, p in parameters.items() if local(p) is not p]
    summed = [sum(values) % PRIME for values in zip(*ranks.gather([parts[n] for n in sharded]), strict=True)]
    return parts | dict(zip(sharded, summed, strict=True))


def _offset(tensor: Tensor) -> int:
    """Return where this rank's part begins in the flattened whole tensor, in elements."""
    share = share_of(tensor)
    return 0 if share is None else share.start * math.prod(tensor.shape[1:])
