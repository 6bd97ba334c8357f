"""The page of an evaluation: scores with intervals, the spread over prompts, and every problem that fits,
filtered without a script. Reads the files of a run directory and computes no statistic."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.report.html import page_environment
from truestep.report.tables import NONE, percent, read_object, read_summary, visible, whole, with_interval
from truestep.rundir import read_jsonl, redact, write_atomic

MOST_PROBLEMS = 300  # of one evaluation; unscored and wrong ones come before right ones
WIDE = 95  # columns of a terminal that holds the whole table
_ORDER = ("unscored", "incorrect", "mixed", "correct")
FILTERS = (("all", "All"), ("incorrect", "Wrong"), ("mixed", "Sometimes right"), ("correct", "Right"),
           ("unscored", "Unscored"), ("truncated", "Cut off"), ("unanswered", "No answer found"))  # fmt: skip

Row = Mapping[str, Any]


def write_evaluation_report(run: Path) -> Path:
    """Write RUN/report.html. Raises UserError where the folder holds no evaluation."""
    summary = read_summary(run)
    if summary.get("kind") != "evaluation":
        raise UserError(
            f"{run}: holds no evaluation of benchmarks: give the folder that truestep eval printed"
        )
    scores = summary.get("scores") or []
    rows = [[visible(cell) for cell in cells(score)] for score in scores]
    said = [
        n for n in range(len(HEADINGS)) if any(row[n] != NONE for row in rows)
    ]  # a column that says something
    page = page_environment().get_template("evaluation.html").render(
        name=summary.get("name") or run.resolve().name,
        summary=summary,
        headings=[HEADINGS[n] for n in said],
        rows=[[row[n] for n in said] for row in rows],
        curves=[curve for score in scores if (curve := _curve(score))],
        evaluations=[_evaluation(run, number, score) for number, score in enumerate(scores)],
        filters=FILTERS,
        provenance={k: redact(str(v)) for k, v in read_object(run / "provenance.json").items()},
        settings=redact(_text(run / "resolved.toml")),
    )  # fmt: skip
    write_atomic(run / "report.html", page)
    return run / "report.html"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


# ------------------------------------------------------------------------------------------------- the scores

HEADINGS = ("Benchmark", "Prompt", "Score [95 % interval]", "Strict", "Majority", "Problems × samples", "Unscored",
            "Cut off", "Answer found", "Mean tokens", "The paper's SFT→RL")  # fmt: skip


def cells(score: Row) -> list[str]:
    """One score as text, in the order of HEADINGS."""
    majority = (score.get("majority_at") or {}).get(str(max(map(int, score.get("pass_at") or {"1": 0}))))
    several = score["n"] > score["num_problems"]
    return [
        score["benchmark"] + ("" if score.get("whole", True) else " (part)"),
        score["prompt"],
        with_interval(score["score"], score["low"], score["high"]),
        percent(score.get("strict_score")),
        percent(majority["value"]) if several and majority else NONE,
        f"{whole(score['num_problems'])} × {whole(score['n'] / score['num_problems'])}",
        whole(score["unscored"]),
        percent(score["truncated_rate"]),
        percent(score["extracted_rate"]),
        whole(score["mean_tokens"]),
        f"{(score.get('published') or {}).get('SFT→RL', NONE)}",
    ]


def _curve(score: Row) -> dict[str, Any] | None:
    """pass@k and majority@k of one score, at powers of two and at the last k."""
    found = score.get("pass_at") or {}
    ks = sorted(map(int, found))
    kept = [k for k in ks if k & (k - 1) == 0 or k == ks[-1]]
    if len(kept) < 2:
        return None
    majority = score.get("majority_at") or {}

    def line(values: Mapping[str, Any]) -> list[str]:
        return [_interval(values.get(str(k))) for k in kept]

    return {
        "title": f"{score['benchmark']} · {score['prompt']}",
        "ks": kept,
        "pass": line(found),
        "majority": line(majority),
    }


def _interval(entry: Row | None) -> str:
    return with_interval(entry["value"], entry["low"], entry["high"]) if entry else NONE


def print_scores(summary: Row) -> None:
    """The scores for a terminal; a narrow one goes without the paper's."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    without = {"Mean tokens", "Majority", "Unscored"} | ({HEADINGS[-1]} if console.width < WIDE else set())
    shown = [number for number, name in enumerate(HEADINGS) if name not in without]
    table = Table(
        title=Text(str(summary.get("name", ""))), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for number in shown:
        heading = Text(textwrap.fill(HEADINGS[number], 11))
        table.add_column(heading, justify="left" if number < 2 else "right")
    for score in summary.get("scores") or []:  # what is in brackets has a line of its own: nothing is broken
        texts = [visible(cell).replace(" [", "\n[").replace(" (", "\n(") for cell in cells(score)]
        table.add_row(*(Text(texts[number]) for number in shown))
    console.print(table)


# ----------------------------------------------------------------------------------------------- the problems


def _evaluation(run: Path, number: int, score: Row) -> dict[str, Any]:
    path = run / "evaluations" / str(score["prompt"]) / f"{score['benchmark']}.samples.jsonl"
    rows = [row for row in read_jsonl(path) if "verdict" in row]
    problems = [_problem(list(group)) for _, group in groupby(rows, key=lambda row: row["problem_id"])]
    counts = {name: sum(name in p["classes"] for p in problems) for name, _ in FILTERS[1:]} | {
        "all": len(problems)
    }
    kept = sorted(problems, key=lambda p: _ORDER.index(p["classes"][0]))[:MOST_PROBLEMS]
    return {
        "number": number,
        "title": f"{score['benchmark']} · {score['prompt']}",
        "private": bool(score.get("private")),
        "counts": counts,
        "problems": kept,
        "num_left_out": len(problems) - len(kept),
        "path": f"evaluations/{score['prompt']}/{score['benchmark']}.samples.jsonl",
    }


def _problem(rows: Sequence[Row]) -> dict[str, Any]:
    """One problem with the sample that says most about it: the first that is not right, else the first."""
    verdicts = [row["verdict"] for row in rows]
    correct = verdicts.count("correct")
    kind = (
        "unscored"
        if "unscored" in verdicts
        else "correct"
        if correct == len(rows)
        else "mixed"
        if correct
        else "incorrect"
    )
    telling = next((row for row in rows if row["verdict"] != "correct"), rows[0])
    classes = [kind]
    classes += ["truncated"] if any(row.get("stop") == "length" for row in rows) else []
    classes += ["unanswered"] if any(not row.get("extracted") for row in rows) else []
    right = next((row for row in rows if row["verdict"] == "correct" and row is not telling), None)
    return {
        "classes": classes,
        "rows": [telling, *([right] if right else [])],
        "correct": correct,
        "n": len(rows),
    }
