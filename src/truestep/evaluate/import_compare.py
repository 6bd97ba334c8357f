"""Imports logs from other harnesses as a run directory, and compares any two evaluations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truestep.errors import UserError, did_you_mean
from truestep.evaluate.benchmarks import BY_ID
from truestep.evaluate.compare import compare, compare_values
from truestep.evaluate.estimate import by_problem, estimate, mean_rewards, reward_names
from truestep.evaluate.external_logs import Evaluation, Row, is_private, read_evaluations
from truestep.evaluate.files import SCHEMA_VERSION, results_file, samples_file, score_row
from truestep.evaluate.run import task_results, write_samples
from truestep.records import RecordError
from truestep.rundir import provenance, read_json, write_json

CORRECT = "correct"  # the metric of the verdicts
MAX_TASK_BYTES = 200  # a name of a file has at most 255
_TEXTS = ("prompt", "completion", "extracted", "gold", "reason")


def import_evaluations(paths: Sequence[Path], out: Path, metric: str = "") -> dict[str, Any]:
    """Read all external evaluations, write them as a run directory, and return its summary. Raises UserError
    if the directory is not empty, or if an evaluation occurs twice."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; pass --out with a different path")
    read = [(e, *_estimated(e)) for path in paths for e in read_evaluations(path, metric)]
    sources: dict[tuple[str, str], str] = {}
    for evaluation, task, _, _ in read:
        if (key := (evaluation.made_by, task)) in sources:
            also = f"{task} from {evaluation.made_by} is also in {sources[key]}"
            raise UserError(f"{evaluation.source}: {also}; import them separately")
        sources[key] = evaluation.source
    notes = ["imported: the verdicts are those of the other harness; nothing was graded again"]
    scores = []
    for evaluation, task, rows, found in read:
        folder = out / "evaluations" / evaluation.made_by
        write_samples(samples_file(folder, task), task, f"{evaluation.made_by}:{evaluation.source}", rows)
        if evaluation.missing:
            notes.append(f"{task} is incomplete ({evaluation.missing})")
        if found["unscored"]:
            share = f"{found['unscored']} of {found['n']}"
            notes.append(f"{task}: {share} samples have no verdict and count as incorrect")
        size = BY_ID[task].num_rows if task in BY_ID else found["num_problems"]
        results = {
            "schema_version": SCHEMA_VERSION, **task_results(task, found), "estimate": found,
            "samples_per_problem": found["n"] // found["num_problems"], "source": evaluation.source,
            "metric": evaluation.metric or "as judged there", "private": is_private(task),
            "whole": not evaluation.missing and found["num_problems"] == size,
        }  # fmt: skip
        write_json(results_file(folder, task), results)
        scores.append(score_row(task, results, prompt=evaluation.made_by))
    summary = {
        "schema_version": 1, "kind": "evaluation", "name": out.name, "status": "done",
        "model": "as in the logs", "engine": "imported", "seeds": {}, "scores": scores, "spread": [],
        "averages": [], "notes": notes,
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    write_json(out / "provenance.json", provenance(0))
    return summary


def _estimated(evaluation: Evaluation) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the task's name as a file name, the samples in the order of their problems, and the estimate."""
    task = "".join(c if c.isalnum() or c in "._-" else "-" for c in evaluation.task).strip(".-") or "task"
    if (num := len(task.encode())) > MAX_TASK_BYTES:
        at_most = f"a name of at most {MAX_TASK_BYTES} bytes, as it becomes a file's name, got {num}"
        raise UserError(f"{evaluation.source}: task: expected {at_most}; shorten it")
    private = is_private(evaluation.task)
    groups = _grouped(evaluation)
    rows = [_without_texts(row) if private else row for group in groups.values() for row in group]
    return task, rows, estimate(rows, range(1, min(map(len, groups.values())) + 1)).to_json()


def _without_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in row.items() if k not in _TEXTS}
    return kept | ({"extracted": bool(row["extracted"])} if "extracted" in row else {})


def compare_evaluations(a: Path, b: Path, metric: str = "") -> dict[str, Any]:
    """Compare two evaluations. ``comparisons`` has b - a for each task that both have, paired by problem (by
    id if the texts agree, otherwise by text). Of a training run, the last checkpoint is compared. ``metric`` is
    "correct" (the default), a scorer of two evaluations of truestep, or a score of a log. ``only_in_a`` and
    ``only_in_b`` list the other tasks. Raises UserError if no task is in both, if a task has different problems, if the
    metric is unknown, or if an evaluation is unfinished."""
    metric = "" if metric == CORRECT else metric
    left, right = _by_key(a, metric), _by_key(b, metric)
    pairs = [(key, key) for key in left if key in right]
    # Different templates, harnesses or filters are compared if at least one side has only one.
    for task in dict.fromkeys(map(_task, left)):
        own, other = ([k for k in side if _task(k) == task] for side in (left, right))
        if not any(k in right for k in own) and 1 in (len(own), len(other)):
            pairs += [(x, y) for x in own for y in other]
    if not pairs and len(left) == len(right) == 1:  # single files are compared whatever their names are
        pairs = [(next(iter(left)), next(iter(right)))]
    if not pairs:
        names = [", ".join(sorted({k[0] for k in side})) for side in (left, right)]
        both = f"{a} has {names[0]}, {b} has {names[1]}, so no task is in both"
        raise UserError(f"{both}; pass single files to compare them anyway")
    return {
        "comparisons": [_compared(max(x[0], y[0], key=len), left[x], right[y], metric) for x, y in pairs],
        "only_in_a": sorted({k[0] for k in left} - {x[0] for x, _ in pairs}),
        "only_in_b": sorted({k[0] for k in right} - {y[0] for _, y in pairs}),
    }


