"""Renders the runs of a log as one self-contained HTML page without scripts.

All text is untrusted, so ``words.line`` makes invisible characters visible and Jinja escapes markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from truestep import pages
from truestep.audit.measure.findings import Verdict
from truestep.audit.present.page import KINDS, draw
from truestep.audit.present.words import line, small
from truestep.guard.runs import Record, Run
from truestep.guard.shown import bar_row, finding, name_of, note_texts, step_shown, versions, watched

BARS = 16  # in one row of bars, which then fits in the page
ROWS = 16  # of bars
GROUPS, NOTES, MODULES = 40, 40, 64  # that are shown
LABEL = 34.0  # pixels from the left to the first bar, as in ``draw``


def render_page(runs: Sequence[Run]) -> str:
    """Return the whole page as text."""
    how: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = pages.loader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(autoescape=True, loader=loader, **how)
    return environment.get_template("guard.html.j2").render(
        outcome=_outcome(runs), runs=[_entry(number, run) for number, run in enumerate(runs, start=1)]
    )


def _outcome(runs: Sequence[Run]) -> str:
    steps = sum(len(run.steps) for run in runs)
    faulty = sum(one["verdict"] == "FAULT" for run in runs for one in run.steps)
    right = sum(one["verdict"] == "RIGHT" for run in runs for one in run.steps)
    if not steps:
        return "No step was watched."
    some = "the watched step" if steps == 1 else f"{{}} of {steps} watched steps"
    if faulty:
        return f"In {some.format(faulty)}, the update is not the one that was asked for."
    if not right:
        return "No watched step could be judged."
    return f"No fault was found; in {some.format(right)}, every micro-batch counts once."


def _entry(number: int, run: Run) -> dict[str, Any]:
    header = run.header or {}
    step, notes, groups = step_shown(run), note_texts(run), _groups(run)
    drawings, hidden = _drawings(run, step)
    return {
        "number": number,
        "name": name_of(run),
        "verdict": run.verdict,
        "kind": KINDS[Verdict(run.verdict)],
        "finding": _capital(finding(run)) or ("" if run.verdict == "FAULT" else _unfaulty(run)),
        "caption": f"Weights at step {step['step']}" if step and drawings else "No weights were recovered",
        "drawings": drawings,
        "hidden": hidden,
        "facts": _facts(run, step),
        "notes": notes[:NOTES] + ([f"and {len(notes) - NOTES} more"] if len(notes) > NOTES else []),
        "groups": groups[:GROUPS],
        "more_groups": max(0, len(groups) - GROUPS),
        "unseen": [line(text, 300) for text in (header.get("unseen") or [])[:NOTES]],
        "watched": [line(name, 160) for name in (header.get("watched") or [])[:MODULES]],
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unfaulty(run: Run) -> str:
    if run.verdict == "RIGHT":
        return "No fault was found"
    return "No step could be judged" if run.steps else "No step was watched"


def _facts(run: Run, step: Record | None) -> dict[str, str]:
    header = run.header or {}
    facts = {
        "Steps watched": watched(run),
        "Cost": f"{run.seconds:.2f} s",
        "Started": line(header.get("time") or "", 40),
        "Versions": versions(run),
        "Trainable parameters": f"{header['parameters']:,}" if header.get("parameters") else "",
        "Watched every": f"{header['every']} steps" if header.get("every") else "",
    }
    if step is not None:
        facts |= {
            "Gradient read from": line(step["gradient"], 80),
            "Precision": line(step["dtype"], 40),
            "Residual": small(step["residual"]) if step["residual"] is not None else "",
            "Common factor": small(step["scale"]) if step["scale"] is not None else "",
        }
    return {name: value for name, value in facts.items() if value}


def _drawings(run: Run, step: Record | None) -> tuple[list[Any], str]:
    """Return rows of at most ``BARS`` bars, and what is left out. A rank that is longer is split."""
    if step is None:
        return [], ""
    row = bar_row(step)
    parts = [
        (rank, start, values[start : start + BARS])
        for rank, values in enumerate(row["weights"])
        for start in range(0, len(values), BARS)
    ]
    lines: list[list[tuple[int, int, list[Any]]]] = []
    for part in parts:
        if not lines or sum(len(p[2]) for p in lines[-1]) + len(part[2]) > BARS:
            lines.append([])
        lines[-1].append(part)
    drawn = [_drawn(row, group) for group in lines[:ROWS]]
    count = sum(map(len, step["weights"]))
    shown = sum(len(values) for group in lines[:ROWS] for _, _, values in group)
    hidden = f"{count - shown} more micro-batches are not drawn." if count > shown else ""
    return [one for one in drawn if one is not None], hidden


def _drawn(row: dict[str, Any], group: Sequence[tuple[int, int, list[Any]]]) -> Any:
    tokens = [
        row["tokens"][rank][start : start + len(values)] if rank < len(row["tokens"]) else []
        for rank, start, values in group
    ]
    drawing = draw(
        {"verdict": row["verdict"], "weights": [values for _, _, values in group], "tokens": tokens}
    )
    if drawing is None or len(row["weights"]) == 1:
        return drawing
    names = [f"rank {rank}" + (f" from {start + 1}" if start else "") for rank, start, _ in group]
    places = [x for x, _ in drawing.ranks] or [LABEL]
    drawing.ranks = list(zip(places, names, strict=True))
    return drawing


def _groups(run: Run) -> list[dict[str, Any]]:
    """Return the watched steps, joined if the same was found in them, in the order of their first step."""
    found: dict[tuple[str, str], list[Record]] = {}
    for one in run.steps:
        found.setdefault((one["verdict"], one["fault"]), []).append(one)
    rows = []
    for (verdict, fault), steps in found.items():
        numbers = [one["step"] for one in steps]
        residuals = [one["residual"] for one in steps if one["residual"] is not None]
        rows.append({
            "range": str(numbers[0]) if len(steps) == 1 else f"{numbers[0]} … {numbers[-1]}",
            "count": len(steps),
            "verdict": verdict,
            "kind": KINDS[Verdict(verdict)],
            "found": line(fault, 400),
            "residual": small(max(residuals)) if residuals else "",
            "seconds": f"{sum(one['seconds'] or 0.0 for one in steps):.3g}",
        })  # fmt: skip
    return rows
