"""Answers by kind, right and wrong side by side, from two tables of cases."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from truestep.grade.pairs import Pair, grade_pairs


@pytest.mark.parametrize(("name", "kind"), [("kinds.txt", ""), ("choice_kinds.txt", "choice")])
def test_cases(name: str, kind: str) -> None:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    cases = [line.split(" ;; ") for line in lines if line and not line.startswith("#")]
    pairs = [Pair(id=str(i), gold=gold, pred=pred, kind=kind) for i, (_, gold, pred) in enumerate(cases)]
    samples = grade_pairs(pairs)["samples"]
    expected = {"+": "correct", "-": "incorrect"}
    wrong = [
        (*case[1:], s["verdict"], s["extracted"])
        for case, s in zip(cases, samples, strict=True)
        if s["verdict"] != expected[case[0]]
    ]
    assert len(cases) > 25
    assert wrong == []
