"""The order in which a stage visits its data: shuffled epochs of one data set, or of several with weights.

Every order is a pure function of the step, so a resumed run needs no cursor and continues with the same data.
Held by: tests/unit/test_order.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Generic, TypeVar

from truestep import seeding

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


@dataclass(frozen=True)
class Shares:
    """The data set of every place of a step. After any number of steps, a set has had its weight's share of all
    places, up to less than one place for every set. ``size`` is the number of places of a step."""

    weights: tuple[float, ...]
    size: int

    @cached_property
    def _pattern(self) -> list[list[int]]:
        """The sets of the places of each step. After these steps, all have had exactly their shares."""
        exact = [Fraction(str(weight)) for weight in self.weights]
        shares = [weight / sum(exact) for weight in exact]
        owed, steps = [Fraction(0)] * len(shares), list[list[int]]()
        while not steps or any(owed):
            places = []
            for _ in range(self.size):
                owed = [debt + share for debt, share in zip(owed, shares, strict=True)]
                largest = max(range(len(owed)), key=lambda k: owed[k])
                owed[largest] -= 1
                places.append(largest)
            steps.append(places)
        return steps

    @cached_property
    def _counts(self) -> list[list[int]]:
        """How many places each set has had before each step of the pattern, and after all of it."""
        counts = [[0] * len(self.weights)]
        for places in self._pattern:
            counts.append([had + places.count(k) for k, had in enumerate(counts[-1])])
        return counts

    def of_step(self, step: int) -> list[int]:
        """Return the set of every place of a step."""
        return self._pattern[step % len(self._pattern)]

    def before(self, step: int, which: int) -> int:
        """Return how many places a set has had in all steps before ``step``."""
        rounds, rest = divmod(step, len(self._pattern))
        return rounds * self._counts[-1][which] + self._counts[rest][which]

    def most(self, which: int) -> int:
        """Return the largest number of places that a set has in one step."""
        return max(after[which] - before[which] for before, after in pairwise(self._counts))

    def steps_until(self, which: int, count: int) -> int:
        """Return the number of steps after which a set has had ``count`` places for the first time."""
        rounds, rest = divmod(count - 1, self._counts[-1][which])
        reached = next(i for i, counts in enumerate(self._counts) if counts[which] > rest)
        return rounds * len(self._pattern) + reached


@dataclass(frozen=True)
class Order(Generic[Item]):
    """The order of one or several data sets, with a weight for each."""

    sets: Sequence[Sequence[Item]]
    weights: tuple[float, ...] = (1.0,)
    names: tuple[str, ...] = ("",)

    def at(self, step: int, size: int, seed: int, *, limit: int = 0, item: str = "") -> list[Item]:
        """Return the ``size`` items of a step (fewer at the end, if there is a ``limit`` for a single set). Every set
        has shuffled epochs of its own."""
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
