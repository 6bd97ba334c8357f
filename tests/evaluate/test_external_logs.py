"""Logs of other harnesses, in the layouts they write."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.evaluate import external_logs
from truestep.evaluate.external_logs import read_evaluations
from truestep.evaluate.import_compare import compare_evaluations, import_evaluations
from truestep.rundir import read_json


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
        archive.writestr(
            "header.json", json.dumps({"version": 2, "status": "success", "eval": {"task": "math/sums"}})
        )
        for s in samples:
            archive.writestr(f"samples/{s['id']}_epoch_1.json", json.dumps(s))
    return path


def test_lm_eval_samples_by_filter(tmp_path: Path) -> None:
    path = lm_eval(
        tmp_path / "samples_sums_2026-01-02T03-04-05.6.jsonl", [1.0, 0.0, 0.5], ("strict", "flexible")
    )
    strict, flexible = read_evaluations(path)
    assert (strict.task, flexible.task) == ("sums,strict", "sums,flexible")
    assert [r["verdict"] for r in strict.rows] == ["correct", "incorrect", "unscored"]
    assert [r["extracted"] for r in strict.rows] == ["4", "", ""]
    assert strict.rows[1]["prompt"] == "q1?"


def test_lm_eval_samples_from_before_filters_were_named(tmp_path: Path) -> None:
    def unnamed(filters: tuple[str, ...]) -> Path:
        path = lm_eval(tmp_path / f"samples_sums{len(filters)}.jsonl", [1.0, 0.0], filters)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{key: row[key] for key in row if key not in ("filter", "metrics")} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    (found,) = read_evaluations(unnamed(("none",)))
    assert (found.task, found.metric) == ("sums1", "exact_match")
    assert [r["verdict"] for r in found.rows] == ["correct", "incorrect"]
    both = read_evaluations(unnamed(("strict", "flexible")))
    assert [e.task for e in both] == ["sums2,filter 1", "sums2,filter 2"]
    assert [[r["verdict"] for r in e.rows] for e in both] == [["correct", "incorrect"]] * 2
    path = lm_eval(tmp_path / "samples_mixed.jsonl", [1.0, 0.0])
    path.write_text(path.read_text().replace('"filter": "none", ', "", 1))
    with pytest.raises(UserError, match=r"samples_mixed\.jsonl:1: filter is missing"):
        read_evaluations(path)
    path.write_text('{"doc_id": 0}\n')
    with pytest.raises(
        UserError, match=r"samples_mixed\.jsonl:1: expected a sample from truestep or lm-eval"
    ):
        read_evaluations(path)


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
    assert [(r["completion"], r["prompt"]) for r in found.rows] == [("it is 4", "q0?"), ("it is 4", "q1?")]
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
    (found,) = compare_evaluations(a, b)["comparisons"]
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
        ("y.eval", "not an inspect log"),
        ("z.json", "samples_"),
        ("w", "no such"),
    ):
        with pytest.raises(UserError, match=words):
            read_evaluations(tmp_path / name)


def answered(path: Path, shares: list[float], texts: int = 4, ids: str = "q{i}?") -> Path:
    rows = [
        {"doc_id": i, "doc": {"question": ids.format(i=i)}, "target": "4", "resps": [[f"so {k}" for k in range(texts)]],
         "filtered_resps": ["4"] * texts, "filter": "none", "metrics": ["exact_match"], "exact_match": share}
        for i, share in enumerate(shares)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_score_that_is_a_mean_over_samples_stays_one(tmp_path: Path) -> None:
    (found,) = read_evaluations(answered(tmp_path / "samples_sums_2026-01-02T03.jsonl", [0.25, 1.0, 0.0]))
    by_problem = {i: [r["verdict"] for r in found.rows if r["problem_id"] == str(i)] for i in range(3)}
    assert [v.count("correct") for v in by_problem.values()] == [1, 4, 0]
    assert all(len(v) == 4 for v in by_problem.values())
    assert {r["completion"] for r in found.rows if r["problem_id"] == "0"} == {
        ""
    }  # which one was right is not known
    summary = import_evaluations([tmp_path / "samples_sums_2026-01-02T03.jsonl"], tmp_path / "out")
    assert summary["scores"][0]["score"] == pytest.approx(1.25 / 3)
    assert summary["scores"][0]["majority_at"] == {}


def test_a_score_that_is_no_verdict_is_said(tmp_path: Path) -> None:
    log = answered(tmp_path / "samples_sums_2026-01-02T03.jsonl", [0.3, 1.0], texts=1)
    summary = import_evaluations([log], tmp_path / "out")
    assert summary["scores"][0]["unscored"] == 1
    assert any("no verdict" in note for note in summary["notes"])


def test_what_a_log_does_not_say_is_unknown(tmp_path: Path) -> None:
    path = inspect_log(tmp_path / "a.eval", ["C", "I", "I", "I"])
    with zipfile.ZipFile(path) as archive:
        members = {n: json.loads(archive.read(n)) for n in archive.namelist()}
    for number, sample in enumerate(m for n, m in members.items() if n.startswith("samples/")):
        sample.pop("error", None)
        sample |= {"id": 0, "epoch": number + 1}
        del sample["scores"]["match"]["answer"], sample["output"]["usage"]
    members["header.json"] |= {"status": "cancelled"}
    members["header.json"]["eval"]["dataset"] = {"samples": 7}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, json.dumps(value))
    summary = import_evaluations([path], tmp_path / "out")
    (score,) = summary["scores"]
    assert (score["score"], score["majority_at"], score["extracted_rate"], score["mean_tokens"]) == (
        0.25,
        {},
        None,
        None,
    )
    assert not score["whole"]
    assert any("1 of 7 problems" in note and "cancelled" in note for note in summary["notes"])


@pytest.mark.parametrize("task", ["gpqa_diamond_cot_n_shot", "gpqa_main_zeroshot", "leaderboard_gpqa"])
def test_texts_of_gpqa_are_not_written_whatever_it_is_called(tmp_path: Path, task: str) -> None:
    log = answered(tmp_path / f"samples_{task}_2026-01-02T03.jsonl", [1.0, 0.0], texts=1, ids="zebra {i}?")
    import_evaluations([log], tmp_path / "out")
    assert not any(
        b"zebra" in p.read_bytes() or b"so 0" in p.read_bytes() for p in (tmp_path / "out").rglob("*.json*")
    )


def test_nothing_is_paired_or_dropped_in_silence(tmp_path: Path) -> None:
    a = answered(tmp_path / "samples_sums_2026-01-02T03.jsonl", [1.0, 0.0], texts=1)
    other = answered(tmp_path / "samples_sums_2026-02-02T03.jsonl", [1.0, 0.0], texts=1, ids="quark {i}?")
    with pytest.raises(UserError, match="in the first evaluation but not in the second"):
        compare_evaluations(a, other)  # the same doc_ids, other questions
    with pytest.raises(UserError, match="is also in"):
        compare_evaluations(tmp_path, a)  # two files of one task in one folder
    more = answered(tmp_path / "samples_more_2026-02-02T03.jsonl", [1.0], texts=1)
    other.unlink()
    found = compare_evaluations(tmp_path, a)
    assert [row["task"] for row in found["comparisons"]] == ["sums"]
    assert (found["only_in_a"], found["only_in_b"]) == (["more"], [])
    assert more.exists()


def test_every_filter_is_compared_with_a_side_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    a = lm_eval(tmp_path / "a" / "samples_sums_2026-01-02T03.jsonl", [1.0, 0.0], ("strict", "flexible"))
    b = lm_eval(tmp_path / "samples_sums_2026-02-02T03.jsonl", [1.0, 1.0])
    found = compare_evaluations(a, b)["comparisons"]
    assert [(row["task"], row["difference"]) for row in found] == [
        ("sums,strict", 0.5),
        ("sums,flexible", 0.5),
    ]


def test_an_unfinished_side_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "sums.samples.jsonl"
    rows = [
        {"problem_id": str(p), "sample_index": i, "verdict": "correct"}
        for p, n in ((0, 3), (1, 2))
        for i in range(n)
    ]
    header = {"header": True, "name": "sums", "identity": "x"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    with pytest.raises(UserError, match="has 2 to 3 samples per problem"):
        compare_evaluations(path, path)


def test_problems_that_repeat_are_paired_by_their_text_and_number(tmp_path: Path) -> None:
    a = answered(tmp_path / "samples_sums_2026-01-02T03.jsonl", [1.0, 0.0, 1.0], texts=1, ids="same?")
    rows = [json.loads(line) | {"doc_id": i + 10} for i, line in enumerate(a.read_text().splitlines())]
    b = tmp_path / "samples_sums_2026-02-02T03.jsonl"
    b.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = compare_evaluations(a, b)["comparisons"]
    assert (found["paired_by"], found["num_problems"], found["difference"]) == ("text", 3, 0.0)


def test_the_metric_is_named_and_can_be_chosen(tmp_path: Path) -> None:
    path = lm_eval(tmp_path / "samples_sums_2026-01-02T03.jsonl", [0.0, 0.0])
    rows = [json.loads(line) | {"metrics": ["exact_match", "math_verify"], "math_verify": 1.0}
            for line in path.read_text().splitlines()]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(e.metric, e.rows[0]["verdict"]) for e in read_evaluations(path)] == [("math_verify", "correct")]
    assert read_evaluations(path, "exact_match")[0].rows[0]["verdict"] == "incorrect"
    with pytest.raises(UserError, match="has no score f1"):
        read_evaluations(path, "f1")


def test_a_broken_file_is_one_line_with_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    good = inspect_log(tmp_path / "good.eval", ["C", "I"])
    bad = tmp_path / "bad.eval"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("header.json", "{}")
        archive.writestr("samples/1_epoch_1.json", "{broken")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "none.json").write_text('{"eval": {"task": "t"}, "samples": []}')
    (tmp_path / "rowless.jsonl").write_text(
        '{"header": true, "name": "t", "identity": "x"}\n{"problem_id": "1"}\n'
    )
    twice = tmp_path / "twice.jsonl"
    row = json.dumps({"problem_id": "1", "sample_index": 0, "verdict": "correct"})
    twice.write_text('{"header": true, "name": "t", "identity": "x"}\n' + f"{row}\n{row}\n")
    for name in ("bad.eval", "broken.json", "none.json", "rowless.jsonl", "twice.jsonl"):
        with pytest.raises(UserError, match=name):
            import_evaluations([good, tmp_path / name], tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["header.json", "samples/0_epoch_1.json"])
def test_a_compression_that_zipfile_does_not_know_is_said(tmp_path: Path, name: str) -> None:
    path = inspect_log(tmp_path / "a.eval", ["C", "I"])
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name).header_offset
    raw, central = bytearray(path.read_bytes()), path.read_bytes().rfind(name.encode()) - 46
    for place in (offset + 8, central + 10):  # of the method, in the local and the central header
        raw[place : place + 2] = (99).to_bytes(2, "little")
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"a.eval: {name} cannot be read .*compression.*convert --to json"):
        read_evaluations(path)


def test_an_export_has_exactly_the_fields_of_lm_eval() -> None:
    rows = [
        {
            "problem_id": "a",
            "prompt": "q?",
            "gold": "4",
            "completion": "it is 4",
            "extracted": "4",
            "verdict": "correct",
        },
        {
            "problem_id": "a",
            "prompt": "q?",
            "gold": "4",
            "completion": "no",
            "extracted": "",
            "verdict": "incorrect",
        },
    ]
    sha = {text: hashlib.sha256(text.encode()).hexdigest() for text in ("aq?4", "q?", "4")}
    assert list(external_logs._documents(rows)) == [
        {
            "doc_id": 0, "doc": {"id": "a", "problem": "q?", "answer": "4"}, "target": "4",
            "arguments": {"gen_args_0": {"arg_0": "q?", "arg_1": {}}}, "resps": [["it is 4", "no"]],
            "filtered_resps": ["4", "[invalid]"], "filter": "none", "metrics": ["exact_match"],
            "doc_hash": sha["aq?4"], "prompt_hash": sha["q?"], "target_hash": sha["4"], "exact_match": 0.5,
            "truestep": {"verdicts": ["correct", "incorrect"]},
        }
    ]  # fmt: skip


def test_exported_results_have_exactly_the_fields_of_lm_eval(tmp_path: Path) -> None:
    path = external_logs.samples_file(tmp_path, "sums")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")
    task = {"results": {"sums": {"exact_match,none": 0.5}}, "n-samples": {"sums": {"original": 2, "effective": 2}},
            "samples_per_problem": 2, "prompt": {"few_shot": 3}, "benchmark": {"content": "0123456789abcdef99"}}  # fmt: skip
    found = external_logs._lm_eval_results({"sums": task}, {"model": "m"}, {"commit": "c"}, tmp_path)
    assert found == {
        "results": {"sums": {"exact_match,none": 0.5}},
        "group_subtasks": {"sums": []},
        "configs": {"sums": {"task": "sums", "repeats": 2, "metadata": {"prompt": {"few_shot": 3}}}},
        "versions": {"sums": "0123456789abcdef"},
        "n-shot": {"sums": 3},
        "higher_is_better": {"sums": {"exact_match": True}},
        "n-samples": {"sums": {"original": 2, "effective": 2}},
        "config": {"model": "truestep", "model_args": {"pretrained": "m"}},
        "git_hash": "c",
        "task_hashes": {"sums": hashlib.sha256(b"{}\n").hexdigest()},
        "model_name": "m",
    }


def test_an_imported_run_has_exactly_the_fields_of_a_run(tmp_path: Path) -> None:
    log = lm_eval(tmp_path / "samples_sums_2026-01-02T03-04-05.6.jsonl", [1.0, 0.0])
    summary = import_evaluations([log], tmp_path / "out")
    assert {k: v for k, v in summary.items() if k != "scores"} == {
        "schema_version": 1, "kind": "evaluation", "name": "out", "status": "done", "model": "as in the logs",
        "engine": "imported", "seeds": {}, "spread": [], "averages": [],
        "notes": ["imported: the verdicts are those of the other harness; nothing was graded again"],
    }  # fmt: skip
    assert read_json(tmp_path / "out/summary.json") == summary
    (results,) = (
        r for p in (tmp_path / "out").rglob("*.json") if "whole" in (r := json.loads(p.read_text()))
    )
    assert (results["source"], results["metric"]) == (str(log), "exact_match")
    assert (results["private"], results["whole"], results["samples_per_problem"]) == (False, True, 1)
