"""The numbers of a run as rows of text, written the same way for the terminal, Markdown and HTML."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError, count
from truestep.evaluate.files import read_score_row
from truestep.pages import visible
from truestep.rundir import read_json

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

NONE = "–"
Interval = Mapping[str, float]  # value, low, high
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def clip(text: str, limit: int = 1600) -> str:
    """Return the beginning and end of a long text, with the number of characters left out between them."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    tail = limit - head
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[-tail:]}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return text such as 71.4 % [68.0, 74.6]."""
    if value is None or low is None or high is None:
        return percent(value)
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def whole(value: float | None) -> str:
    return NONE if value is None else f"{round(value):,}"


def gib(value: float | None) -> str:
    return NONE if value is None else f"{value / 2**30:.1f} GiB"


def scientific(value: float | None) -> str:
    """Return text such as 3.20 × 10¹⁵."""
    if value is None or value == 0:
        return NONE if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{superscript(int(exponent))}"


def p_value(value: float | None) -> str:
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


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


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A score of a run's checkpoint or of a ``truestep eval`` prompt. Values not in the summary are None."""

    checkpoint: str = ""
    prompt: str = ""
    data: str
    score: float | None = None
    low: float | None = None
    high: float | None = None
    strict_score: float | None = None
    lenient_score: float | None = None
    num_problems: int | None = None
    n: int | None = None
    correct: int | None = None
    incorrect: int | None = None
    unscored: int | None = None
    score_if_unscored_correct: float | None = None
    truncated_rate: float | None = None
    extracted_rate: float | None = None
    unreadable_rate: float | None = None
    mean_tokens: float | None = None
    pass_at: Mapping[str, Interval] = field(default_factory=dict)
    majority_at: Mapping[str, Interval] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # why the checkpoint's stage was worthless at its end
    recovered: tuple[str, ...] = ()  # what it was warned about before
    whole: bool = True
    private: bool = False
    published: Mapping[str, float] = field(default_factory=dict)
    rewards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by scorer

    @property
    def samples(self) -> str:
        """The path of the samples, relative to the run."""
        return f"evaluations/{self.checkpoint or self.prompt}/{self.data}.samples.jsonl"

    @property
    def title(self) -> str:
        return f"{self.data} · {self.checkpoint or self.prompt}"


def read_summary(run: Path) -> dict[str, Any]:
    """Return summary.json, or {} if there is none. Raises UserError if it is not a JSON object."""
    return read_object(run / "summary.json")


def read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); restore the file or run the stage again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}; run the stage again")
    return value


def score_table(run: Path) -> list[ScoreRow]:
    """Return the scores in the summary's order or, without a summary, the scores in the results files."""
    summary = read_summary(run)
    found = [read_score_row(row) for row in summary.get("scores") or []]
    if not found:
        paths = sorted(run.glob("evaluations/*/*.results.json"), key=lambda p: (p.parent.name != "base", p))
        for path in paths:
            place = {"checkpoint": path.parent.name, "data": path.name.removesuffix(".results.json")}
            found.append({**read_object(path).get("estimate", {}), **place})
    known = ScoreRow.__dataclass_fields__
    told, past = defaultdict[str, tuple[str, ...]](tuple), defaultdict[str, tuple[str, ...]](tuple)
    for warning in summary.get("warnings") or []:
        text = str(warning["text"])
        if "until" in warning:
            past[warning["stage"]] += (f"until step {warning['until']}: {text}",)
        else:
            told[warning["stage"]] += (text,)
    rows = [{key: value for key, value in row.items() if key in known} for row in found]
    return [
        ScoreRow(**row, warnings=told[name], recovered=past[name])
        for row in rows
        for name in [row.get("checkpoint", "")]
    ]


def outcome(summary: Mapping[str, Any], rows: Sequence[ScoreRow]) -> str:
    """Return the outcome of a run, in one plain sentence that compares each checkpoint with the one before."""
    known = {
        "interrupted": "This run was interrupted. ", "running": "This run is still in progress. ",
        "killed": "This run was killed before its end. ", "failed": f"This run failed: {summary.get('error')}. ",
    }  # fmt: skip
    lead = known.get(str(summary.get("status")), "")
    if not rows:
        return lead + "None of the run's checkpoints has been evaluated."
    data = rows[0].data
    own = [row for row in rows if row.data == data]
    changes = {str(c["to"]): c for c in summary.get("comparisons") or [] if c.get("data") == data}
    said = [f"On {data}, {own[0].checkpoint} scored {with_interval(own[0].score, own[0].low, own[0].high)}"]
    if len(own) == 1:
        said[0] += f" ({whole(own[0].n)} samples)"
    for row in own[1:]:
        score = f"{row.checkpoint} {with_interval(row.score, row.low, row.high)}"
        said.append(score + _change(changes.get(row.checkpoint)))
    others = len({row.data for row in rows}) - 1
    more = f" The table has {others} more data set{'s' if others > 1 else ''}." if others else ""
    return f"{lead}{'; '.join(said)}.{more}"


