"""Tables of findings and of answers about past runs, for terminals with 80 or more columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from truestep.audit.measure.findings import Verdict
from truestep.audit.postmortem.answers import Answer
from truestep.audit.present import past, words
from truestep.audit.present.words import Row, line, number, small

COLOURS = {Verdict.RIGHT: "green", Verdict.FAULT: "bold red"}
COLOURS |= dict.fromkeys((Verdict.DEFAULT, Verdict.DOCUMENTED_CHOICE), "yellow")
COLOURS |= dict.fromkeys((Verdict.NOT_OBSERVABLE, Verdict.NOT_RUN), "magenta")
BLOCKS = "▁▂▃▄▅▆▇█"
CELL, LABEL = 7, 8  # columns
CLOSE = 0.02  # a weight this close to 1 counts as correct


def findings_table(rows: Sequence[Row], width: int = 80) -> RenderableType:
    """Return a table with one row per finding and its weights, and the number of findings per verdict."""
    if not rows:
        return Text("nothing was audited")
    table = Table(box=box.HORIZONTALS, show_lines=True, width=width, padding=0)
    table.add_column(_columns([Text(t) for t in ("Subject", "Configuration", "Verdict")]))
    absent = [r for r in rows if r["verdict"] == Verdict.NOT_RUN and not r["configuration"]]
    for row in rows:
        if row not in absent:
            table.add_row(_row(row, width - 4))
    for row in absent:  # one line each: it is only known that they are not installed
        table.add_row(Text(f"{line(row['subject'], 60)}: NOT RUN, {line(row['reason'], 120)}", "dim"))
    counts = Counter(r["verdict"] for r in rows)
    total = Text(f"{len(rows)} finding{'s' if len(rows) > 1 else ''}: ")
    parts = [Text(f"{counts[v]} {v}", COLOURS[v]) for v in Verdict if counts[v]]
    return Group(table, total + Text(", ").join(parts))


def _columns(cells: Sequence[RenderableType]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(ratio=5)
    grid.add_column(ratio=7)
    grid.add_column(width=17)  # DOCUMENTED CHOICE
    grid.add_row(*cells)
    return grid


def _row(row: Row, width: int) -> RenderableType:
    verdict = Verdict(row["verdict"])
    subject = Text(line(row["subject"], 120), "bold", overflow="fold")
    configuration = Text(words.configuration_in_words(row["configuration"]), overflow="fold")
    found = (words.found_in_words(row), "" if verdict is Verdict.RIGHT else COLOURS[verdict])
    texts = [(words.versions_in_words(row), "dim"), found]
    below = [Text(text, style, overflow="fold") for text, style in texts if text] + bars(row, width - 2)
    if verdict in (Verdict.FAULT, Verdict.DEFAULT, Verdict.DOCUMENTED_CHOICE):
        below += [Text(text, "dim") for text in _details(row)]
    head = _columns([subject, configuration, Text(verdict, COLOURS[verdict])])
    return Group(head, Padding(Group(*below), (0, 0, 0, 2)))


def _details(row: Row) -> list[str]:
    texts = []
    if row.get("relative_error") is not None:
        names = {"relative_error": "relative error", "residual": "residual", "noise": "measured noise"}
        sizes = [f"{name} {small(row[key])}" for key, name in names.items() if row.get(key) is not None]
        texts = [" · ".join(sizes), words.loss_in_words(row)]
    cases: dict[str, str] = row.get("cases") or {}
    good = [line(name, 60) for name, text in cases.items() if not text]
    others = {name: text for name, text in cases.items() if text and text != row.get("fault")}
    texts += [f"case {line(name, 60)}: {line(text)}" for name, text in others.items()]
    if good and len(cases) > 1:
        texts.append(f"right in: {', '.join(good)}")
    return texts + [f"{key}: {line(row[key])}" for key in ("remedy", "reproducer") if row.get(key)]


def bar(weight: Any) -> str:
    """Return a weight as a bar. Three full blocks mean 1, and an arrow marks a weight that does not fit."""
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        return " ? "
    if abs(weight) < CLOSE:
        return " · "
    if weight < 0:
        return " ▼ "
    if weight > 1 + CLOSE:
        return "███▲"
    return 3 * BLOCKS[min(7, max(0, math.ceil(weight * 8 - CLOSE) - 1))]


def bars(row: Row, width: int) -> list[Text]:
    """Return lines with each micro-batch's bar, weight and, if the verdict is not RIGHT, trained tokens."""
    weights, tokens = words.by_rank(row, "weights"), words.by_rank(row, "tokens")
    if not any(weights):
        return []
    verdict = Verdict(row["verdict"])
    per_line = max(1, (width - LABEL) // CELL)
    lines: list[Text] = []
    for group in _groups(weights, per_line):
        cells = [(rank, index) for rank, start, stop in group for index in range(start, stop)]
        if len(weights) > 1:
            heads = [f"rank {rank}".ljust(CELL * (stop - start)) for rank, start, stop in group]
            lines.append(Text(" " * LABEL + "".join(heads).rstrip(), "dim"))
        drawn, numbers = Text(" " * LABEL), Text("weight".ljust(LABEL))
        counts = Text("tokens".ljust(LABEL), "dim")
        for rank, index in cells:
            weight = weights[rank][index]
            good = verdict is Verdict.RIGHT or (isinstance(weight, int | float) and abs(weight - 1) <= CLOSE)
            drawn.append(bar(weight).ljust(CELL), COLOURS[Verdict.RIGHT if good else verdict])
            numbers.append(number(weight).ljust(CELL))
            has = rank < len(tokens) and index < len(tokens[rank])
            counts.append((number(tokens[rank][index]) if has else "").ljust(CELL))
        lines += [drawn, numbers]
        if verdict is not Verdict.RIGHT and any(tokens):
            lines.append(counts)
    for text in lines:
        text.rstrip()
    return lines


def _groups(weights: Sequence[Sequence[Any]], per_line: int) -> list[list[tuple[int, int, int]]]:
    """Return the ranges (rank, start, stop) of each line. Only a rank that is longer than a line is split."""
    lines: list[list[tuple[int, int, int]]] = []
    free = 0
    for rank, values in enumerate(weights):
        for start in range(0, len(values), per_line):
            stop = min(start + per_line, len(values))
            if not lines or stop - start > free:
                lines.append([])
                free = per_line
            lines[-1].append((rank, start, stop))
            free -= stop - start
    return lines


ANSWER_COLOURS = {"affected": "bold red", "affected if": "red", "unknown": "yellow", "not affected": "green"}


def answers_table(answers: Sequence[Answer], width: int = 80) -> RenderableType:
    """Return a table that says for each measured fault whether it affects a run or a stack, and why. The worst
    answers come first; packages that no file names are in the last row."""
    table = Table(box=box.HORIZONTALS, show_lines=True, width=width, padding=(0, 2, 0, 0))
    table.add_column("Answer", width=12)
    table.add_column("Measured fault, and reasons for the answer")
    order = list(ANSWER_COLOURS)
    for answer in sorted(answers, key=lambda a: order.index(a.answer)):
        if not past.is_absent(answer):
            row = past.answer_row(answer)
            fixes = row["fixes"] if answer.answer.startswith("affected") else ()
            told = [*row["reasons"], *(f"fix: {fix}" for fix in fixes)]
            reasons = [Text(f"· {text}", "dim", overflow="fold") for text in told]
            verdict = Text(answer.answer, ANSWER_COLOURS[answer.answer])
            table.add_row(verdict, Group(Text(row["finding"], "bold"), *reasons))
    if absent := dict.fromkeys(a.measured.package for a in answers if past.is_absent(a)):
        text = f"no file pins the version of {', '.join(absent)}"
        table.add_row(Text("unknown", ANSWER_COLOURS["unknown"]), Text(text, "dim"))
    return table
