"""The pinned table: wrong rows are refused, right ones come through every published layout the same."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from truestep.data.rows import RowError
from truestep.errors import UserError
from truestep.evaluate import benchmarks
from truestep.evaluate.benchmarks import Benchmark, contamination
from truestep.evaluate.sources import content_hash, file_items, item_of

CHOICES = [
    {"id": f"c{i}", "question": f"Which is {i}?", "choices": ["zero", "one", "two"], "answer": "ABC"[i]}
    for i in range(3)
]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made_up(folder: Path, rows: list[dict], **more: object) -> Benchmark:
    path = write(folder / "made.jsonl", rows)
    base = Benchmark(
        id="made", title="made up", num_rows=len(rows), content=content_hash(file_items(path)), hub=""
    )
    return replace(base, **more)  # type: ignore[arg-type]


def test_published_layouts_of_one_question_are_one_question() -> None:
    plain = {"question": "Which?", "choices": ["A) x", "B) y"], "answer": "B"}
    rows = [
        plain,
        {"problem": "Which?\n\nA) x\nB) y", "answer": "B"},
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "Which?", "options": ["x", "y"], "answer": "B", "question_id": 7},
    ]
    assert len({content_hash([item_of(row, "i")]) for row in rows}) == 1
    gpqa = {"Question": "Which?", "Correct Answer": "y"} | {
        f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)
    }
    assert item_of(gpqa, "i").choices == ("y", "w1", "w2", "w3")
    with pytest.raises(RowError, match="Incorrect Answer 2"):
        item_of({k: v for k, v in gpqa.items() if k != "Incorrect Answer 2"}, "i")
    assert item_of({"question": "q", "answer": "so 3+4\n#### 7"}, "i").answer == "7"
    assert item_of({"Body": "Two eggs.", "Question": "How many?", "Answer": 2.0}, "i").answer == "2"


def test_wrong_count_and_wrong_content_are_refused(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
    made = made_up(tmp_path, rows)
    assert [p.answer for p in benchmarks.load(made, tmp_path)] == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match="expected the 5 rows of made, got 4"):
        benchmarks.load(replace(made, num_rows=5), tmp_path)
    write(tmp_path / "made.jsonl", [*rows[:3], {"problem": "3+1?", "answer": "5"}])
    with pytest.raises(UserError, match="hash to"):
        benchmarks.load(made, tmp_path)
    write(tmp_path / "made.jsonl", rows[::-1])  # another order is the same benchmark
    assert len(benchmarks.load(made, tmp_path)) == 4


def test_unknown_content_is_recorded_once_and_held_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "home"))
    made = made_up(tmp_path, [{"problem": "1?", "answer": "1"}], content=benchmarks.UNKNOWN)
    benchmarks.load(made, tmp_path)
    benchmarks.load(made, tmp_path)
    write(tmp_path / "made.jsonl", [{"problem": "2?", "answer": "1"}])
    with pytest.raises(UserError, match=r"first loaded here.*remove made from .*home/benchmarks.json"):
        benchmarks.load(made, tmp_path)
    (tmp_path / "home" / "benchmarks.json").write_text("{")
    with pytest.raises(UserError, match=r"benchmarks.json is not valid JSON"):
        benchmarks.load(made, tmp_path)


def test_options_are_shuffled_the_same_every_time_and_the_gold_goes_with_them(tmp_path: Path) -> None:
    made = made_up(tmp_path, CHOICES, kind="choice", scorer="exact")
    first, again = benchmarks.load(made, tmp_path), benchmarks.load(made, tmp_path)
    assert first == again
    for problem, word in zip(first, ("zero", "one", "two"), strict=True):
        assert f"\n{problem.answer}) {word}" in problem.messages[0].content
    many = [{**CHOICES[0], "id": f"x{i}", "question": f"{i}?"} for i in range(60)]
    golds = [p.answer for p in benchmarks.load(made_up(tmp_path, many, kind="choice"), tmp_path)]
    assert set(golds) == {"A", "B", "C"}


def test_a_greater_limit_holds_the_smaller_one(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(50)]
    problems = benchmarks.load(made_up(tmp_path, rows), tmp_path)
    few, more = (benchmarks.take(problems, n, "made") for n in (5, 20))
    assert [p for p in more if p in few] == few
    assert few != problems[:5]
    assert benchmarks.take(problems, "all", "made") == problems


def test_a_bad_row_is_named_and_never_quoted(tmp_path: Path) -> None:
    write(tmp_path / "made.jsonl", [CHOICES[0], {**CHOICES[1], "question": "secret text", "answer": "Q"}])
    with pytest.raises(UserError, match=r"made.jsonl:2: answer: expected the label") as found:
        file_items(tmp_path / "made.jsonl")
    assert "secret" not in str(found.value)


def test_the_table_is_consistent() -> None:
    assert len(benchmarks.BY_ID) == len(benchmarks.TABLE)
    assert {b.id: b.num_rows for b in benchmarks.TABLE}["mmlu_pro"] == 12032
    assert [b.id for b in benchmarks.TABLE if b.samples == 32] == ["aime24", "aime25", "amc22_23"]
    assert [b.id for b in benchmarks.TABLE if b.private] == ["gpqa_diamond"]
    with pytest.raises(UserError, match='did you mean "math500"'):
        benchmarks.find("math_500")


@pytest.mark.skipif(
    "TRUESTEP_DATA" not in os.environ, reason="needs TRUESTEP_DATA, a folder with the benchmarks"
)
@pytest.mark.parametrize("id", [b.id for b in benchmarks.TABLE if b.content != benchmarks.UNKNOWN])
def test_the_real_files_are_the_pinned_ones(id: str) -> None:
    assert benchmarks.load(benchmarks.find(id), Path(os.environ["TRUESTEP_DATA"]))


def test_contamination_is_of_bare_questions_and_says_what_it_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options and templates differ between a training set and a benchmark; an equal question must be found
    all the same, and a long run of shared words as well."""
    long = "Anna has nineteen red apples and gives away four of them to each of her three younger brothers"
    rows = [
        {"id": "a", "question": "Which is it?", "choices": ["zero", "one"], "answer": "B"},
        {"id": "b", "question": f"{long}. How many are left?", "choices": ["7", "8"], "answer": "A"},
        {"id": "c", "question": "Another?", "choices": ["0", "1"], "answer": "A"},
    ]
    made = made_up(tmp_path / "benchmarks", rows, kind="choice", scorer="exact")
    monkeypatch.setattr(benchmarks, "BY_ID", {"made": made, "absent": replace(made, id="absent")})
    monkeypatch.setattr(benchmarks, "find", {"made": made, "absent": replace(made, id="absent")}.__getitem__)
    train = write(
        tmp_path / "train.jsonl",
        [
            {"problem": "which is  it?", "answer": "1"},
            {"problem": f"{long}. What is left for her?", "answer": "7"},
            {"problem": "Something else altogether?", "answer": "3"},
        ],
    )
    report = contamination(str(train), [], str(tmp_path / "benchmarks"))
    (pair,) = report["pairs"]
    assert report["missing"] == ["absent"]
    assert pair["exact"]["num_evaluation"] == 1
    assert pair["ngram"]["num_evaluation"] == 1
    with pytest.raises(UserError):  # what is asked for by name must be there
        contamination(str(train), ["absent"], str(tmp_path / "benchmarks"))
    write(tmp_path / "benchmarks" / "absent.jsonl", rows[:2])
    with pytest.raises(UserError, match="expected the 3 rows"):  # there, but damaged: not passed over
        contamination(str(train), [], str(tmp_path / "benchmarks"))


@pytest.mark.parametrize("field", ["question", "answer"])
def test_a_row_without_a_question_or_an_answer_names_the_field(field: str) -> None:
    with pytest.raises(RowError, match=rf"^{field}: expected text, got nothing"):
        item_of({"question": "q?", "answer": "4", field: " "}, "0")