def _change(found: Mapping[str, Any] | None) -> str:
    """Say how a checkpoint compares with the one before it, on the same problems."""
    if found is None or "difference" not in found:
        return ""
    points = [100 * float(found[key]) for key in ("difference", "low", "high")]
    verdict = "better" if points[1] > 0 else "WORSE" if points[2] < 0 else "no clear change"
    return f", {verdict} ({points[0]:+.1f} points [{points[1]:+.1f}, {points[2]:+.1f}])"


Column = tuple[str, Callable[[ScoreRow], str]]
# What a terminal with 80 columns has room for; the page has the rest.
_TERMINAL = {
    "checkpoint": ("Score [95 % interval]", "pass@k", "Right/wrong/unscored", "Cut off"),
    "prompt": ("Score [95 % interval]", "Strict", "Problems × samples", "Cut off", "Answer found"),
}
_PUBLISHED = "The paper's SFT→RL"
_NAME = 16  # columns in which a name is still easy to read when it is folded
_WIDE = 95  # columns of a terminal that has room for the paper's figure as well


def _names(rows: Sequence[ScoreRow]) -> list[Column]:
    if any(row.prompt for row in rows):
        part = lambda r: r.data + ("" if r.whole else " (part)")  # noqa: E731
        return [("Benchmark", part), ("Prompt", lambda r: r.prompt)]
    return [("Checkpoint", lambda r: r.checkpoint + (" !" if r.warnings else "")), ("Data", lambda r: r.data)]


def pass_columns(rows: Sequence[ScoreRow]) -> list[Column]:
    """Return the name columns and a pass@k column for every k > 1 (pass@1 is the score); [] without any."""
    ks = sorted({k for row in rows for k in row.pass_at if k != "1"}, key=int)
    return [*_names(rows), *((f"pass@{k}", _pass_cell(k)) for k in ks)] if ks else []


def _pass_cell(k: str) -> Callable[[ScoreRow], str]:
    return lambda row: interval(row.pass_at.get(k))


def interval(found: Interval | None) -> str:
    return with_interval(found["value"], found["low"], found["high"]) if found else NONE


def score_columns(rows: Sequence[ScoreRow]) -> list[Column]:
    """Return the name and score columns, and every other column with a value in at least one of the rows."""
    columns: list[Column] = [
        ("Strict", lambda r: percent(r.strict_score)), ("Lenient", lambda r: percent(r.lenient_score)),
        ("Majority", _majority),
        ("Unscored as correct", lambda r: percent(r.score_if_unscored_correct) if r.unscored else NONE),
        ("Problems × samples", _sizes), ("Correct", lambda r: whole(r.correct)),
        ("Incorrect", lambda r: whole(r.incorrect)), ("Unscored", lambda r: whole(r.unscored)),
        ("Cut off", lambda r: percent(r.truncated_rate)), ("Answer found", lambda r: percent(r.extracted_rate)),
        ("Unreadable", lambda r: percent(r.unreadable_rate or None)),
        ("Mean tokens", lambda r: whole(r.mean_tokens)), (_PUBLISHED, lambda r: f"{r.published.get('SFT→RL', NONE)}"),
    ]  # fmt: skip
    columns += [(f"Mean {name}", _reward_cell(name)) for name in sorted({n for r in rows for n in r.rewards})]
    score: Column = ("Score [95 % interval]", lambda r: with_interval(r.score, r.low, r.high))
    return [*_names(rows), score, *(c for c in columns if any(c[1](row) != NONE for row in rows))]


def _reward_cell(name: str) -> Callable[[ScoreRow], str]:
    return lambda row: mean_reward(row.rewards.get(name), with_reason=False)  # the page has it in a note


