"""Tells a step that was given up and begun again from one that drops its micro-batches.

A loop that leaves out a step (a spike of the loss, no memory, the rest of an epoch) clears its gradients, and the
next step's micro-batches follow. To the guard, all of them are one step, of which the first ones are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from truestep.guard.ranks import MicroSeen, RankSeen
from truestep.guard.solve import TOLERANCE

# Faults after which it was another way in which micro-batches are missing.
OF_WEIGHTS = {"kept", "unknown_weights", "unexplained", "momentum", "grouping", "not_finite"}


@dataclass(frozen=True)
class GivenUp:
    """A step without the micro-batches of the one that was given up before it."""

    ranks: list[RankSeen]
    count: int  # of the micro-batches that were left out, on the rank with the most
    comes_again: bool  # all of their rows


def only_finite(ranks: Sequence[RankSeen]) -> list[RankSeen] | None:
    """Return the ranks without the micro-batches that are not finite, or None if all are."""
    kept = [tuple(m for m in rank.micro if np.isfinite(m.column).all()) for rank in ranks]
    if all(len(some) == len(rank.micro) for some, rank in zip(kept, ranks, strict=True)):
        return None
    return [replace(rank, micro=some) for some, rank in zip(kept, ranks, strict=True)]


def without_given_up(
    ranks: Sequence[RankSeen], weights: Sequence[Sequence[float]], asked: int, dtype: str
) -> GivenUp | None:
    """Return the step that was begun again, or None if there is none, or if micro-batches are missing in another way.

    ``weights`` are those of each rank's micro-batches with a finite gradient.
    ``asked`` is the declared number of micro-batches. The step was begun again if just its last ``asked``
    micro-batches count, or if the rows of all others come again.
    """
    if not weights or not all(np.isfinite(rank.target).all() for rank in ranks):
        return None
    kept, counts, repeated = [], [], []
    for number, rank in enumerate(ranks):
        own = weights[number]
        values, least = iter(own), TOLERANCE[dtype] * max(map(abs, own), default=0.0)
        lives = [_alive(rank.micro, i, values, least) for i, m in enumerate(rank.micro)]
        dead = [i for i, alive in enumerate(lives) if alive is False]
        last = dead[-1] if dead else -1
        rest = [m.mark for m, alive in zip(rank.micro, lives, strict=True) if alive]
        before = Counter(rank.micro[i].mark for i in dead)
        comes_again = 0 not in before and before <= Counter(rest)
        is_whole = len(rest) == asked if asked else bool(rest) and comes_again
        if any(lives[: last + 1]) or not is_whole:
            return None
        kept.append(replace(rank, micro=rank.micro[last + 1 :]))
        counts.append(len(dead))
        repeated.append(comes_again)
    return GivenUp(kept, max(counts), all(repeated)) if any(counts) else None


def _alive(micro: Sequence[MicroSeen], i: int, values: Iterator[float], least: float) -> bool | None:
    """Return whether a micro-batch counts, or None if it has no gradient. One that is not finite cannot be in a
    gradient that is finite, and has no weight. Of two that gave the same, only the last may count."""
    one = micro[i]
    if not np.isfinite(one.column).all():
        return False
    if not one.column.any():
        return None
    others = [m for m in micro[i + 1 :] if m.mark == one.mark != 0]
    has_twin = any(np.allclose(m.column, one.column, rtol=1e-6, atol=0) for m in others)
    return abs(next(values)) > least and not has_twin
