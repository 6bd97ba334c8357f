"""The runs of a log as a table for terminals, and as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from truestep.audit.present.table import COLOURS, bars
from truestep.audit.present.words import line
from truestep.guard.runs import SCHEMA, Record, Run

MOST_NOTES = 6  # of a run that are printed
MOST_RANKS = 4  # whose weights are printed
MOST_WEIGHTS = 64  # micro-batches of a rank that are shown


def runs_table(runs: Sequence[Run], width: int = 80) -> RenderableType:
    """Return a table with one row per run: its verdict, the first finding and its weights, notes and cost."""
    table = Table(box=box.HORIZONTALS, show_lines=True, width=width, padding=0)
    table.add_column(_columns("Run", "Steps watched", "Verdict", "Cost"))
    for number, run in enumerate(runs, start=1):
        table.add_row(_row(number, run, width - 4))
    return table


def _columns(*cells: str, style: str = "") -> Table:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for ratio in (7, 5, 4, 2):
        grid.add_column(ratio=ratio)
    first, watched, verdict, cost = cells
    grid.add_row(Text(first, "bold" if style else ""), Text(watched), Text(verdict, style), Text(cost))
    return grid


def _row(number: int, run: Run, width: int) -> RenderableType:
    style = COLOURS[run.verdict]  # type: ignore[index]
    head = _columns(
        f"{number}  {name_of(run)}", watched(run), run.verdict, f"{run.seconds:.2f} s", style=style
    )
    below = [Text(text, "dim", overflow="fold") for text in (versions(run),) if text]
    if (found := finding(run)) != "":
        below.append(Text(found, style, overflow="fold"))
    if (step := step_shown(run)) is not None and run.first_fault is not None:
        row = bar_row(step)
        below += bars({**row, "weights": row["weights"][:MOST_RANKS]}, width - 2)
        if (more := len(step["weights"]) - MOST_RANKS) > 0:
            below.append(Text(f"and {more} more ranks (--html shows them)", "dim"))
    notes = note_texts(run)
    below += [Text(f"· {text}", "dim", overflow="fold") for text in notes[:MOST_NOTES]]
    if len(notes) > MOST_NOTES:
        below.append(Text(f"· and {len(notes) - MOST_NOTES} more notes", "dim"))
    return Group(head, Padding(Group(*below), (0, 0, 0, 3)))


def name_of(run: Run) -> str:
    """Return the model's class, or what stands for it if the log has no header."""
    return line((run.header or {}).get("model") or "unknown model", 80)


def versions(run: Run) -> str:
    header = run.header or {}
    named = {
        **(header.get("packages") or {}),
        **{k: header[k] for k in ("truestep", "torch") if header.get(k)},
    }
    parts = [f"{line(k, 40)} {line(v, 40)}" for k, v in list(named.items())[:8]]
    if ranks := header.get("ranks"):
        parts.append("1 rank" if ranks == 1 else f"{ranks} ranks")
    return ", ".join(parts)


def watched(run: Run) -> str:
    """Return the number of watched steps, and of all steps if the guard saw them all."""
    return f"{len(run.steps)} of {run.end['steps']}" if run.end and not run.off else str(len(run.steps))


def finding(run: Run) -> str:
    """Return the first finding with its step and the number of faulty steps; "" if there is none."""
    if (first := run.first_fault) is None:
        return ""
    faulty = sum(one["verdict"] == "FAULT" for one in run.steps)
    also = f" ({faulty} of {len(run.steps)} watched steps are faulty)" if len(run.steps) > 1 else ""
    return f"step {first['step']}: {line(first['fault'] or 'a fault', 600)}{also}"


def note_texts(run: Run) -> list[str]:
    """Return how the run ended, what was noted at its steps, and whether its last line is cut."""
    texts = [line(run.state(), 400)] if run.state() else []
    if run.cut:
        texts.append(f"line {run.cut} of the log is unfinished, as after a kill, and was left out")
    for text, first, count in run.notes():
        where = f"step {first}" if count == 1 else f"{count} steps, first step {first}"
        texts.append(f"{line(text, 300)} ({where})")
    return texts


def step_shown(run: Run) -> Record | None:
    """Return the first faulty step, or else the first step."""
    return run.first_fault or next(iter(run.steps), None)


def bar_row(step: Record) -> dict[str, Any]:
    """Return a step as a row for the bars of the audit."""
    return {"verdict": step["verdict"], "weights": _cut(step["weights"]), "tokens": _cut(step["tokens"])}


def _cut(ranks: list[list[Any]]) -> list[list[Any]]:
    return [rank[:MOST_WEIGHTS] for rank in ranks[:MOST_WEIGHTS]]


def to_document(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the runs as one JSON document. Its texts are those of the log, unchanged.

    Units: ``seconds`` is the sum of what the guard took at the watched steps of the first rank."""
    found = [
        {
            "run": number,
            "verdict": run.verdict,
            "header": run.header,
            "steps": run.end["steps"] if run.end and not run.off else None,
            "steps_watched": len(run.steps),
            "faulty_steps": sum(one["verdict"] == "FAULT" for one in run.steps),
            "first_fault": run.first_fault,
            "notes": [{"text": text, "first_step": first, "steps": n} for text, first, n in run.notes()],
            "off": run.off["why"] if run.off else None,
            "finished": bool(run.end and run.end["finished"]),
            "cut_line": run.cut or None,
            "seconds": round(run.seconds, 6),
        }
        for number, run in enumerate(runs, start=1)
    ]
    verdicts = {run.verdict for run in runs}
    worst = next((v for v in ("FAULT", "NOT OBSERVABLE") if v in verdicts), "RIGHT")
    return {"schema": SCHEMA, "verdict": worst, "runs": found}