Key = tuple[str, str]  # the task, and the template of a truestep run, or otherwise the harness


def _by_key(path: Path, metric: str) -> dict[Key, Evaluation]:
    found: dict[Key, Evaluation] = {}
    last = _last_checkpoint(path)
    for evaluation in read_evaluations(path / "evaluations" / last if last else path, metric):
        by = evaluation.made_by
        key = (
            evaluation.task,
            "" if last else Path(evaluation.source).parent.name if by == "truestep" else by,
        )
        if key in found:
            also = f"{key[0]} of {key[1]} is also in {found[key].source}"
            raise UserError(f"{evaluation.source}: {also}; pass files, or folders that contain it only once")
        found[key] = evaluation
    return found


def _last_checkpoint(path: Path) -> str:
    """Return the checkpoint that a training run evaluated last, or "" for anything else."""
    summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else {}
    scores = summary.get("scores") or [{}]
    return str(scores[-1].get("checkpoint", ""))


def _task(key: Key) -> str:
    """Return the task without lm-eval's filter."""
    return key[0].partition(",")[0]


def _is_scorer(metric: str, x: Evaluation, y: Evaluation) -> bool:
    """Return whether the metric is a scorer of both sides. In a log, it is a score that the verdicts come from; an
    evaluation of truestep is then compared by its own verdicts. Raises UserError if a side does not have it."""
    if not metric or "truestep" not in (x.made_by, y.made_by):
        return False
    for side, other in ((x, y), (y, x)):
        names = reward_names(side.rows)
        if side.made_by == other.made_by and metric not in names:
            known = ", ".join([CORRECT, *names])
            hint = did_you_mean(metric, [CORRECT, *names])
            raise UserError(f"{side.source} has no score {metric}; pass --metric with one of {known}{hint}")
        if side.made_by != other.made_by and metric in names:
            raise UserError(
                f"{other.source} has no mean of {metric}; pass two evaluations of truestep, or --metric {CORRECT}"
            )
    return x.made_by == y.made_by


def _compared(task: str, x: Evaluation, y: Evaluation, metric: str) -> dict[str, Any]:
    is_scorer = _is_scorer(metric, x, y)
    for evaluation in (x, y):
        if len(sizes := set(map(len, _grouped(evaluation).values()))) > 1:
            uneven = (
                f"has {min(sizes)} to {max(sizes)} samples per problem, but all problems need the same number"
            )
            raise UserError(f"{evaluation.source} {uneven}; finish it with truestep eval … --resume")
    rows_x, rows_y, paired_by = x.rows, y.rows, "id"
    if not _same_problems(rows_x, rows_y):
        rows_x, rows_y, paired_by = _by_text(rows_x), _by_text(rows_y), "text"
    try:
        found = compare(rows_x, rows_y).to_json()  # raises if the problems differ
        found = compare_values(rows_x, rows_y, metric) if is_scorer else found
    except UserError as error:
        raise UserError(f"{x.source} and {y.source}: {task}: {error}") from None
    sides = {}
    for name, one, rows in (("a", x, rows_x), ("b", y, rows_y)):
        score = estimate(rows).to_json()
        if is_scorer:
            mean = mean_rewards(rows)[metric]
            score |= {
                "score": mean["value"],
                "low": mean["low"],
                "high": mean["high"],
                "unscored": mean["missing"],
            }
        kept = {k: score[k] for k in ("score", "low", "high", "n", "unscored")}
        of = Path(one.source).parent.name if one.made_by == "truestep" else ""
        sides[name] = {"path": one.source, "made_by": one.made_by, "of": of, "seed": _seed(one), **kept}
    return {"task": task, "metric": metric or CORRECT, **sides, "paired_by": paired_by, **found}


def _grouped(evaluation: Evaluation) -> dict[str, list[Any]]:
    try:
        return by_problem(evaluation.rows)
    except (UserError, RecordError) as error:
        raise UserError(f"{evaluation.source}: {error}") from None


def _same_problems(a: Sequence[Row], b: Sequence[Row]) -> bool:
    """Return whether the same ids mean the same problems: some ids are in both, and, if both have texts, most
    texts agree (one text may contain the other, because harnesses put different words around a question)."""
    left, right = ({row["problem_id"]: _spaced(row.get("prompt")) for row in rows} for rows in (a, b))
    common = left.keys() & right.keys()
    texts = [(left[id], right[id]) for id in common if left[id] and right[id]]
    return bool(common) and 2 * sum(x in y or y in x for x, y in texts) >= len(texts)


def _by_text(rows: Sequence[Row]) -> list[Row]:
    """Return the samples with the problem's text as id. Problems with the same text are numbered."""
    ids: dict[str, dict[str, int]] = defaultdict(dict)  # text -> id of a problem -> number of that problem
    found = []
    for row in rows:
        text = _spaced(row.get("prompt")) or row["problem_id"]
        number = ids[text].setdefault(row["problem_id"], len(ids[text]) + 1)
        found.append({**row, "problem_id": text if number == 1 else f"{text} ({number})"})
    return found


def _spaced(text: Any) -> str:
    return " ".join(str(text or "").split())


def _seed(evaluation: Evaluation) -> int | None:
    """Return the sampling seed, if a results file next to the samples contains it."""
    source = Path(evaluation.source)
    path = results_file(source.parent, source.name.removesuffix(".samples.jsonl"))
    return read_json(path).get("seed") if evaluation.made_by == "truestep" and path.is_file() else None
