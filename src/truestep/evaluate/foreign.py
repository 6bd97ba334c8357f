"""Results of other harnesses as rows of ours: lm-evaluation-harness, lighteval, inspect; and ours as lm-eval's.

A foreign verdict is taken as it stands: nothing is graded again. What a log does not say (a failed sample, a score that
is neither right nor wrong) is unscored, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.data.rows import RowError, read_rows
from truestep.evaluate.benchmarks import BY_ID
from truestep.records import Verdict
from truestep.rundir import file_sha256, read_json, read_jsonl, write_atomic, write_json
from truestep.settings import SettingsError

MAX_LOG_BYTES = 2**30  # of one unpacked file inside an inspect log
Row = dict[str, Any]
_SCORES = ("exact_match", "acc", "acc_norm", "math_verify", "extractive_match", "em", "quasi_exact_match", "pass@1")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Samples of one task from one file. ``made_by`` is truestep, lm-eval, lighteval or inspect."""

    task: str
    made_by: str
    source: str
    rows: list[Row]


def read_evaluations(path: Path) -> list[Evaluation]:
    """Every evaluation in a file or a folder of truestep's, lm-eval's, lighteval's or inspect's.

    Raises SettingsError where it is none of them.
    """
    if path.is_dir():
        patterns = ("*.samples.jsonl", "samples_*.jsonl", "details_*.parquet", "*.eval")
        files = sorted({p for pattern in patterns for p in path.rglob(pattern)})
        if not files:
            raise SettingsError(f"{path}: holds no samples ({', '.join(patterns)}): give a run directory or a log file")
        return [evaluation for file in files for evaluation in read_evaluations(file)]
    if not path.is_file():
        raise SettingsError(f"{path}: no such file or folder: give a run directory or a log file")
    if path.suffix == ".eval":
        return [_inspect(path, *_unpacked(path))]
    if path.suffix == ".parquet":
        return [_lighteval(path)]
    if path.suffix == ".json":
        return [_inspect_json(path)]
    return _jsonl(path)


def _jsonl(path: Path) -> list[Evaluation]:
    rows = []
    for number, row in read_rows(path):
        if isinstance(row, RowError):
            raise SettingsError(f"{path}:{number}: {row}: give a log as its harness wrote it")
        rows.append(row)
    if rows[0].get("header") and "identity" in rows[0]:
        return [Evaluation(task=str(rows[0]["name"]), made_by="truestep", source=str(path), rows=rows[1:])]
    if "doc_id" in rows[0] and "filter" in rows[0]:
        return _lm_eval(path, rows)
    raise SettingsError(f"{path}:1: expected a sample of truestep or lm-eval, got the fields {sorted(rows[0])[:6]}")


