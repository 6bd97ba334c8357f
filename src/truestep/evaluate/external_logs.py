"""Reads logs from lm-evaluation-harness, lighteval and inspect as rows, and writes rows as lm-eval logs.

The verdicts of other harnesses are kept; nothing is graded again. A sample without a verdict (it failed, or
its score means neither correct nor incorrect) is unscored, with the reason."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.data.rows import RowError, read_rows
from truestep.errors import UserError
from truestep.evaluate import log_fields
from truestep.evaluate.benchmarks import BY_ID
from truestep.evaluate.files import Row, read_samples, results_file, samples_file
from truestep.evaluate.log_fields import AS_WRITTEN, check_fields
from truestep.records import Verdict
from truestep.rundir import UNFINISHED, file_sha256, read_json, write_atomic

MAX_LOG_BYTES = 2**30  # for one unpacked file in an inspect log
_SCORES = ("exact_match", "acc", "acc_norm", "math_verify", "extractive_match", "em", "quasi_exact_match", "pass@1")  # fmt: skip
_OF_LM_EVAL = {"filter", "resps", "filtered_resps"}  # logs before lm-eval 0.4.3 have no filter
JUDGED = "as judged by its harness"
_NO_VERDICT = re.compile(r"its score is -?[\d.]")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The samples of one task in one file. ``made_by`` is truestep, lm-eval, lighteval or inspect; ``metric``
    names the score that the verdicts come from; ``missing`` says why the log is incomplete."""

    task: str
    made_by: str
    source: str
    rows: list[Row]
    metric: str = ""
    missing: str = ""


def read_evaluations(path: Path, metric: str = "") -> list[Evaluation]:
    """Return every evaluation in a file or folder written by truestep, lm-eval, lighteval or inspect.
    ``metric`` names the score to use if a log has several. Raises UserError for anything else, for a field of
    the wrong type, and for a score that is not right or wrong (such as BLEU)."""
    if path.is_dir():
        patterns = ("*.samples.jsonl", "samples_*.jsonl", "details_*.parquet", "*.eval")
        files = sorted({p for pattern in patterns for p in path.rglob(pattern) if p.is_file()})
        if not files and (path / "resolved.toml").is_file():
            remedy = f"run truestep eval {path} --benchmark ... and pass the folder that it writes"
            raise UserError(f"the run {path} has no evaluation; {remedy}")
        if not files:
            raise UserError(f"{path} contains no {', '.join(patterns)}; pass a run directory or a log file")
        return [evaluation for file in files for evaluation in read_evaluations(file, metric)]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; pass a run directory or a log file")
    if path.suffix in (".eval", ".json"):
        found = [_inspect(path, *(_unpacked if path.suffix == ".eval" else _inspect_json)(path), metric)]
    else:
        found = [_lighteval(path, metric)] if path.suffix == ".parquet" else _jsonl(path, metric)
    for evaluation in found if found[0].made_by != "truestep" else ():
        _require_verdicts(evaluation)
    return found


def _require_verdicts(evaluation: Evaluation) -> None:
    """Raise UserError if the score is a number between right and wrong in some samples and right in none."""
    strange = [row["reason"] for row in evaluation.rows if _NO_VERDICT.match(row.get("reason", ""))]
    if strange and not any(row["verdict"] == Verdict.CORRECT for row in evaluation.rows):
        count = f"{len(strange)} of {len(evaluation.rows)} samples of {evaluation.task}"
        metric = f"{evaluation.metric} says neither right nor wrong for {count} ({strange[0]})"
        raise UserError(f"{evaluation.source}: {metric}; pass --metric with a score of 0 and 1")


