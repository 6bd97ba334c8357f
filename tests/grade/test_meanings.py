"""Answers of 40 families, made from what they mean: spellings of one meaning are accepted, others are not."""

from __future__ import annotations

import pytest

pytest.importorskip("math_verify")

from meanings import FAMILIES, Case, cases

from truestep.grade.pairs import Pair, grade_pairs


@pytest.fixture(scope="module")
def graded() -> list[tuple[Case, dict[str, str]]]:
    made = cases(seed=1, each=9)
    pairs = [Pair(id=str(i), gold=c.gold, pred=c.text, kind=c.kind) for i, c in enumerate(made)]
    return list(zip(made, grade_pairs(pairs, workers=2)["samples"], strict=True))


def test_different_meanings_are_refused(graded: list[tuple[Case, dict[str, str]]]) -> None:
    different = [(case, sample) for case, sample in graded if not case.same]
    assert len(different) >= 320
    assert {case.family for case, _ in different} == {family.__name__ for family in FAMILIES}
    assert [c for c, s in different if "correct" in (s["verdict"], s["strict"], s["lenient"])] == []


def test_spellings_of_one_meaning_are_accepted(graded: list[tuple[Case, dict[str, str]]]) -> None:
    same = [(case, sample) for case, sample in graded if case.same]
    assert len(same) >= 300
    assert [(c, s["verdict"], s["reason"]) for c, s in same if s["verdict"] != "correct"] == []
