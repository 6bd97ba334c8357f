"""``truestep eval grade``: every row in order, three verdicts a row, and errors that say where."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from truestep.cli.evaluation import COMMANDS, DEFAULT, with_default
from truestep.cli.main import main
from truestep.errors import UserError
from truestep.evaluate.pair_rows import read_pairs
from truestep.grade.pairs import Pair, grade_pairs, table

pytest.importorskip("math_verify")


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["truestep", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_file_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"gold": "1/2", "pred": "0.5"},
        {"id": "b", "gold": "1/2", "pred": r"\boxed{\frac{2}{4}}"},
        {"gold": 8, "pred": "It was 7 and now it is 8"},
        {"gold": "8/3", "pred": "2.667"},
        {"gold": "(C) Cecile", "pred": "C", "kind": "choice"},
        {"gold": "B", "pred": "15", "choices": ["12", "15"]},
        {"gold": "x+1", "pred": r"\boxed{1+x}"},
        {"gold": "7", "pred": r"\boxed{9^{9^{9}}}"},
        {"gold": "7", "pred": ""},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    assert call(monkeypatch, "eval", "grade", str(path), "--json", "--workers", "1") == 0
    result = json.loads(capsys.readouterr().out)
    samples = result["samples"]
    assert [sample["id"] for sample in samples] == ["1", "b", "5", "7", "9", "11", "13", "15", "17"]
    right, wrong = "correct", "incorrect"
    verdicts = [right, right, right, wrong, right, right, right, wrong, wrong]
    assert [sample["verdict"] for sample in samples] == verdicts
    assert [sample["strict"] for sample in samples] == [
        right,
        wrong,
        wrong,
        wrong,
        right,
        right,
        right,
        wrong,
        wrong,
    ]
    assert [sample["lenient"] for sample in samples] == [*verdicts[:3], right, *verdicts[4:]]
    assert all(sample["reason"] for sample in samples)
    assert result["counts"]["n"] == sum(result["counts"]["verdict"].values()) == len(rows)
    assert result["counts"]["extracted"] == len(rows) - 1
    assert call(monkeypatch, "eval", "grade", str(path)) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1 + 5


def test_a_named_choice_counts_where_the_pair_is_a_choice() -> None:
    pairs = [
        Pair(id=f"{kind} {text}", gold="B", pred=text, kind=kind)
        for kind in ("choice", "")
        for text in ("The correct option is **B**.", "Answer: b", "The correct option is **C**.")
    ]
    result = grade_pairs(pairs, workers=1)["samples"]
    assert [s["verdict"] for s in result[:4]] == ["correct", "correct", "incorrect", "incorrect"]
    assert [s["strict"] for s in result[:2]] == ["incorrect", "correct"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ('{"gold": "1"}', "row 1: field pred"),
        ('{"gold": "1", "pred": "1"}\n{"gold": null, "pred": "2"}', "row 2: field gold"),
        ('{"gold": "1", "pred": "1"}\n{"gold": ', "row 2: not valid JSON"),
        ("[1, 2]", "row 1: expected an object"),
        ('{"gold": "A", "pred": "B", "choices": "ab"}', "row 1: field choices"),
        ("[" * 100_000, "row 1: not valid JSON"),
        ('{"gold": "1", "gold": "2", "pred": "1"}', "row 1: field gold: expected the key once"),
        ('{"gold": NaN, "pred": "1"}', "row 1: field gold: expected a finite number"),
        ('{"gold": true, "pred": "1"}', "row 1: field gold: expected text or a number"),
        ('{"gold": " ", "pred": "1"}', "row 1: field gold: expected text, got an empty string"),
        ('{"gold": "1", "pred": ["1"]}', "row 1: field pred: expected text or a number"),
        ('{"gold": "B", "pred": "B", "kind": "chioce"}', 'row 1: field kind: expected "choice"'),
        ('{"gold": "B", "pred": "B", "kind": "Multiple Choice"}', 'row 1: field kind: expected "choice"'),
        ('{"gold": "B", "pred": "B", "kind": 5}', 'row 1: field kind: expected "choice"'),
        (
            '{"gold": "B", "pred": "B", "checker": "choice"}',
            'row 1: field checker: no such field; did you mean "kind"',
        ),
        ('{"gold": "B", "pred": "B", "choice": ["1", "2"]}', 'did you mean "choices"'),
        ('{"gold": "1", "pred": "1", "id": {"a": 1}}', "row 1: field id: expected text or a whole number"),
        ('{"gold": "D", "pred": "B", "choices": ["1", "2"]}', "row 1: field gold: expected a letter"),
    ],
)
def test_a_bad_row_is_named(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text, encoding="utf-8")
    assert call(monkeypatch, "eval", "grade", str(path)) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after the line that says what starts
    assert said in line
    assert str(path) in line


def test_a_pair_may_say_more_and_keeps_its_digits(tmp_path: Path) -> None:
    rows = [
        '{"gold": 3.14159265358979323846, "pred": "3.14159265358979323846", "model": "m", "gold_source": 1, "predicted": 0}',
        '{"gold": 2, "pred": "\\\\boxed{B}", "kind": "choice", "choices": ["red", "blue"]}',
        '{"gold": 1e-05, "pred": "a\\u000c\\u0000 b\\tc", "kind": "number"}',
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(rows))
    first, second, third = read_pairs(path)
    assert first.gold == first.pred == "3.14159265358979323846"
    assert (second.gold, third.gold, third.kind) == ("B", "0.00001", "number")
    assert grade_pairs([first, second], workers=1)["counts"]["verdict"]["correct"] == 2


def test_damaged_characters_are_noted_and_null_is_unscored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        r'{"gold": "\frac{1}{2}", "pred": "1/2"}',
        r'{"gold": "\tan x", "pred": "1/2"}',
        r'{"gold": "1/2", "pred": "so \boxed{1}"}',
        r'{"gold": "1/2", "pred": "\ud800"}',
        '{"gold": "1/2", "pred": null}',
        '{"gold": "1/2", "pred": "0.5"}',
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(rows))
    monkeypatch.setattr("sys.argv", ["truestep", "eval", "grade", str(path), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    out, said = capsys.readouterr()
    samples = json.loads(out)["samples"]
    assert [s["verdict"] for s in samples] == ["incorrect"] * 4 + ["unscored", "correct"]
    assert samples[4]["reason"] == "the prediction is null"
    for row, words in enumerate(("gold: ", "gold: ", "pred: ", "pred: "), start=1):
        assert f"row {row}: field {words}expected text, got" in said
    assert "row 5" not in said


def test_what_is_not_a_file_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"gold": "\xff"}')
    for name, words in (
        (".", "cannot read"),
        ("absent", "cannot read"),
        ("latin", "row 1: not valid JSON.*UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            read_pairs(tmp_path / name)


def test_the_second_opinion_is_asked_about_what_we_decided() -> None:
    pairs = [
        Pair(id="a", gold="7", pred="7.0"),
        Pair(id="b", gold="7", pred="8"),
        Pair(id="c", gold="12", pred="twelve"),
    ]
    result = grade_pairs(pairs, workers=1, second_opinion=True)
    assert result["counts"]["second_opinion"] == {"asked": 3, "answered": 3, "disagree": 1, "ids": ["c"]}


def test_the_table_obeys_no_answer() -> None:
    sample = dict.fromkeys(("verdict", "strict", "lenient"), "correct") | {
        "id": "\x1b[2J",
        "reason": "a\x07b",
    }
    assert "\x1b" not in table({"samples": [sample], "counts": {"n": 1}})
    assert "\x07" not in table({"samples": [sample], "counts": {"n": 1}})


def test_eval_with_a_recipe_is_still_eval() -> None:
    assert with_default(["eval", "run.toml", "--json"]) == ["eval", DEFAULT, "run.toml", "--json"]
    assert with_default(["eval", "--set", "a=1", "run.toml"]) == ["eval", DEFAULT, "--set", "a=1", "run.toml"]
    for words in (
        ["eval"],
        ["eval", "--help"],
        ["run", "x.toml"],
        [],
        *(["eval", name, "x"] for name in COMMANDS if name != DEFAULT),
    ):
        assert with_default(words) == words
    assert with_default(["eval", DEFAULT, "--json"]) == [
        "eval",
        DEFAULT,
        DEFAULT,
        "--json",
    ]  # a folder of that name