def _jsonl(path: Path, metric: str) -> list[Evaluation]:
    rows, numbers = [], []
    for number, row in read_rows(path):
        if isinstance(row, RowError):
            raise UserError(f"{path}:{number}: {row}; {AS_WRITTEN}")
        rows.append(row)
        numbers.append(number)
    if not rows:
        raise UserError(f"{path} is empty; {AS_WRITTEN}")
    first, own = rows[0], bool(rows[0].get("header"))
    if not (own and "identity" in first) and not ("doc_id" in first and first.keys() & _OF_LM_EVAL):
        raise UserError(f"{path}:1: expected a sample from truestep or lm-eval, got {sorted(first)[:6]}")
    fields: tuple[str, ...] = ("problem_id", "sample_index", "verdict") if own else ("doc_id",)
    fields += ("filter",) if not own and any("filter" in row for row in rows) else ()
    check_fields(f"{path}:{numbers[0]}", first, log_fields.OWN_HEADER if own else log_fields.LM_EVAL)
    for number, row in list(zip(numbers, rows, strict=True))[own:]:
        if lacking := [field for field in fields if row.get(field) is None]:
            raise UserError(f"{path}:{number}: {lacking[0]} is missing; {AS_WRITTEN}")
        check_fields(f"{path}:{number}", row, log_fields.OWN if own else log_fields.LM_EVAL)
        if own and row["verdict"] not in set(Verdict):
            raise UserError(f"{path}:{number}: verdict: expected one of {', '.join(Verdict)}")
    if own:
        task = str(first.get("name", path.stem))
        return [Evaluation(task=task, made_by="truestep", source=str(path), rows=read_samples(path))]
    return _lm_eval(path, rows, metric)


def _made(key: tuple[Any, int], value: Any, **more: Any) -> Row:
    """Return a row. The scores 1, true and C are correct; 0, false, I and N incorrect; others unscored."""
    scores: dict[Any, Verdict] = dict.fromkeys((0, "I", "N"), Verdict.INCORRECT)
    scores |= dict.fromkeys((1, "C"), Verdict.CORRECT)
    verdict = scores.get(value if isinstance(value, bool | int | float) else str(value), Verdict.UNSCORED)
    reason = f"its score is {value!r:.60}" if verdict is Verdict.UNSCORED else JUDGED
    reason = "it has no score" if value is None else reason
    row: Row = {"problem_id": str(key[0]), "sample_index": key[1], "prompt": "", "completion": "", "gold": ""}
    known = {k: v for k, v in more.items() if v is not None}  # the row contains only what the log contains
    return {**row, "verdict": verdict.value, "reason": reason, **known}


def _is_share(value: Any, num: int) -> bool:
    """Return whether a score can only be the mean c / n over several samples."""
    share = num > 1 and isinstance(value, float) and 0 < value < 1
    return share and abs(value * num - round(value * num)) < 1e-6


def _samples(value: Any, texts: Sequence[str], averaged: bool) -> list[tuple[Any, str, str | None]]:
    """Return the score, text and reason of each sample behind one score, or of only the first sample if the
    scores are not means. If only some samples are correct, the log does not say which, so none gets a text."""
    num = len(texts)
    if not (averaged and num > 1 and (value in (0, 1) or _is_share(value, num))):
        return [(value, texts[0] if texts else "", None)]
    right = round(value * num)
    if right in (0, num):
        return [(value, text, None) for text in texts]
    reason = f"{right} of {num} samples are correct, {JUDGED}; the log does not say which"
    return [(int(i < right), "", reason) for i in range(num)]


