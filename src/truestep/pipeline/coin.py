"""A reward that knows nothing: the control that asks whether an RL gain comes from the reward at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truestep.records import Problem, Score, Verdict
from truestep.seeding import Purpose, generator
from truestep.train.source import EntropyOf, Memory, Source, StepData


@dataclass(kw_only=True)
class CoinGrader:
    """A fair coin for each sample, whatever it says; a function of (seed, step, place in the step).

    Held by: tests/study/test_coin.py
    """

    seed: int
    step: int = 0
    calls: int = 0

    def __call__(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        scores = []
        for place, (problem, _) in enumerate(pairs):
            draw = generator(
                self.seed, Purpose.RANDOM_REWARD, self.step, f"{self.calls}/{place}/{problem.id}"
            ).random()
            verdict = Verdict.CORRECT if draw < 0.5 else Verdict.INCORRECT
            scores.append(Score(verdict=verdict, reason="random reward"))
        self.calls += 1
        return scores


class CoinSource:
    """A source that tells the coin which step it is for, so that a resumed step is given the same rewards."""

    def __init__(self, *, inner: Source, coin: CoinGrader) -> None:
        self.inner, self.coin, self.updates_per_step = inner, coin, inner.updates_per_step

    def take(self, step: int, memory: Memory, entropy_of: EntropyOf) -> StepData:
        self.coin.step, self.coin.calls = step, 0
        return self.inner.take(step, memory, entropy_of)
