"""Evaluations brought together: foreign ones written as a run of ours, and any two compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truestep.evaluate.compare import compare
from truestep.evaluate.estimate import by_problem, estimate
from truestep.evaluate.foreign import Evaluation, is_private, read_evaluations
from truestep.rundir import provenance, read_json, write_atomic, write_json
from truestep.settings import SettingsError

_TEXTS = ("prompt", "completion", "extracted", "gold", "reason")


def import_evaluations(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write foreign evaluations as a run directory; returns its summary. Raises SettingsError where it is taken."""
    if out.exists() and any(out.iterdir()):
        raise SettingsError(f"{out} exists and is not empty: write --out for another place")
    scores = []
    for evaluation in (e for path in paths for e in read_evaluations(path)):
        task = "".join(c if c.isalnum() or c in "._-" else "-" for c in evaluation.task).strip(".-") or "task"
        rows = [_without_texts(row) if is_private(task) else row for row in evaluation.rows]
        groups = by_problem(rows)
        found = estimate(rows, range(1, min(map(len, groups.values())) + 1)).to_json()
        folder = out / "evaluations" / evaluation.made_by
        if (folder / f"{task}.results.json").exists():
            raise SettingsError(
                f"{evaluation.source}: {task} of {evaluation.made_by} is there twice: import them apart"
            )
        header = {
            "header": True,
            "schema_version": 1,
            "name": task,
            "identity": f"{evaluation.made_by}:{evaluation.source}",
        }
        write_atomic(folder / f"{task}.samples.jsonl", "".join(_lines([header, *rows])))
        score = {
            "benchmark": task, "prompt": evaluation.made_by, "metric": "as judged there", "whole": True,
            "private": is_private(task), "published": {}, **found,
        }  # fmt: skip
        results = {
            task: {"alias": task, "exact_match,none": found["score"], "exact_match_stderr,none": found["stderr"]}
        }
        num = {"original": len(groups), "effective": len(groups)}
        more = {"samples_per_problem": found["n"] // len(groups), "estimate": found, "source": evaluation.source}
        write_json(folder / f"{task}.results.json", {"results": results, "n-samples": {task: num}, **more})
        scores.append(score)
    summary = {
        "schema_version": 1, "kind": "evaluation", "name": out.name, "status": "done", "model": "as in the logs",
        "engine": "imported", "seeds": {}, "scores": scores, "spread": [], "averages": [],
        "notes": ["imported: verdicts as the other harness gave them, nothing graded again"],
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    write_json(out / "provenance.json", provenance(0))
    return summary


def _without_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in row.items() if k not in _TEXTS}, "extracted": bool(row.get("extracted"))}


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    import json

    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def compare_evaluations(a: Path, b: Path) -> list[dict[str, Any]]:
    """b - a for every task that both have, paired by problem: by id, else by the problem's text.

    Raises SettingsError where no task, or not the same problems, are in both.
    """
    left, right = ({_key(e): e for e in read_evaluations(path)} for path in (a, b))
    pairs = [(key[0], left[key], right[key]) for key in left if key in right]
    if not pairs:  # other templates or harnesses: by task alone, where each side has one
        tasks = [t for t in dict.fromkeys(k[0] for k in left) if _alone(t, left) and _alone(t, right)]
        pairs = [(t, _of(t, left), _of(t, right)) for t in tasks]
    if not pairs and len(left) == len(right) == 1:  # one file each: the user says that they belong together
        pairs = [(next(iter(left))[0], next(iter(left.values())), next(iter(right.values())))]
    if not pairs:
        names = [", ".join(sorted({k[0] for k in side})) for side in (left, right)]
        raise SettingsError(
            f"{a} has {names[0]}, {b} has {names[1]}: expected a task that both have, give single files"
        )
    return [_compared(task, x, y, (a, b)) for task, x, y in pairs]


def _key(evaluation: Evaluation) -> tuple[str, str]:
    """Task, and where it is ours the template it was asked under."""
    return evaluation.task, Path(
        evaluation.source
    ).parent.name if evaluation.made_by == "truestep" else evaluation.made_by


def _alone(task: str, side: Mapping[tuple[str, str], Evaluation]) -> bool:
    return sum(key[0] == task for key in side) == 1


def _of(task: str, side: Mapping[tuple[str, str], Evaluation]) -> Evaluation:
    return next(e for key, e in side.items() if key[0] == task)


def _compared(task: str, x: Evaluation, y: Evaluation, paths: tuple[Path, Path]) -> dict[str, Any]:
    rows_x, rows_y, paired_by = x.rows, y.rows, "id"
    if not {r["problem_id"] for r in rows_x} & {r["problem_id"] for r in rows_y}:
        rows_x, rows_y, paired_by = _by_text(rows_x), _by_text(rows_y), "text"
    try:
        found = compare(rows_x, rows_y).to_json()
    except SettingsError as error:
        raise SettingsError(f"{paths[0]} and {paths[1]}: {task}: {error}") from None
    scores = [estimate(rows).to_json() for rows in (rows_x, rows_y)]
    kept = ("score", "low", "high", "n", "unscored")
    return {
        "task": task,
        "a": {"path": x.source, "made_by": x.made_by, "seed": _seed(x), **{k: scores[0][k] for k in kept}},
        "b": {"path": y.source, "made_by": y.made_by, "seed": _seed(y), **{k: scores[1][k] for k in kept}},
        "paired_by": paired_by,
        **found,
    }


def _by_text(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "problem_id": " ".join(str(row.get("prompt") or row["problem_id"]).split())} for row in rows]


def _seed(evaluation: Evaluation) -> int | None:
    """The sampling seed, where the results file beside our samples says it."""
    path = Path(evaluation.source.removesuffix(".samples.jsonl") + ".results.json")
    return read_json(path).get("seed") if evaluation.made_by == "truestep" and path.is_file() else None
