"""Samples to be scored, and a grader that needs no algebra, for the tests of this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from truestep.records import Message, Problem, RewardInput, Score, Stop, Verdict, judged


def sample(number: int, completion: str = "", **changed: Any) -> RewardInput:
    turns = (Message(role="user", content=f"What is {number}?"),)
    given = RewardInput(
        problem=Problem(id=f"p{number}", messages=turns, answer=str(number), columns={"level": number}),
        messages=turns,
        completion=completion or str(number),
        completion_ids=tuple(range(number % 7 + 1)),
        stop=Stop.STOP_TOKEN,
        seed=5,
        step=0,
        sample=0,
        limit=20,
    )
    return dataclasses.replace(given, **changed)


def same_text(pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
    """Correct if the completion is the answer; "?" is unscored."""

    def verdict(problem: Problem, text: str) -> Verdict:
        if text == "?":
            return Verdict.UNSCORED
        return Verdict.CORRECT if text == problem.answer else Verdict.INCORRECT

    return [judged(verdict(*pair), extracted=pair[1], reason="compared as text") for pair in pairs]
