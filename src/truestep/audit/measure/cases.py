"""The rows of random tokens that every subject receives. Their numbers of trained tokens differ greatly.

Rows of the same length hide a mean of means, two accumulation steps hide a dropped micro-batch, and one rank
hides a rank-wise mean, so by default no case has any of these. Rows are plain integers; torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from truestep.seeding import Purpose, generator

VOCABULARY = 64
FIRST_TOKEN = 3  # 0, 1 and 2 are padding, begin and end
# The numbers of trained tokens of consecutive rows. Neighbors differ by an order of magnitude, and no two are
# the same, so that the rows of any window, in any order, differ from their mean.
TRAINED = (2, 27, 3, 17, 40, 5, 22, 9, 33, 4, 14, 30, 6, 19, 36, 11, 25, 7, 44, 13, 1, 29, 8, 38)
SHORTEST, SHORTEST_PROMPT = 6, 3  # tokens
CLIPPED_TO = 0.1  # below the norm of every step's gradient, and of most micro-batches'


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of tokens. ``trained`` is 1 for each trained token, else 0."""

    ids: tuple[int, ...]
    trained: tuple[int, ...]

    @property
    def num_trained(self) -> int:
        return sum(self.trained[1:])

    @property
    def num_first(self) -> int:
        """Return 1 if the first token is marked as trained, although nothing predicts it."""
        return self.trained[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The training rows and how they must be grouped. A correct trainer takes ``steps`` optimizer steps."""

    name: str
    rows: tuple[Row, ...]
    accumulation: int = 4
    rows_per_microbatch: int = 1
    epochs: int = 1
    steps: int = 3
    vocabulary: int = VOCABULARY
    max_grad_norm: float = 0.0  # as configured; 0 means no clip
    decay: bool = False  # the learning rate falls linearly to zero, once per step
    momentum: float = 0.0
    resume_after: int = 0  # steps after which everything is saved, rebuilt and loaded
    padding: int = 0  # columns that every micro-batch has beyond its longest row

    def rate(self, step: float) -> float:
        """Return the share of the learning rate that a step (counted from 0) should have."""
        return max(0.0, 1.0 - step / self.steps) if self.decay else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the case in the form in which it is read back from JSON."""
        return json.loads(json.dumps(asdict(self)))


def make_rows(counts: Sequence[int], *, seed: int = 0, turns: int = 1) -> tuple[Row, ...]:
    """Return one row of random tokens for each number of trained tokens in ``counts``. The trained tokens are
    split over ``turns`` answers of a chat."""
    rows = []
    for index, count in enumerate(counts):
        draw = generator(seed, Purpose.PROBE, index, "audit")
        mask: list[int] = []
        for answer in np.array_split(np.ones(count, dtype=int), turns):
            mask += [0] * int(draw.integers(SHORTEST_PROMPT, SHORTEST_PROMPT + 5)) + answer.tolist()
        mask += [0] * max(0, SHORTEST - len(mask))
        ids = draw.integers(FIRST_TOKEN, VOCABULARY, len(mask)).tolist()
        rows.append(Row(ids=tuple(ids), trained=tuple(mask)))
    return tuple(rows)


# What is checked in addition to the weights, each with the settings that it needs.
RELATIONS: dict[str, dict[str, Any]] = {
    "clipped": {"steps": 2, "max_grad_norm": CLIPPED_TO},  # once, by the norm of each step's whole gradient
    "scheduled": {"steps": 4, "decay": True},  # linear: any other number of ticks per step gives other rates
    # Two steps, a checkpoint and two more steps from it; momentum and schedule must survive.
    "resumed": {"steps": 4, "decay": True, "momentum": 0.5, "resume_after": 2},
}
CASES: dict[str, dict[str, Any]] = {
    "ragged": {},  # one row per micro-batch, all with different token counts: the base of all others
    "unsplit": {},  # the same rows, one micro-batch per step: a difference from ragged comes from the split
    "masked": {},  # in every step, a row without trained tokens and a row with only one
    "window": {"epochs": 2, "steps": 4},  # the number of rows is not a multiple of the accumulation window
    "chat": {},  # several answers per row, each after a prompt that is not trained
    "whole": {"steps": 2},  # every token is trained: counts before and after the shift of the labels differ
    # The same rows as in another case, split, ordered or padded in another way: a correct update is the same.
    "reordered": {"steps": 2},  # backwards within each step, in micro-batches of two rows
    "padded": {"steps": 2, "padding": 7},
    "masked_unsplit": {"steps": 2},
    "repeated": {"steps": 1},  # exactly: a step that differs from itself is random
    **RELATIONS,
}
# Case → the case that has the same rows.
SAME_ROWS = dict.fromkeys(("unsplit", "reordered", "padded", "repeated"), "ragged") | {
    "masked_unsplit": "masked"
}


def build(name: str, *, world_size: int, accumulation: int = 4, seed: int = 0) -> Case:
    """Return the case with this name. Raises ValueError, which lists the known names, for any other name."""
    if name not in CASES:
        raise ValueError(f"unknown case {name!r}; use {', '.join(CASES)}")
    if accumulation < 3 and name in ("masked", "masked_unsplit", "window", "chat"):
        raise ValueError(f"accumulation = {accumulation}: the case {name} needs 3 or more")
    asked = {"steps": 3, **CASES[name]}
    if name in ("scheduled", "resumed"):
        accumulation = min(accumulation, 3)  # else one tick per micro-batch ends the decay after one step
    step = world_size * accumulation
    num = world_size * (2 * accumulation - 2 if name == "window" else accumulation * asked["steps"])
    counts = [TRAINED[i % len(TRAINED)] + len(TRAINED) * 2 * (i // len(TRAINED)) for i in range(num)]
    if name in ("masked", "masked_unsplit"):
        for first in range(0, num, step):
            counts[first : first + 2] = 0, 1
    if name == "chat":
        counts = [max(3, count) for count in counts]
    rows = make_rows(counts, seed=seed, turns=3 if name == "chat" else 1)
    size = accumulation if name in ("unsplit", "masked_unsplit") else 1
    if name == "whole":
        rows = tuple(replace(row, trained=(1,) * len(row.ids)) for row in rows)
    if name == "reordered":
        rows = tuple(row for at in range(0, num, step) for row in reversed(rows[at : at + step]))
        size = 1 if accumulation % 2 else 2
    return Case(name=name, rows=rows, accumulation=accumulation // size, rows_per_microbatch=size, **asked)
