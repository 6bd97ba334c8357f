"""The page of an evaluation: scores with intervals, the spread over prompts, and as many problems as fit. The
problems can be filtered without a script. All numbers come from the files in a run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.evaluate.files import read_samples
from truestep.report import tables
from truestep.report.html import page_environment
from truestep.report.tables import ScoreRow, interval
from truestep.rundir import read_settings_text, redact, write_atomic

MOST_PROBLEMS = 300  # for each evaluation; unscored and incorrect problems come before correct ones
_ORDER = ("unscored", "incorrect", "mixed", "correct")
FILTERS = (("all", "All"), ("incorrect", "Incorrect"), ("mixed", "Sometimes correct"), ("correct", "Correct"),
           ("unscored", "Unscored"), ("truncated", "Cut off"), ("unanswered", "No answer found"))  # fmt: skip

Row = Mapping[str, Any]


def write_evaluation_report(run: Path) -> Path:
    """Write RUN/report.html. Raises UserError if the folder does not contain an evaluation."""
    summary = tables.read_summary(run)
    if summary.get("kind") != "evaluation":
        raise UserError(f"{run} has no evaluation of benchmarks; pass the folder that truestep eval printed")
    rows = tables.score_table(run)
    headings, cells = tables.cells_of(rows, tables.score_columns(rows))
    page = page_environment().get_template("evaluation.html").render(
        name=summary.get("name") or run.resolve().name, summary=summary, headings=headings, rows=cells,
        curves=[curve for row in rows if (curve := _curve(row))], filters=FILTERS,
        evaluations=[_evaluation(run, number, row) for number, row in enumerate(rows)],
        provenance={k: redact(str(v)) for k, v in tables.read_object(run / "provenance.json").items()},
        settings=redact(read_settings_text(run)),
    )  # fmt: skip
    write_atomic(run / "report.html", page)
    return run / "report.html"


def _curve(score: ScoreRow) -> dict[str, Any] | None:
    """Return pass@k and majority@k of one score, at powers of two and at the last k."""
    ks = sorted(map(int, score.pass_at))
    kept = [k for k in ks if k & (k - 1) == 0 or k == ks[-1]]
    if len(kept) < 2:
        return None
    curves = {"pass": score.pass_at, "majority": score.majority_at}
    lines = {name: [interval(found.get(str(k))) for k in kept] for name, found in curves.items()}
    return {"title": score.title, "ks": kept, **lines}


def _evaluation(run: Path, number: int, score: ScoreRow) -> dict[str, Any]:
    rows = read_samples(run / score.samples)
    problems = [_problem(list(group)) for _, group in groupby(rows, key=lambda row: row["problem_id"])]
    counts = {name: sum(name in p["classes"] for p in problems) for name, _ in FILTERS[1:]}
    kept = sorted(problems, key=lambda p: _ORDER.index(p["classes"][0]))[:MOST_PROBLEMS]
    return {
        "number": number, "title": score.title, "private": score.private, "path": score.samples,
        "counts": counts | {"all": len(problems)}, "problems": kept,
        "num_left_out": len(problems) - len(kept),
    }  # fmt: skip


def _problem(rows: Sequence[Row]) -> dict[str, Any]:
    """Return one problem with one or two samples: the first that is not correct (or otherwise the first), and
    a correct one."""
    verdicts = [row["verdict"] for row in rows]
    correct = verdicts.count("correct")
    some = "correct" if correct == len(rows) else "mixed" if correct else "incorrect"
    classes = ["unscored" if "unscored" in verdicts else some]
    classes += ["truncated"] if any(row.get("stop") == "length" for row in rows) else []
    classes += ["unanswered"] if any(not row.get("extracted") for row in rows) else []
    telling = next((row for row in rows if row["verdict"] != "correct"), rows[0])
    right = next((row for row in rows if row["verdict"] == "correct" and row is not telling), None)
    shown = [telling, *([right] if right else [])]
    return {"classes": classes, "rows": shown, "correct": correct, "n": len(rows)}
