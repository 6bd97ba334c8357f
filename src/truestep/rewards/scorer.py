"""Scores the samples of a step with a stage's rewards: the weighted sum of checker, coin and functions."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

from truestep.records import Problem, RewardInput, Score, Stop, Verdict
from truestep.reward_settings import SHIPPED, RewardSettings
from truestep.rewards.pool import FunctionPool
from truestep.rewards.record import Answer
from truestep.seeding import Purpose, generator
from truestep.signals import check
from truestep.user_code import Source, find_source

Grade = Callable[[Sequence[tuple[Problem, str]]], Sequence[Score]]


def sources(entries: Sequence[RewardSettings], base: Path) -> dict[str, Source]:
    """Return the file of each entry's function, by the entry's name. No code is run. The hashes of the files
    are part of a stage's identity. Raises UserError if a file is missing."""
    return {
        e.name: find_source(e.function, base, what="reward", shipped=SHIPPED.get(e.function, ""))
        for e in entries
        if e.function not in ("checker", "random")
    }


class RewardScorer:
    """Scorer of samples, for use from one thread. ``base`` is the recipe's folder. ``folder``, in
    the run directory, is for the functions' files. Entering the context starts one worker per function, and
    raises UserError if a function cannot be loaded.
    Held by: tests/rewards/test_hostile_rewards.py, tests/rewards/test_scorer.py"""

    def __init__(self, entries: Sequence[RewardSettings], *, grade: Grade, base: Path, folder: Path) -> None:
        self._entries, self._grade, self._stack = tuple(entries), grade, ExitStack()
        found = sources(entries, base)
        functions = [e for e in entries if e.name in found]
        self._pools = {e.name: FunctionPool(e, found[e.name], base=base, folder=folder) for e in functions}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for pool in self._pools.values():
                stack.callback(pool.close)
                pool.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def score(self, inputs: Sequence[RewardInput]) -> list[Score]:
        """Return one result per sample, in order. Raises UserError if a function fails on more than its
        ``max_failure_share`` of this rank's samples in the step."""
        whole = [sample for sample in inputs if sample.stop is not Stop.ERROR]
        if len(whole) < len(inputs):  # a sample without a completion is unscored; the function did not fail
            results = iter(self.score(whole))
            lost = Score(reward=None, verdict=Verdict.UNSCORED, reason="the engine failed")
            return [lost if sample.stop is Stop.ERROR else next(results) for sample in inputs]
        rows, graded = self._answered(inputs)
        return [self._sum(row, score) for row, score in zip(rows, graded, strict=True)]

    def rehearse(self, trials: Sequence[RewardInput]) -> None:
        """Call every function but the judge on made-up samples until it returns. Raises UserError if it fails on all."""
        for pool in self._pools.values():
            if pool.entry.function != "judge":
                pool.rehearse(trials)

    def each(self, inputs: Sequence[RewardInput]) -> list[dict[str, Answer]]:
        """Return what every reward says about each sample, by the reward's name. Raises UserError as ``score``."""
        return self._answered(inputs)[0]

    def _answered(
        self, inputs: Sequence[RewardInput]
    ) -> tuple[list[dict[str, Answer]], Sequence[Score | None]]:
        graded: Sequence[Score | None] = [None] * len(inputs)
        if any(entry.function == "checker" for entry in self._entries):
            graded = self._grade([(sample.problem, sample.completion) for sample in inputs])
            inputs = [replace(i, verdict=s.verdict) for i, s in zip(inputs, graded, strict=True) if s]
        futures = {name: pool.submit(inputs) for name, pool in self._pools.items()}
        waiting = {future for batches in futures.values() for future in batches}
        while waiting:
            check()
            done, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises the thread's exception
        answers: dict[str, list[Answer]] = {}
        for entry in self._entries:
            if entry.name in self._pools:
                self._pools[entry.name].check_failures()
                answers[entry.name] = [a for future in futures[entry.name] for a in future.result()]
            elif entry.function == "random":
                answers[entry.name] = [Answer(value=fair_coin(sample)) for sample in inputs]
            else:
                answers[entry.name] = [Answer(value=s.reward, reason=s.reason) for s in graded if s]
        return [{name: column[i] for name, column in answers.items()} for i in range(len(inputs))], graded

    def _sum(self, row: Mapping[str, Answer], score: Score | None) -> Score:
        total, missing, parts = 0.0, list[str](), dict[str, float]()
        for entry in self._entries:
            found = row[entry.name]
            parts |= found.named(entry.name)
            if found.value is not None:
                total += entry.weight * found.value
            elif entry.weight:
                missing.append(f"{entry.name}: {found.reason}")
        if not missing and not math.isfinite(total):
            missing.append("the weighted sum is not a finite number")
        checked = score or Score(reward=0.0, verdict=None)
        reason = "; ".join(missing) or checked.reason
        failed = any(found.failed for found in row.values())
        return replace(checked, reward=None if missing else total, parts=parts, reason=reason, failed=failed)


def fair_coin(sample: RewardInput) -> float:
    """Return 0 or 1, depending only on the sample's identity. This reward is a control, for gains that do not
    come from the reward.
    Held by: tests/rewards/test_scorer.py"""
    item = f"{sample.problem.id}/{sample.sample}"
    return float(generator(sample.seed, Purpose.RANDOM_REWARD, sample.step, item).random() < 0.5)
