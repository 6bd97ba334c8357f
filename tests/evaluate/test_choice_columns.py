"""Choices in separate columns of an own benchmark, and the columns that nothing reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.evaluate.benchmarks import Benchmark
from truestep.evaluate.own import load_own
from truestep.records import Problem

TEXTS = ("Wed", "Sat", "Fri")
NAMES = {
    "letters": ("A", "B", "C"),
    "marked letters": ("A.", "B.", "C."),
    "options": ("option_a", "option_b", "option_c"),
    "Options": ("Option A", "Option B", "Option C"),
    "numbers": ("choice1", "choice2", "choice3"),
    "from zero": ("opt0", "opt1", "opt2"),
    "bare numbers": ("1", "2", "3"),
}


def load(folder: Path, *rows: dict[str, Any], **columns: str) -> tuple[Benchmark, list[Problem]]:
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((own, problems),) = load_own("x.jsonl", folder, "auto", columns)
    return own, problems


def gold(problem: Problem) -> str:
    """Return the text of the choice that is the answer."""
    return problem.question.partition(f"{problem.answer}) ")[2].partition("\n")[0]


def row(names: tuple[str, ...], answer: Any, texts: tuple[Any, ...] = TEXTS, **more: Any) -> dict[str, Any]:
    return {"question": "When?", **dict(zip(names, texts, strict=True)), "answer": answer, **more}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_columns_are_the_choices_of_a_list(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Labels and texts give the problems of the same rows with a list."""
    label = (
        names[1]
        .rpartition(" ")[2]
        .removeprefix("option_")
        .removeprefix("choice")
        .removeprefix("opt")
        .strip(".")
    )
    answers = ["Sat", label, names[1], f"({label})", label.lower()]
    own, problems = load(tmp_path, *(row(names, answer) for answer in answers))
    listed = {"question": "When?", "choices": list(TEXTS), "answer": "B"}
    same, wanted = load(tmp_path, *(listed for _ in answers))
    assert (own.content, own.kind, own.scorer) == (same.content, "choice", "exact")
    assert [(p.question, p.answer) for p in problems] == [(p.question, p.answer) for p in wanted]
    assert f"{', '.join(names)} are read as the choices" in own.mind
    assert "not used" not in own.mind


def test_named_csv_and_fewer_choices(tmp_path: Path) -> None:
    """A spreadsheet whose answer has another name; an empty value at the end is a choice less."""
    text = "question,A,B,C,D,correct,topic\nq1,x,y,z,w,D,t\nq2,x,y,z,,C,\nq3,x,y,,,1,\nq4,x,y,z,w,4,\n"
    (tmp_path / "x.csv").write_text(text)
    ((own, problems),) = load_own("x.csv", tmp_path, "auto", {"answer": "correct"})
    assert [gold(p) for p in problems] == ["w", "z", "x", "w"]
    assert [p.question.count(") ") for p in problems] == [4, 3, 2, 4]
    assert "counted from 1" in own.mind
    assert own.mind.endswith("not used (only your own scorers get them): topic (1 row)")
    with pytest.raises(UserError, match=r"x\.csv:1: answer: the row has question, but no answer; .*correct"):
        load_own("x.csv", tmp_path, "auto")


def test_columns_that_are_not_choices(tmp_path: Path) -> None:
    """If no answer names a choice, the columns are said to be unused; so are those of rows with a list."""
    own, problems = load(
        tmp_path, *({"question": "A + B?", "A": "3", "B": "4", "answer": n} for n in ("7", "9"))
    )
    assert (own.kind, problems[0].question) == ("math", "A + B?")
    assert own.mind == "not used (only your own scorers get them): A (2 rows), B (2 rows)"
    for names in (("A", "C"), ("B", "C"), ("A", "option_b")):
        own, _ = load(tmp_path, row(names, "x", ("x", "y")))
        assert own.kind == "math", names
    given = {"question": "q", "choices": ["x", "y"], "A": "u", "B": "v", "answer": "A", "note": 1, "id": "i"}
    own, (problem,) = load(tmp_path, given)
    assert gold(problem) == "x"
    assert own.mind.endswith("them): A (1 row), B (1 row), note (1 row)")
    own, _ = load(
        tmp_path, {"q": "q", "opts": ["x", "y"], "answer": "A", "info": {"a": 1}}, problem="q", choices="opts"
    )
    assert own.mind.endswith("them): info (1 row)")


@pytest.mark.parametrize(
    ("names", "answer", "texts", "fault"),
    [
        (("A", "B", "C"), "E", TEXTS, r'x\.jsonl:2: answer: expected the label or the text .* A, B, C, got "E"; if'),
        (("A", "B", "C"), None, TEXTS, r"x\.jsonl:2: answer: .*got nothing"),
        (("A", "B", "C"), "C", ("Wed", None, "Fri"), r"x\.jsonl:2: B: expected the text of a choice, got nothing"),
        (("A", "B", "C"), "C", ("Wed", "Sat", None), r'x\.jsonl:2: answer: .*got "C"'),
        (("choice1", "choice2", "choice3"), "2", ("2", "3", "4"), 'if the label is meant, write "choice 2"'),
        (("A", "B", "C"), "7", TEXTS, r'x\.jsonl:2: answer: .*got "7"'),
    ],
)  # fmt: skip
def test_rows_that_name_no_choice_are_refused(
    tmp_path: Path, names: tuple[str, ...], answer: Any, texts: tuple[Any, ...], fault: str
) -> None:
    with pytest.raises(UserError, match=fault):
        load(tmp_path, row(names, "Wed"), row(names, answer, texts))
    if answer == "2":
        _, problems = load(tmp_path, row(names, "Wed"), row(names, "choice 2", texts))
        assert gold(problems[1]) == "3"