def _lm_eval(path: Path, rows: Sequence[Row], metric: str) -> list[Evaluation]:
    """Return one evaluation per filter. The verdicts come from the requested metric, otherwise from
    math_verify if it is logged, otherwise from the first metric. If a document has several answers, lm-eval
    logs only the mean score or the first score."""
    task = path.stem.removeprefix("samples_").partition("_20")[0]  # a date follows
    if "filter" not in rows[0]:
        rows = _with_filters(rows)
    found: dict[str, list[Row]] = {}
    per_filter = Counter((str(row["filter"]), str((row.get("doc") or {}).get("id"))) for row in rows)
    has_ids = all(isinstance(row.get("doc"), dict) and "id" in row["doc"] for row in rows)
    by_doc_id = not has_ids or max(per_filter.values()) > 1
    judge = _metric(path, metric, rows[0].get("metrics") or [m for m in _SCORES if m in rows[0]])
    averaged = any(_is_share(row.get(judge), len(_replies(row))) for row in rows)
    for row in rows:
        doc = row.get("doc") or {}
        key = str(row["doc_id"] if by_doc_id else doc["id"])
        own = found.setdefault(str(row["filter"]), [])
        asked = (doc.get(name) for name in ("problem", "question", "query", "input"))
        prompt = next((text for text in asked if isinstance(text, str)), "")
        facts = {"prompt": prompt, "gold": str(row.get("target", ""))}
        answers = ["" if a == "[invalid]" else str(a) for a in row.get("filtered_resps") or [""]]
        texts = _replies(row)
        if "truestep" in row:  # written by truestep eval export
            verdicts = (row["truestep"] or {}).get("verdicts") or []
            if len(verdicts) != len(texts) or len(texts) != len(answers) or not {*verdicts} <= {*Verdict}:
                raise UserError(
                    f"{path}: doc_id {row['doc_id']}: truestep.verdicts: expected one for each of resps"
                )
            for i, (verdict, text, answer) in enumerate(zip(verdicts, texts, answers, strict=True)):
                facts |= {"completion": text, "extracted": answer, "reason": JUDGED, "verdict": verdict}
                own.append(_made((key, i), None, **facts))
            continue
        for i, (score, text, reason) in enumerate(_samples(row.get(judge), texts, averaged)):
            extracted = None if reason else answers[i if i < len(answers) else 0]
            own.append(_made((key, i), score, completion=text, extracted=extracted, reason=reason, **facts))
    shared: dict[str, Any] = {"made_by": "lm-eval", "source": str(path), "metric": judge}
    names = {name: f"{task},{name}" if len(found) > 1 else task for name in found}
    return [Evaluation(task=names[name], rows=own, **shared) for name, own in found.items()]


def _with_filters(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a log from before lm-eval named the filter. If there were several filters, every
    document is in the log once for each, and the filters are numbered."""
    seen: Counter[str] = Counter()
    numbers = []
    for row in rows:
        seen[str(row["doc_id"])] += 1
        numbers.append(seen[str(row["doc_id"])])
    several = max(numbers) > 1
    return [
        {**row, "filter": f"filter {n}" if several else "none"} for row, n in zip(rows, numbers, strict=True)
    ]


def _replies(row: Row) -> list[str]:
    reply = row.get("resps") or [[""]]
    return [str(text) for text in (reply[0] if isinstance(reply[0], list) and reply[0] else reply)]


def _metric(path: Path, wanted: str, logged: Sequence[str]) -> str:
    """Return the name of the score to use. Raises UserError if the log does not have the requested score."""
    wanted = "" if wanted == "correct" and wanted not in logged else wanted
    if wanted and wanted not in logged:
        remedy = f"pass --metric with one of {', '.join(logged)}" if logged else "it has no scores at all"
        raise UserError(f"{path} has no score {wanted}; {remedy}")
    return wanted or next((m for m in ("math_verify", *logged) if m in logged), "")


def _lighteval(path: Path, metric: str) -> Evaluation:
    """Read a details file, which has one row per document. ``__metric__`` (older: metric) has the scores."""
    read: list[tuple[Row, list[str], list[int], Row]] = []  # document, replies, their tokens, scores
    for number, row in read_rows(path):
        if isinstance(row, RowError) or not ({"__doc__", "doc"} & row.keys()):
            raise UserError(f"{path}:{number}: expected lighteval details with __doc__ and __metric__")
        check_fields(f"{path}:{number}", row, log_fields.LIGHTEVAL)
        reply = row.get("__model_response__") or row.get("model_response") or {}
        texts = [str(text) for text in reply.get("text") or [""]]
        tokens = [len(ids) for ids in reply.get("output_tokens") or []]
        scores = row.get("__metric__") or row.get("metric") or {}
        read.append((row.get("__doc__") or row.get("doc") or {}, texts, tokens, scores))
    logged = read[0][-1] if read else {}
    best_first = sorted(logged, key=lambda m: _SCORES.index(m) if m in _SCORES else len(_SCORES))
    judge = _metric(path, metric, best_first)
    averaged = any(_is_share(scores.get(judge), len(texts)) for _, texts, _, scores in read)
    rows = []
    for number, (doc, texts, tokens, scores) in enumerate(read):
        gold, index = doc.get("choices") or [""], doc.get("gold_index")
        index = next(iter(index), None) if isinstance(index, list) else index
        answer = str(gold[index]) if isinstance(index, int) and 0 <= index < len(gold) else ""
        facts = {"prompt": str(doc.get("query", "")), "gold": answer}
        for i, (score, text, reason) in enumerate(_samples(scores.get(judge), texts, averaged)):
            num = tokens[i] if i < len(tokens) else None
            key = (doc.get("id") or number, i)
            rows.append(_made(key, score, completion=text, num_tokens=num, reason=reason, **facts))
    task = path.stem.removeprefix("details_").rpartition("_20")[0] or path.stem
    return Evaluation(task=task, made_by="lighteval", source=str(path), rows=rows, metric=judge)


def _unpacked(path: Path) -> tuple[Row, Iterator[Row]]:
    """Return the header and the samples of an inspect log, which is a zip of JSON files."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not an inspect log ({error}); {AS_WRITTEN}") from None
    members = sorted(n for n in archive.namelist() if n.startswith("samples/") and n.endswith(".json"))
    return _object(archive, "header.json", path), (_object(archive, name, path) for name in members)


