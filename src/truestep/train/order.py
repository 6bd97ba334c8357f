"""The order in which a stage visits its data: shuffled epochs of one data set, or of several with weights.

Every order is a pure function of the step, so a resumed run needs no cursor and continues with the same data.
Held by: tests/unit/test_order.py
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Generic, TypeVar

import numpy as np

from truestep import seeding

LONGEST = 10_000  # places after which the sets of a mixture repeat
Item = TypeVar("Item")


def stretch(items: Sequence[Item], start: int, stop: int, seed: int, item: str = "") -> list[Item]:
    """Return the items at the places ``start`` to ``stop`` of an endless sequence of shuffled epochs."""
    picked: list[Item] = []
    for epoch in range(start // len(items), (stop - 1) // len(items) + 1):
        order = seeding.permutation(seed, epoch, len(items), item)
        first = max(start - epoch * len(items), 0)
        picked += [items[int(i)] for i in order[first : stop - epoch * len(items)]]
    return picked


def window(
    items: Sequence[Item], step: int, size: int, seed: int, limit: int = 0, item: str = ""
) -> list[Item]:
    """Return items ``step·size … (step+1)·size`` of a sequence of shuffled epochs, which ends after ``limit``
    items, or never if ``limit`` is 0. A window may span two epochs. At any time, some items may have
    been seen once more than the others."""
    stop = (step + 1) * size if limit == 0 else min(limit, (step + 1) * size)
    return stretch(items, step * size, stop, seed, item)


@cache
def _cycle(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the set of each of D places, and how many places each set has had before each of them, and after the last
    one. Then every set has had exactly its share, and the places repeat. Shapes: [D], [D + 1, sets]."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = math.lcm(*(share.denominator for share in shares))
    if length > LONGEST:
        length, shares = LONGEST, _rounded(shares)
    parts = np.array([int(share * length) for share in shares])
    owed, places = np.zeros(len(parts), dtype=np.int64), np.empty(length, dtype=np.int64)
    for place in range(length):
        owed += parts
        places[place] = largest = int(owed.argmax())  # the first one, if several are owed the same
        owed[largest] -= length
    one = places[:, None] == np.arange(len(parts))
    return places, np.concatenate([np.zeros((1, len(parts)), dtype=np.int64), one.cumsum(0)])


def _rounded(shares: Sequence[Fraction]) -> list[Fraction]:
    """Return the shares as multiples of 1/LONGEST with the sum 1, none of them 0."""
    parts = [max(1, int(share * LONGEST)) for share in shares]
    rests = sorted(range(len(shares)), key=lambda k: parts[k] - shares[k] * LONGEST)
    while (missing := LONGEST - sum(parts)) > 0:
        for k in rests[:missing]:
            parts[k] += 1
    while sum(parts) > LONGEST:
        parts[parts.index(max(parts))] -= 1
    return [Fraction(part, LONGEST) for part in parts]


@dataclass(frozen=True)
class Shares:
    """The data set of every place of a step. After any number of steps, a set has had its weight's share of all
    places, up to less than one place for every set. ``size`` is the number of places of a step. Weights that would
    repeat only after more than LONGEST places are rounded to multiples of 1/LONGEST of their sum."""

    weights: tuple[float, ...]
    size: int

    def of_step(self, step: int) -> list[int]:
        """Return the set of every place of a step."""
        places, _ = _cycle(self.weights)
        return [int(k) for k in places[np.arange(step * self.size, (step + 1) * self.size) % len(places)]]

    def before(self, step: int, which: int) -> int:
        """Return how many places a set has had in all steps before ``step``."""
        places, counts = _cycle(self.weights)
        rounds, rest = divmod(step * self.size, len(places))
        return int(rounds * counts[-1, which] + counts[rest, which])

    def most(self, which: int) -> int:
        """Return the largest number of places that a set has in one step."""
        steps = len(_cycle(self.weights)[0]) // math.gcd(len(_cycle(self.weights)[0]), self.size)
        return max(self.before(step + 1, which) - self.before(step, which) for step in range(steps))

    def steps_until(self, which: int, count: int) -> int:
        """Return the number of steps after which a set has had ``count`` places for the first time."""
        places, counts = _cycle(self.weights)
        rounds, rest = divmod(count - 1, int(counts[-1, which]))
        place = rounds * len(places) + int(np.flatnonzero(places == which)[rest])
        return place // self.size + 1


@dataclass(frozen=True)
class Order(Generic[Item]):
    """The order of one or several data sets, with a weight for each."""

    sets: Sequence[Sequence[Item]]
    weights: tuple[float, ...] = (1.0,)
    names: tuple[str, ...] = ("",)

    def without(self, names: Collection[str]) -> Order[Item]:
        """Return the order of the other data sets."""
        kept = [
            part for part in zip(self.sets, self.weights, self.names, strict=True) if part[2] not in names
        ]
        sets, weights, kept_names = zip(*kept, strict=True)
        return Order(sets, weights, kept_names)

    def at(self, step: int, size: int, seed: int, *, limit: int = 0, item: str = "") -> list[Item]:
        """Return the ``size`` items of a step (fewer at the end, if there is a ``limit`` for a single set). Every set
        has separate shuffled epochs."""
        if len(self.sets) == 1:
            return window(self.sets[0], step, size, seed, limit, item)
        shares = Shares(self.weights, size)
        own = [
            iter(
                stretch(items, shares.before(step, k), shares.before(step + 1, k), seed, f"{item}data/{name}")
            )
            for k, (items, name) in enumerate(zip(self.sets, self.names, strict=True))
        ]
        return [next(own[k]) for k in shares.of_step(step)]
