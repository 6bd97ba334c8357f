"""Logs of other harnesses, in the layouts they write."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from truestep.evaluate.bring import compare_evaluations, import_evaluations
from truestep.evaluate.foreign import read_evaluations
from truestep.settings import SettingsError


def lm_eval(path: Path, scores: list[Any], filters: tuple[str, ...] = ("none",)) -> Path:
    lines = [
        {
            "doc_id": i, "doc": {"question": f"q{i}?", "answer": "4"}, "target": "4", "resps": [[f"so {i}"]],
            "filtered_resps": ["[invalid]" if i else "4"], "filter": f, "metrics": ["exact_match"],
            "exact_match": score,
        }
        for f in filters
        for i, score in enumerate(scores)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def inspect_log(path: Path, values: list[Any]) -> Path:
    samples = [
        {
            "id": i, "epoch": 1, "input": f"q{i}?", "target": "4",
            "output": {"choices": [{"message": {"content": [{"type": "text", "text": "4"}]},
                                    "stop_reason": "stop"}], "usage": {"output_tokens": 5}},
            "scores": {"match": {"value": value, "answer": "4"}},
        }
        for i, value in enumerate(values)
    ]  # fmt: skip
    samples[-1]["error"] = {"message": "server gone"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", json.dumps({"version": 2, "status": "success", "eval": {"task": "math/sums"}}))
        for s in samples:
            archive.writestr(f"samples/{s['id']}_epoch_1.json", json.dumps(s))
    return path


def test_lm_eval_samples_by_filter(tmp_path: Path) -> None:
    path = lm_eval(tmp_path / "samples_sums_2026-01-02T03-04-05.6.jsonl", [1.0, 0.0, 0.5], ("strict", "flexible"))
    strict, flexible = read_evaluations(path)
    assert (strict.task, flexible.task) == ("sums,strict", "sums,flexible")
    assert [r["verdict"] for r in strict.rows] == ["correct", "incorrect", "unscored"]
    assert [r["extracted"] for r in strict.rows] == ["4", "", ""]
    assert strict.rows[1]["prompt"] == "q1?"


def test_inspect_log_and_its_failed_sample(tmp_path: Path) -> None:
    (found,) = read_evaluations(inspect_log(tmp_path / "a.eval", ["C", "I", "C"]))
    assert found.task == "sums"
    assert [r["verdict"] for r in found.rows] == ["correct", "incorrect", "unscored"]
    assert found.rows[2]["reason"] == "inspect: server gone"
    assert found.rows[0]["completion"] == "4"


def test_lighteval_details(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"__doc__": {"id": str(i), "query": f"q{i}?", "choices": ["4"], "gold_index": 0},
         "__model_response__": {"text": ["it is 4"], "output_tokens": [[1, 2, 3]]},
         "__metric__": {"extractive_match": s}}
        for i, s in enumerate([1.0, 0.0])
    ]  # fmt: skip
    path = tmp_path / "details_custom|sums|0_2026-01-02T03-04-05.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    (found,) = read_evaluations(path)
    assert found.task == "custom|sums|0"
    assert [(r["verdict"], r["gold"], r["num_tokens"]) for r in found.rows] == [
        ("correct", "4", 3),
        ("incorrect", "4", 3),
    ]


def test_harnesses_are_compared_by_the_text_of_the_problem(tmp_path: Path) -> None:
    a = lm_eval(tmp_path / "samples_sums_2026-01-02T03-04-05.6.jsonl", [1.0, 0.0, 0.0])
    rows = [json.loads(line) for line in a.read_text().splitlines()]
    for row in rows:
        row["doc"]["id"] = f"other-{row['doc_id']}"
        row["exact_match"] = 1.0
    b = tmp_path / "samples_sums_2026-02-02T03-04-05.6.jsonl"
    b.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    (found,) = compare_evaluations(a, b)
    assert found["paired_by"] == "text"
    assert found["difference"] == pytest.approx(2 / 3)
    assert (found["num_better"], found["num_worse"], found["num_problems"]) == (2, 0, 3)


def test_import_writes_a_run_and_conserves_every_sample(tmp_path: Path) -> None:
    log = inspect_log(tmp_path / "a.eval", ["C", "I", "C"])
    summary = import_evaluations([log], tmp_path / "out")
    (score,) = summary["scores"]
    assert (score["n"], score["correct"], score["incorrect"], score["unscored"]) == (3, 1, 1, 1)
    (again,) = read_evaluations(tmp_path / "out")
    assert [r["verdict"] for r in again.rows] == ["correct", "incorrect", "unscored"]


def test_what_is_no_log_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "y.eval").write_text("no zip")
    (tmp_path / "z.json").write_text('{"results": {}}')
    for name, words in (
        ("x.jsonl", "expected a sample"),
        ("y.eval", "no inspect log"),
        ("z.json", "samples_"),
        ("w", "no such"),
    ):
        with pytest.raises(SettingsError, match=words):
            read_evaluations(tmp_path / name)