def _judged(value: Any) -> Verdict:
    """What a foreign score means: 1, true and C are right; 0, false, I and N wrong; anything else is no verdict."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return Verdict.CORRECT if value else Verdict.INCORRECT
    return {"C": Verdict.CORRECT, "I": Verdict.INCORRECT, "N": Verdict.INCORRECT}.get(str(value), Verdict.UNSCORED)


def _made(key: tuple[Any, int], value: Any, **more: Any) -> Row:
    verdict = _judged(value)
    reason = f"its score is {value!r:.60}" if verdict is Verdict.UNSCORED else "as its harness judged"
    row: Row = {
        "problem_id": str(key[0]),
        "sample_index": key[1],
        "prompt": "",
        "completion": "",
        "extracted": "",
        "gold": "",
    }
    return {**row, "verdict": verdict.value, "reason": reason, "stop": "", "num_tokens": 0, **more}


def _lm_eval(path: Path, rows: Sequence[Row]) -> list[Evaluation]:
    """One evaluation for each filter. Of several answers to a document lm-eval logs one score: the first is taken."""
    name = path.stem.removeprefix("samples_")
    task = name.partition("_20")[0] if "_20" in name else name
    found: dict[str, list[Row]] = {}
    for row in rows:
        doc, answer = row.get("doc") or {}, row.get("filtered_resps") or [""]
        metrics = row.get("metrics") or [m for m in _SCORES if m in row]
        value = row.get(metrics[0]) if metrics else None
        reply = row.get("resps") or [[""]]
        text = reply[0][0] if isinstance(reply[0], list) and reply[0] else reply[0]
        made = _made(
            (doc.get("id", row["doc_id"]), 0), value, prompt=_question(doc), completion=str(text),
            extracted="" if answer[0] == "[invalid]" else str(answer[0]), gold=str(row.get("target", "")),
        )  # fmt: skip
        found.setdefault(str(row["filter"]), []).append(made)
    many = len(found) > 1
    return [
        Evaluation(task=f"{task},{f}" if many else task, made_by="lm-eval", source=str(path), rows=own)
        for f, own in found.items()
    ]


def _question(doc: Mapping[str, Any]) -> str:
    return next((doc[k] for k in ("problem", "question", "query", "input") if isinstance(doc.get(k), str)), "")


def _lighteval(path: Path) -> Evaluation:
    """A details file: one row a document, ``__metric__`` (older: metrics) with one score of each kind."""
    rows = []
    for number, row in read_rows(path):
        if isinstance(row, RowError) or not ({"__doc__", "doc"} & row.keys()):
            raise SettingsError(f"{path}:{number}: expected a row of lighteval's details with __doc__ and __metric__")
        doc, reply = row.get("__doc__") or row["doc"], row.get("__model_response__") or row.get("model_response") or {}
        scores = row.get("__metric__") or row.get("metric") or {}
        name = next((m for m in _SCORES if m in scores), next(iter(scores), ""))
        texts = reply.get("text") or [""]
        gold = doc.get("choices") or [""]
        index = doc.get("gold_index")
        index = index[0] if isinstance(index, list) else index
        rows.append(
            _made(
                (doc.get("id") or number - 1, 0), scores.get(name), prompt=str(doc.get("query", "")),
                completion=str(texts[0]), gold=str(gold[index]) if isinstance(index, int) and index < len(gold) else "",
                num_tokens=len((reply.get("output_tokens") or [[]])[0]),
            )
        )  # fmt: skip
    task = path.stem.removeprefix("details_").rpartition("_20")[0] or path.stem
    return Evaluation(task=task, made_by="lighteval", source=str(path), rows=rows)


def _unpacked(path: Path) -> tuple[Row, Iterator[Row]]:
    """The header and the samples of an inspect log, which is a zip of JSON files."""
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        header = json.loads(_read(archive, "header.json", path))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise SettingsError(
            f"{path}: is no inspect log ({type(error).__name__}): give the file that inspect wrote"
        ) from None
    members = sorted(name for name in names if name.startswith("samples/") and name.endswith(".json"))
    return header, (json.loads(_read(archive, name, path)) for name in members)


def _read(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    if archive.getinfo(name).file_size > MAX_LOG_BYTES:
        raise SettingsError(f"{path}: {name} unpacks to more than {MAX_LOG_BYTES >> 20} MiB: refused")
    return archive.read(name)


def _inspect_json(path: Path) -> Evaluation:
    log = read_json(path)
    if not isinstance(log, dict) or "eval" not in log or "samples" not in log:
        hint = "give its samples_*.jsonl beside it" if isinstance(log, dict) and "results" in log else "give a log"
        raise SettingsError(f"{path}: expected an inspect log with eval and samples: {hint}")
    return _inspect(path, log, iter(log["samples"] or []))


def _inspect(path: Path, header: Mapping[str, Any], samples: Iterator[Row]) -> Evaluation:
    rows = []
    for sample in samples:
        scores = sample.get("scores") or {}
        score: Row = next(iter(scores.values()), {}) or {}
        output = sample.get("output") or {}
        choice = (output.get("choices") or [{}])[0]
        error = sample.get("error")
        made = _made(
            (sample.get("id"), int(sample.get("epoch", 1)) - 1), None if error else score.get("value"),
            prompt=_said(sample.get("input")), completion=_said([choice.get("message") or {}]),
            extracted=str(score.get("answer") or ""), gold=_target(sample.get("target")),
            num_tokens=int((output.get("usage") or {}).get("output_tokens", 0)),
            stop={"max_tokens": "length", "stop": "stop"}.get(str(choice.get("stop_reason")), ""),
        )  # fmt: skip
        rows.append(
            made | ({"reason": f"inspect: {error.get('message', '')!s:.200}"} if isinstance(error, dict) else {})
        )
    task = str((header.get("eval") or {}).get("task", path.stem)).rpartition("/")[2]
    return Evaluation(task=task, made_by="inspect", source=str(path), rows=rows)


def _target(target: Any) -> str:
    return ", ".join(map(str, target)) if isinstance(target, list) else str(target or "")


def _said(turns: Any) -> str:
    """The text of the last turn; inspect writes plain text, or parts of which some are text."""
    content = turns if isinstance(turns, str) else (turns or [{}])[-1].get("content", "")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


# ------------------------------------------------------------------------------------------------------------ writing


def write_lm_eval(run: Path, out: Path) -> list[Path]:
    """A run's evaluations as lm-evaluation-harness writes them: one folder a template, in it one results file and the
    samples of each task. Texts of a private benchmark are not there, as in the run itself."""
    provenance = read_json(run / "provenance.json") if (run / "provenance.json").is_file() else {}
    summary = read_json(run / "summary.json") if (run / "summary.json").is_file() else {}
    written = []
    for folder in sorted(p for p in (run / "evaluations").glob("*") if p.is_dir()):
        found = {p.name.removesuffix(".results.json"): read_json(p) for p in sorted(folder.glob("*.results.json"))}
        if not found:
            continue
        for task in found:
            rows = [row for row in read_jsonl(folder / f"{task}.samples.jsonl") if "verdict" in row]
            path = out / folder.name / f"samples_{task}.jsonl"
            write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _documents(rows)))
            written.append(path)
        path = out / folder.name / "results.json"
        write_json(path, _lm_eval_results(found, summary, provenance, folder))
        written.append(path)
    if not written:
        raise SettingsError(f"{run}: holds no finished evaluation: give the folder that truestep eval printed")
    return written


def _lm_eval_results(found: Mapping[str, Row], summary: Row, provenance: Row, folder: Path) -> Row:
    return {
        "results": {task: r["results"][task] for task, r in found.items()},
        "group_subtasks": {task: [] for task in found},
        "configs": {
            task: {"task": task, "repeats": r["samples_per_problem"], "metadata": {"prompt": r.get("prompt")}}
            for task, r in found.items()
        },
        "versions": {task: (r.get("benchmark") or {}).get("content", "")[:16] for task, r in found.items()},
        "n-shot": {task: (r.get("prompt") or {}).get("few_shot", 0) for task, r in found.items()},
        "higher_is_better": {task: {"exact_match": True} for task in found},
        "n-samples": {task: r["n-samples"][task] for task, r in found.items()},
        "config": {"model": "truestep", "model_args": {"pretrained": summary.get("model", "")}},
        "git_hash": provenance.get("commit"),
        "task_hashes": {task: file_sha256(folder / f"{task}.samples.jsonl") for task in found},
        "model_name": summary.get("model", ""),
    }


def _documents(rows: Sequence[Row]) -> Iterator[Row]:
    """One line a problem, as lm-eval has it; the score is the share of its samples that are correct."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    for number, (problem_id, group) in enumerate(groups.items()):
        prompt, gold = str(group[0].get("prompt", "")), str(group[0].get("gold", ""))
        yield {
            "doc_id": number,
            "doc": {"id": problem_id, "problem": prompt, "answer": gold},
            "target": gold,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
            "resps": [[row.get("completion", "") for row in group]],
            "filtered_resps": [row.get("extracted") or "[invalid]" for row in group],
            "filter": "none",
            "metrics": ["exact_match"],
            "doc_hash": _sha(problem_id + prompt + gold),
            "prompt_hash": _sha(prompt),
            "target_hash": _sha(gold),
            "exact_match": sum(row["verdict"] == Verdict.CORRECT for row in group) / len(group),
        }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_private(task: str) -> bool:
    """Whether a benchmark's texts must not be written."""
    return task in BY_ID and BY_ID[task].private