def _object(archive: zipfile.ZipFile, name: str, path: Path) -> Row:
    """Read one JSON object from the zip. Raises UserError if it is missing, unreadable or too large."""
    try:
        size = archive.getinfo(name).file_size
        found = json.loads(archive.read(name)) if size <= MAX_LOG_BYTES else {}
    except (KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        hint = f"{AS_WRITTEN}, or the output of inspect log convert --to json"
        raise UserError(f"{path}: {name} cannot be read ({error}); {hint}") from None
    if size > MAX_LOG_BYTES:
        raise UserError(f"{path}: {name} unpacks to more than {MAX_LOG_BYTES >> 20} MiB and is refused")
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name}: expected an object; {AS_WRITTEN}")
    return found


def _inspect_json(path: Path) -> tuple[Row, Iterator[Row]]:
    try:
        log = read_json(path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {AS_WRITTEN}") from None
    if not isinstance(log, dict) or "eval" not in log or "samples" not in log:
        results = isinstance(log, dict) and "results" in log
        hint = "pass the samples_*.jsonl in the same folder" if results else AS_WRITTEN
        raise UserError(f"{path}: expected an inspect log with eval and samples; {hint}")
    return log, iter(log["samples"] if isinstance(log["samples"], list) else [])


def _inspect(path: Path, header: Mapping[str, Any], samples: Iterator[Row], metric: str) -> Evaluation:
    rows, judge = [], ""
    check_fields(str(path), header, log_fields.INSPECT_HEADER)
    for number, sample in enumerate(samples, start=1):
        check_fields(f"{path}: sample {number}", sample, log_fields.INSPECT)
        if sample.get("id") is None:
            raise UserError(f"{path}: sample {number}: id is missing; {AS_WRITTEN}")
        scores = sample.get("scores") or {}
        judge = judge or (_metric(path, metric, list(scores)) if scores else "")
        score: Row = scores.get(judge) or {}
        output = sample.get("output") or {}
        choice = (output.get("choices") or [{}])[0]
        error, target = sample.get("error"), sample.get("target") or ""
        made = _made(
            (sample["id"], (sample.get("epoch") or 1) - 1), None if error else score.get("value"),
            prompt=_said(sample.get("input")), completion=_said([choice.get("message") or {}]),
            extracted=str(score["answer"] or "") if "answer" in score else None,
            gold=", ".join(map(str, target if isinstance(target, list) else [target])),
            num_tokens=(output.get("usage") or {}).get("output_tokens"),
            stop={"max_tokens": "length", "stop": "stop"}.get(str(choice.get("stop_reason"))),
        )  # fmt: skip
        if isinstance(error, dict):
            made["reason"] = f"inspect: {error.get('message', '')!s:.200}"
        rows.append(made)
    about, status = header.get("eval") or {}, header.get("status")
    task = str(about.get("task") or path.stem).rpartition("/")[2]
    total, num = (about.get("dataset") or {}).get("samples"), len({row["problem_id"] for row in rows})
    missing = f"its status is {status}" if status not in (None, "success") else ""
    if isinstance(total, int) and num < total:
        missing = f"{num} of {total} problems" + (f", {missing}" if missing else "")
    about = {"made_by": "inspect", "source": str(path), "missing": missing}
    return Evaluation(task=task, rows=rows, metric=judge, **about)


def _said(turns: Any) -> str:
    """Return the text of the last turn, which is plain text or a list of parts, some of which are text."""
    content = turns if isinstance(turns, str) else (turns or [{}])[-1].get("content") or ""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content)