def mean_reward(found: Mapping[str, Any] | None, *, with_reason: bool = True) -> str:
    """Return text such as 0.42 [0.31, 0.53] (1 sample without it; the first: ValueError: …)."""
    if not found:
        return NONE
    ends = "" if found["low"] is None else f" [{found['low']:.3g}, {found['high']:.3g}]"
    value = NONE if found["value"] is None else f"{found['value']:.3g}{ends}"
    if not found["missing"]:
        return value
    reason = found.get("first_missing") if with_reason else ""
    first = f"; the first: {clip(reason, 300)}" if reason else ""
    return f"{value} ({count(found['missing'], 'sample')} without it{first})"


def _sizes(row: ScoreRow) -> str:
    if not row.num_problems or row.n is None:
        return whole(row.n)
    return f"{whole(row.num_problems)} × {whole(row.n / row.num_problems)}"


def _majority(row: ScoreRow) -> str:
    """Return the majority score over all samples of a problem."""
    most = str(max(map(int, row.pass_at), default=0))
    return percent(row.majority_at[most]["value"]) if most in row.majority_at else NONE


def cells_of(rows: Sequence[ScoreRow], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Return the headings, and the cells of each row as visible text."""
    return [heading for heading, _ in columns], [[visible(cell(row)) for _, cell in columns] for row in rows]


def print_scores(rows: Sequence[ScoreRow], title: str = "") -> None:
    """Print the scores on a terminal. Nothing in the cells acts as markup or moves the cursor."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(terminal_table(rows, title, width=console.width))


def terminal_table(rows: Sequence[ScoreRow], title: str = "", *, width: int) -> Table:
    """Return a table that fits into ``width`` columns. Text in brackets starts a new line, so that no interval
    is broken. Columns without room are left out and named below the table."""

    def counted(r: ScoreRow) -> str:
        return f"{whole(r.correct)}/{whole(r.incorrect)}/{whole(r.unscored)}"

    names, passes = _names(rows), pass_columns(rows)[2:]
    kept = _TERMINAL["prompt" if names[1][0] == "Prompt" else "checkpoint"]
    kept += (_PUBLISHED,) if width >= _WIDE else ()
    columns = [*score_columns(rows)[2:], *passes, ("Right/wrong/unscored", counted)]
    shown = [(h, c) for h, c in columns if h in kept or (h.startswith("pass@") and "pass@k" in kept)]
    # The largest k says most, so it goes last.
    spare = [h for h, _ in passes[:-1]] + [h for h in ("Answer found", "Cut off", "Strict") if h in kept]
    spare += [h for h, _ in passes[-1:]]
    left_out: list[str] = []
    while True:
        table = _drawn(rows, [*names, *(c for c in shown if c[0] not in left_out)], title)
        present = [h for h in spare if h in [heading for heading, _ in shown] and h not in left_out]
        if _width(table) <= width or not present:
            break
        left_out.append(present[0])
    notes = [f"no room for: {', '.join(left_out)}"] if left_out else []
    unread = [
        f"{r.prompt or r.checkpoint} {r.data} {percent(r.unreadable_rate)}" for r in rows if r.unreadable_rate
    ]
    notes += [f"unreadable answers (incorrect): {', '.join(unread)}"] if unread else []
    notes += [
        f"mean {name}, {r.title}: {mean_reward(found)}"
        for r in rows for name, found in r.rewards.items() if "/" not in name
    ]  # fmt: skip
    notes += dict.fromkeys(f"! {row.checkpoint}: {text}" for row in rows for text in row.warnings)
    notes += dict.fromkeys(f"{row.checkpoint}, {text}" for row in rows for text in row.recovered)
    if notes:
        table.caption = _text("\n".join(notes))
        table.caption_justify = "left"
    return table


def _drawn(rows: Sequence[ScoreRow], columns: Sequence[Column], title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    headings, cells = cells_of(rows, columns)
    shape: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    table = Table(title=_text(title) if title else None, **shape)
    for number, heading in enumerate(headings):
        is_name = number < 2  # only names may be folded
        where: Any = (
            {"justify": "left", "overflow": "fold"} if is_name else {"justify": "right", "no_wrap": True}
        )
        table.add_column(_text(textwrap.fill(heading, 11)), **where)
    for row in cells:
        table.add_row(*(_text(cell.replace(" [", "\n[").replace(" (", "\n(")) for cell in row))
    return table


def _text(text: str) -> Text:
    from rich.text import Text

    return Text(visible(text))


def _width(table: Table) -> int:
    """Return how many columns the table takes if its names are folded where they are long."""
    from rich.console import Console

    console = Console(width=10_000)
    names = [max(console.measure(cell).maximum for cell in column.cells) for column in table.columns[:2]]
    return console.measure(table).maximum - sum(max(0, size - _NAME) for size in names)
