"""The prompts, completions and rewards that every RL subject trains on, and how they are split into steps.

The completions and rewards are fixed, so that the same batch can be run with other splits. Their lengths,
rewards and spreads differ greatly, because equal ones hide most faults: one group has equal rewards, one has
almost equal rewards (which shows the epsilon beside the standard deviation), and two completions are truncated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from truestep.seeding import Purpose, generator

VOCABULARY, FIRST_TOKEN, STOP = 64, 3, 2
GROUP = 3  # odd, so that a biased standard deviation and a median show
TEMPERATURE = 0.7
LENGTHS = (2, 17, 5, 9, 4, 14, 22, 3, 11, 6, 22, 8)  # tokens of the completions, with the stop token
# Sums of these are exact in float32. One over a thousandth is large beside the usual epsilons.
REWARDS = (1.0, 0.0, 0.25, 0.75, 0.75, 0.75, 0.0, 2.0, 0.5, 0.5, 0.5 + 2**-10, 0.5 + 3 * 2**-10)
TRUNCATED = (6, 10)  # completions without a stop token
MOST_TOKENS = 22  # the limit of a completion; only truncated ones have as many
PROMPTS = (3, 5, 4, 7)  # tokens of each group's prompt


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and its completion. ``ids`` has both; ``trained`` is 1 for each token of the completion."""

    ids: tuple[int, ...]
    trained: tuple[int, ...]
    group: int
    reward: float
    truncated: bool

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.trained.index(1)]

    @property
    def completion(self) -> tuple[int, ...]:
        return self.ids[self.trained.index(1) :]


@dataclass(frozen=True, kw_only=True)
class RLCase:
    """The samples, and how they must be split. ``parts`` is the number of updates that share a rollout batch
    by splitting it, ``passes`` the number of times that each part is trained on."""

    name: str
    rows: tuple[Sample, ...]
    accumulation: int
    rows_per_microbatch: int
    parts: int = 1
    passes: int = 1
    rollouts: int = 1
    temperature: float = TEMPERATURE
    vocabulary: int = VOCABULARY
    max_tokens: int = MOST_TOKENS
    engine_gap: float = (
        0.0  # spread of the differences between the sampler's log-probabilities and the policy's
    )
    rate: float = 1.0  # share of the learning rate
    epochs: int = 1

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.parts * self.passes

    @property
    def steps(self) -> int:
        return self.updates * self.rollouts

    def to_json(self) -> dict[str, Any]:
        """Return the case in the form in which it is read back from JSON."""
        return json.loads(json.dumps({**asdict(self), "steps": self.steps}))


# Rows of a micro-batch if all rows are split over the ranks, and the updates of one rollout batch.
CASES: dict[str, dict[str, Any]] = {
    "whole": {"rows_per_microbatch": 12},  # one micro-batch: what the objective is without any split
    "split": {"rows_per_microbatch": 3},  # the same samples in micro-batches of one group each
    "straddling": {"rows_per_microbatch": 2},  # groups straddle micro-batches
    # Two updates on the same samples, twice: the second update shows the ratio and the clip.
    "reused": {"rows_per_microbatch": 3, "passes": 2, "rollouts": 2},
    # Each update trains on one half. The first moves the ratios of the other half to either side of the clip.
    "minibatches": {"rows_per_microbatch": 3, "parts": 2, "rate": 4.0},
    "mismatch": {"rows_per_microbatch": 3, "engine_gap": 0.7},  # the sampler's log-probabilities are off
}


def samples(seed: int = 0) -> tuple[Sample, ...]:
    """Return the samples, group by group. No pair of neighboring tokens occurs twice, since a model without
    attention could not tell them apart; the samples of a group share only their prompt."""
    made: list[Sample] = []
    pairs: set[tuple[int, int]] = set()
    for row, (length, reward) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        group, cut = row // GROUP, row in TRUNCATED
        draw = generator(seed, Purpose.PROBE, row, "rl")
        if row % GROUP == 0:
            ids = [int(draw.integers(FIRST_TOKEN, VOCABULARY))]
            _extend(ids, PROMPTS[group] - 1, pairs, draw)
            prompt = tuple(ids)
        ids = list(prompt)
        _extend(ids, length - (0 if cut else 1), pairs, draw)
        ids += [] if cut else [STOP]
        trained = (0,) * len(prompt) + (1,) * length
        made.append(Sample(ids=tuple(ids), trained=trained, group=group, reward=reward, truncated=cut))
    return tuple(made)


def _extend(ids: list[int], number: int, pairs: set[tuple[int, int]], draw: np.random.Generator) -> None:
    """Append random tokens. A token that is followed by the stop token does not occur in that place twice."""
    for _ in range(number):
        token = int(draw.integers(FIRST_TOKEN, VOCABULARY))
        while (ids[-1], token) in pairs or (token, STOP) in pairs:
            token = int(draw.integers(FIRST_TOKEN, VOCABULARY))
        pairs.add((ids[-1], token))
        ids.append(token)
    pairs.add((ids[-1], STOP))


def build(name: str, *, world_size: int = 1, seed: int = 0) -> RLCase:
    """Return the case with this name. Raises ValueError, which lists the known names, for any other name."""
    if name not in CASES:
        raise ValueError(f"unknown case {name!r}; use {', '.join(CASES)}")
    asked, rows = dict(CASES[name]), samples(seed)
    mine = len(rows) // world_size // asked.get("parts", 1)  # rows of a rank and an update
    size = min(asked.pop("rows_per_microbatch"), mine)
    return RLCase(name=name, rows=rows, accumulation=mine // size, rows_per_microbatch=size, **asked)
