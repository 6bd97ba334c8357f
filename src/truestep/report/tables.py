"""The numbers of a run as rows, and how they are written: once for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError
from truestep.pages import visible
from truestep.rundir import read_json

if TYPE_CHECKING:
    from rich.table import Table

NONE = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# ------------------------------------------------------------------------------------ text and numbers


def clip(text: str, limit: int = 1600) -> str:
    """Head and tail of a long text, and how much was left out between them."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[-tail:]}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """E.g. 71.4 % [68.0, 74.6]."""
    if value is None or low is None or high is None:
        return percent(value)
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def whole(value: float | None) -> str:
    return NONE if value is None else f"{round(value):,}"


def scientific(value: float | None) -> str:
    """E.g. 3.20 × 10¹⁵."""
    if value is None or value == 0:
        return NONE if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{superscript(int(exponent))}"


def superscript(number: int) -> str:
    return str(number).translate(_SUPERSCRIPT)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# ---------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """The score of one checkpoint on one data set, as the run recorded it (None where it did not)."""

    checkpoint: str
    data: str
    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    correct: int | None = None
    incorrect: int | None = None
    unscored: int | None = None
    score_if_unscored_correct: float | None = None
    truncated_rate: float | None = None
    extracted_rate: float | None = None
    mean_tokens: float | None = None
    pass_at: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json, or {} where the run has not written one. Raises UserError where it is not a JSON
    object."""
    return read_object(run / "summary.json")


def read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; restore the file or run the stage again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}; run the stage again")
    return value


def score_table(run: Path) -> list[ScoreRow]:
    """The scores in the summary's order; of a run that has no summary yet, those of its results files."""
    found = list(read_summary(run).get("scores") or [])
    if not found:
        paths = sorted(run.glob("evaluations/*/*.results.json"), key=lambda p: (p.parent.name != "base", p))
        found = [
            {
                **read_object(p).get("estimate", {}),
                "checkpoint": p.parent.name,
                "data": p.name.removesuffix(".results.json"),
            }
            for p in paths
        ]
    known = ScoreRow.__dataclass_fields__
    return [ScoreRow(**{key: value for key, value in row.items() if key in known}) for row in found]


def outcome(summary: Mapping[str, Any], rows: Sequence[ScoreRow]) -> str:
    """What came out, in one sentence of plain words."""
    lead = {"interrupted": "This run was interrupted. ", "running": "This run is still going. "}.get(
        str(summary.get("status")), ""
    )
    if not rows:
        return lead + "No checkpoint of it has been evaluated."
    first = rows[0]
    last = [row for row in rows if row.data == first.data][-1]
    others = len({row.data for row in rows}) - 1
    more = f" The table has {others} more data set{'s' if others > 1 else ''}." if others else ""
    score = with_interval(last.score, last.low, last.high)
    if first is last:
        return f"{lead}On {last.data}, {last.checkpoint} answers {score} of {whole(last.n)} samples correctly.{more}"
    start = with_interval(first.score, first.low, first.high)
    change = f"After {last.checkpoint}, {score} of {first.data} is answered correctly; {first.checkpoint} had {start}."
    return lead + change + more


# ------------------------------------------------------------------------------------ columns, writers

Column = tuple[str, Callable[[ScoreRow], str]]


_NAMES: tuple[Column, ...] = (("Checkpoint", lambda r: r.checkpoint), ("Data", lambda r: r.data))


def pass_columns(rows: Sequence[ScoreRow]) -> list[Column]:
    """Names and pass@k for every k > 1 (pass@1 is the score); [] where there is none."""
    ks = sorted({k for row in rows for k in row.pass_at if k != "1"}, key=int)
    return [*_NAMES, *((f"pass@{k}", _pass_cell(k)) for k in ks)] if ks else []


def score_columns(rows: Sequence[ScoreRow]) -> list[Column]:
    """Heading and cell of each column: what the terminal, Markdown and HTML all show."""
    columns = [*_NAMES, ("Score [95 % interval]", lambda r: with_interval(r.score, r.low, r.high))]
    if any(row.unscored for row in rows):
        columns.append(("If unscored were right", lambda r: percent(r.score_if_unscored_correct)))
    columns += [
        ("Samples", lambda r: whole(r.n)),
        ("Correct", lambda r: whole(r.correct)),
        ("Incorrect", lambda r: whole(r.incorrect)),
        ("Unscored", lambda r: whole(r.unscored)),
        ("Truncated", lambda r: percent(r.truncated_rate)),
        ("Answer found", lambda r: percent(r.extracted_rate)),
        ("Mean tokens", lambda r: whole(r.mean_tokens)),
    ]
    return columns


def _pass_cell(k: str) -> Callable[[ScoreRow], str]:
    def cell(row: ScoreRow) -> str:
        found = row.pass_at.get(k, {})
        return with_interval(found.get("value"), found.get("low"), found.get("high"))

    return cell


def cells_of(rows: Sequence[ScoreRow], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of each row as visible text."""
    return [heading for heading, _ in columns], [[visible(cell(row)) for _, cell in columns] for row in rows]


def _all_columns(rows: Sequence[ScoreRow]) -> list[Column]:
    columns = score_columns(rows)
    return [*columns[:3], *pass_columns(rows)[2:], *columns[3:]]


def terminal_table(rows: Sequence[ScoreRow], title: str = "") -> Table:
    """The scores for a terminal of 80 columns (the page has the rest). Cells are plain text: nothing in them
    is markup or moves the cursor."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None)
    counts: Column = (
        "Right/wrong/unscored",
        lambda r: f"{whole(r.correct)}/{whole(r.incorrect)}/{whole(r.unscored)}",
    )
    columns = [
        *score_columns(rows)[:3],
        *pass_columns(rows)[2:],
        counts,
        ("Cut off", lambda r: percent(r.truncated_rate)),
    ]
    headings, cells = cells_of(rows, columns)
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if number < 2 else "right", no_wrap=number == 2)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown_table(rows: Sequence[ScoreRow]) -> str:
    """The scores as a Markdown table; what Markdown or HTML would read as markup is escaped."""
    headings, cells = cells_of(rows, _all_columns(rows))
    lines = [headings, ["---"] * 2 + ["---:"] * (len(headings) - 2)]
    lines += [[_markdown(cell) for cell in row[:2]] + row[2:] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(text: str) -> str:
    escaped = "".join(f"\\{c}" if c in "\\`*_[]()!|~#" else c for c in text)
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
