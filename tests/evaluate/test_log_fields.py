"""Every field of a log is replaced by every other type: the log is read, or refused in one line that names it."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.evaluate.import_compare import compare_evaluations, import_evaluations

INSPECT: dict[str, Any] = {
    "version": 2, "status": "success", "eval": {"task": "math/sums", "dataset": {"samples": 1}},
    "samples": [
        {
            "id": 1, "epoch": 1, "input": [{"role": "user", "content": [{"type": "text", "text": "q?"}]}], "target": ["4"],
            "output": {"choices": [{"message": {"content": [{"type": "text", "text": "4"}]}, "stop_reason": "stop"}],
                       "usage": {"output_tokens": 5}},
            "scores": {"match": {"value": "C", "answer": "4"}}, "error": None,
        }
    ],
}  # fmt: skip
LM_EVAL = [
    {
        "doc_id": 0, "doc": {"id": "a", "question": "q?"}, "target": "4", "resps": [["so 4"]], "filtered_resps": ["4"],
        "filter": "none", "metrics": ["exact_match"], "exact_match": 1.0,
    }
]  # fmt: skip
OLD_LM_EVAL = [{k: v for k, v in LM_EVAL[0].items() if k not in ("filter", "metrics")}]
EXPORTED = [{**LM_EVAL[0], "truestep": {"verdicts": ["correct"]}}]
OWN = [
    {"header": True, "name": "sums", "identity": "x"},
    {
        "problem_id": "a", "sample_index": 0, "verdict": "correct", "prompt": "q?", "completion": "4", "gold": "4",
        "extracted": "4", "reason": "r", "stop": "stop", "strict": "correct", "lenient": "correct", "unreadable": False,
        "num_tokens": 3,
    },
]  # fmt: skip
LIGHTEVAL = [
    {
        "__doc__": {"id": "1", "query": "q?", "choices": ["4"], "gold_index": [0]},
        "__model_response__": {"text": ["4"], "output_tokens": [[1, 2]]}, "__metric__": {"extractive_match": 1.0},
    }
]  # fmt: skip
OLD_LIGHTEVAL = [{"doc": LIGHTEVAL[0]["__doc__"], "model_response": LIGHTEVAL[0]["__model_response__"],
                  "metric": LIGHTEVAL[0]["__metric__"]}]  # fmt: skip
LOGS: dict[str, Any] = {
    "inspect.json": INSPECT, "inspect.eval": INSPECT, "samples_new.jsonl": LM_EVAL, "samples_old.jsonl": OLD_LM_EVAL,
    "samples_exported.jsonl": EXPORTED, "own.samples.jsonl": OWN, "details_new.parquet": LIGHTEVAL,
    "details_old.parquet": OLD_LIGHTEVAL,
}  # fmt: skip
OTHERS = (None, -7, True, "x", "x" * 300, [], [None], {"a": 1}, [{}], float("nan"))


def write(path: Path, log: Any) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(log))
    elif path.suffix == ".eval":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.json", json.dumps({k: v for k, v in log.items() if k != "samples"}))
            for i, sample in enumerate(log.get("samples") or []):
                archive.writestr(f"samples/{i}_epoch_1.json", json.dumps(sample))
    elif path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(log), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in log))
    return path


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*at, key)
        if isinstance(part, dict | list):
            yield from places(part, (*at, key))


def replaced(log: Any, at: tuple[Any, ...], value: Any) -> Any:
    changed = deepcopy(log)
    holder = changed
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = value
    return changed


@pytest.mark.parametrize(
    "name", [*[*LOGS][:3], *(pytest.param(one, marks=pytest.mark.slow) for one in [*LOGS][3:])]
)
def test_a_field_of_another_type_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    log = LOGS[name]
    good = write(tmp_path / name, log)
    assert import_evaluations([good], tmp_path / "good")["scores"][0]["score"] == 1.0
    (tmp_path / "bad").mkdir()
    refused = {}
    for n, (at, value) in enumerate((at, value) for at in places(log) for value in OTHERS):
        if name.endswith("parquet") and (len(at) < 2 or value in ({}, [{}], [])):
            continue  # no column has such a type
        if name.endswith(".eval") and at[0] == "samples" and len(at) < 2:
            continue  # the members of the archive are the list
        what = f"{'.'.join(map(str, at))} = {value!r:.20}"
        print(what)  # shown if another exception is raised
        try:
            bad = write(tmp_path / "bad" / name, replaced(log, at, value))
        except (TypeError, ValueError):  # of pyarrow, because a list of a column has one type
            assert name.endswith("parquet")
            continue
        try:
            import_evaluations([bad], tmp_path / f"out{n}")
        except UserError as error:
            refused[what] = str(error)
        with contextlib.suppress(UserError):
            compare_evaluations(bad, good)
    assert {what: said for what, said in refused.items() if name not in said or "\n" in said} == {}
    assert len(refused) > 20


@pytest.mark.parametrize(
    ("name", "at", "value", "said"),
    [
        (
            "inspect.json",
            ("samples", 0, "epoch"),
            "x",
            r"sample 1: epoch: expected a whole number, got \"x\"",
        ),
        (
            "inspect.json",
            ("samples", 0, "scores", "match"),
            "C",
            r"sample 1: scores\.match: expected an object",
        ),
        ("inspect.json", ("samples", 0), "s", r"samples\[0\]: expected an object"),
        (
            "inspect.eval",
            ("samples", 0, "output", "choices"),
            {},
            r"sample 1: output\.choices: expected a list",
        ),
        ("inspect.eval", ("eval",), "x", r"eval: expected an object"),
        ("inspect.json", ("samples", 0, "id"), None, "sample 1: id is missing"),
        ("samples_new.jsonl", (0, "doc"), "q?", r":1: doc: expected an object"),
        ("samples_new.jsonl", (0, "metrics"), "exact_match", r":1: metrics: expected a list"),
        ("samples_exported.jsonl", (0, "truestep", "verdicts"), ["right"], "expected one for each of resps"),
        ("own.samples.jsonl", (1, "num_tokens"), "3", r":2: num_tokens: expected a whole number"),
        ("details_new.parquet", (0, "__doc__"), "q?", r":1: __doc__: expected an object"),
        (
            "details_new.parquet",
            (0, "__model_response__", "text"),
            "4",
            r":1: __model_response__\.text: expected a list",
        ),
    ],
)
def test_what_is_wrong_is_named(
    name: str, at: tuple[Any, ...], value: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"{name}.*{said}"):
        import_evaluations([write(tmp_path / name, replaced(LOGS[name], at, value))], tmp_path / "out")


def test_null_is_a_field_that_is_not_there(tmp_path: Path) -> None:
    for key in ("epoch", "input", "target", "output", "error"):
        log = replaced(INSPECT, ("samples", 0, key), None)
        (score,) = import_evaluations([write(tmp_path / "a.json", log)], tmp_path / key)["scores"]
        assert (score["score"], score["n"]) == (1.0, 1), key


@pytest.mark.parametrize("scores", [[0.73, 0.9], [0.0, 0.73]])
def test_a_score_that_is_neither_right_nor_wrong_is_refused(scores: list[float], tmp_path: Path) -> None:
    rows = [
        {**LM_EVAL[0], "doc_id": i, "metrics": ["bleu"], "bleu": s, "doc": {}} for i, s in enumerate(scores)
    ]
    path = write(tmp_path / "samples_sums.jsonl", rows)
    with pytest.raises(
        UserError, match=r"samples_sums\.jsonl: bleu says neither right nor wrong .*its score is 0\.73"
    ):
        import_evaluations([path], tmp_path / "out")
    rows = [{**row, "metrics": ["bleu", "exact_match"], "exact_match": 0.0} for row in rows]
    write(path, rows)
    assert import_evaluations([path], tmp_path / "out", "exact_match")["scores"][0]["unscored"] == 0


def test_samples_without_any_score_are_unscored(tmp_path: Path) -> None:
    log = replaced(INSPECT, ("samples", 0, "error"), {"message": "gone"})
    summary = import_evaluations([write(tmp_path / "a.json", log)], tmp_path / "out")
    assert summary["scores"][0]["unscored"] == 1
    assert any("1 of 1 samples have no verdict" in note for note in summary["notes"])
