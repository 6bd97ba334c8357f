"""Wrong parts for the reference trainer where a clip, a schedule or a resume is asked for. Needs torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from truestep.testing.mutant_trainer import (
    Combine,
    Gradients,
    Limit,
    Plan,
    Replica,
    aligned,
    clip,
    everywhere,
    harness,
)


def _whole(change: Callable[[Tensor, float], Tensor]) -> Limit:
    """The sum is changed, where a clip is asked for."""

    def limit(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
        return [change(g, largest) if largest else g for g in combine(gradients, index)]

    return limit


clip_forgotten = _whole(lambda gradient, largest: gradient)


def clip_to(factor: float) -> Limit:
    """To another norm than the one that was asked for."""
    return _whole(lambda gradient, largest: clip(gradient, factor * largest))


def clip_micro(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Every micro-batch by its own norm."""
    return combine([[clip(g, largest) if largest else g for g in rank] for rank in gradients], index)


def clip_running(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """After every backward the gradient that has been added up so far."""
    if not largest:
        return combine(gradients, index)
    sums = []
    for rank in gradients:
        buffer = torch.zeros_like(rank[0])
        for gradient in rank:
            buffer = clip(buffer + gradient, largest)
        sums.append(buffer)
    return everywhere(gradients, sums)


def clip_rank(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Every rank by its own norm, before they are added up."""
    if not largest:
        return combine(gradients, index)
    return everywhere(gradients, [clip(torch.stack(rank).sum(0), largest) for rank in gradients])


def clip_too_long(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Before the division by the accumulation steps."""
    found, count = combine(gradients, index), len(gradients[0])
    return [clip(g * count, largest) / count if largest else g for g in found]


def ticks_of(speed: Callable[[int, int], float], ahead: int = 0) -> Callable[[int, int, int], float]:
    """``speed(K, D)`` ticks a step."""
    return lambda index, num_micro, num_ranks: (index + ahead) * speed(num_micro, num_ranks)


def momentum_lost(replica: Replica, at: int) -> int:
    replica.memory.clear()
    return at


def schedule_lost(replica: Replica, at: int) -> int:
    return 0


def both_lost(replica: Replica, at: int) -> int:
    replica.memory.clear()
    return 0


def parameters_lost(replica: Replica, at: int) -> int:
    """Back to where training began, with the momentum that was saved."""
    replica.theta = harness.flat(harness.parameters_of(harness.tiny_model(replica.spec))).to(
        replica.theta.dtype
    )
    replica.publish()
    return at


def from_the_first_row(num: int, size: int, epochs: int) -> Plan:
    """After the resume the data start anew."""
    windows = aligned(num, size, epochs)
    half = len(windows) // 2
    return windows[:half] + windows[: len(windows) - half]