def write_lm_eval(run: Path, out: Path) -> list[Path]:
    """Write a run's evaluations as lm-evaluation-harness does. Each template or checkpoint has a folder with
    one results file and a samples file per task. As in the run, texts of a private benchmark are left out."""
    paths = (run / "provenance.json", run / "summary.json")
    provenance, summary = (read_json(path) if path.is_file() else {} for path in paths)
    written = []
    for folder in sorted(p for p in (run / "evaluations").glob("*") if p.is_dir()):
        tasks = [p.name.removesuffix(".results.json") for p in sorted(folder.glob("*.results.json"))]
        found = {task: _results_of(folder, task) for task in tasks}
        if not found:
            continue
        for left in (out / folder.name).glob(f".*{UNFINISHED[0]}"):  # by a killed export
            left.unlink(missing_ok=True)
        for task in found:
            lines = _documents(read_samples(samples_file(folder, task)))
            path = out / folder.name / f"samples_{task}.jsonl"
            write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            written.append(path)
        path = out / folder.name / "results.json"
        results = _lm_eval_results(found, summary, provenance, folder)
        write_atomic(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        written.append(path)
    if not written:
        raise UserError(f"{run} contains no finished evaluation; pass the folder that truestep eval printed")
    return written


def _results_of(folder: Path, task: str) -> Row:
    if not samples_file(folder, task).is_file():
        raise UserError(f"{samples_file(folder, task)} is missing; pass a complete run directory")
    path = results_file(folder, task)
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a results file ({error}); evaluate again with --resume") from None


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
        "task_hashes": {task: file_sha256(samples_file(folder, task)) for task in found},
        "model_name": summary.get("model", ""),
    }


def _documents(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield one line per problem, as lm-eval does. Its score is the share of correct samples."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    for number, (problem_id, group) in enumerate(groups.items()):
        prompt, gold = str(group[0].get("prompt", "")), str(group[0].get("gold", ""))
        yield {
            "doc_id": number, "doc": {"id": problem_id, "problem": prompt, "answer": gold}, "target": gold,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
            "resps": [[row.get("completion", "") for row in group]],
            "filtered_resps": [row.get("extracted") or "[invalid]" for row in group],
            "filter": "none", "metrics": ["exact_match"], "doc_hash": _sha(problem_id + prompt + gold),
            "prompt_hash": _sha(prompt), "target_hash": _sha(gold),
            "exact_match": sum(row["verdict"] == Verdict.CORRECT for row in group) / len(group),
            "truestep": {"verdicts": [row["verdict"] for row in group]},
        }  # fmt: skip


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_private(task: str) -> bool:
    """Return whether a task's texts must not be written. In other harnesses, the name of a private benchmark
    contains the first word of its id, as in gpqa_diamond_cot_n_shot and lighteval|gpqa:diamond|0."""
    return any(b.id.partition("_")[0] in task.lower() for b in BY_ID.values() if b.private)
