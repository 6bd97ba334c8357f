"""The findings as one self-contained HTML page without scripts.

All text is untrusted: ``words.line`` shows invisible characters, the environment escapes it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from truestep import pages
from truestep.audit.measure.findings import Verdict
from truestep.audit.present import words
from truestep.audit.present.table import CLOSE
from truestep.audit.present.words import Row, line, number, small

UNIT, HIGHEST, LOWEST = 44, 2.0, -0.5  # pixels of weight 1; what is beyond is cut off, and marked
STEP, WIDTH, GAP, HEAD = (
    46,
    26,
    26,
    32,
)  # pixels: a bar with its space, the bar, between ranks, above the bars
KINDS = {
    Verdict.RIGHT: "right",
    Verdict.FAULT: "fault",
    Verdict.DEFAULT: "choice",
    Verdict.DOCUMENTED_CHOICE: "choice",
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One micro-batch. Units: pixels from the left and the top."""

    x: float
    y: float
    height: float
    label: str
    label_y: float
    tokens: str
    good: bool
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The weights of one finding."""

    bars: tuple[Bar, ...]
    ranks: tuple[tuple[float, str], ...]  # where each rank begins, if there are several
    width: float
    height: float
    zero: float  # where the base line is
    one: float  # where weight 1 is
    spoken: str


def render_page(rows: Sequence[Row], provenance: Row) -> str:
    """The whole page as text."""
    counts = Counter(row["verdict"] for row in rows)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=pages.loader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("audit.html.j2").render(
        outcome=_outcome(rows),
        counts=[(counts[v], v.value, _kind(v)) for v in Verdict if counts[v]],
        rows=[_entry(row) for row in rows],
        provenance={line(k, 80): line(v, 2000) for k, v in _flat(provenance).items()},
    )


def _kind(verdict: str) -> str:
    return KINDS.get(Verdict(verdict), "unanswered")


def _outcome(rows: Sequence[Row]) -> str:
    faulty = [row for row in rows if row["verdict"] == Verdict.FAULT]
    if not rows:
        return "Nothing was audited."
    if not faulty:
        right = sum(words.is_right(row) for row in rows)
        return f"No fault was found; in {right} of {len(rows)} configurations the step is exactly the configured one."
    silent = sum(row.get("logged_loss_could_show_it") is False for row in faulty)
    hidden = f" In {silent} of them the logged loss is right and does not show it." if silent else ""
    return f"In {len(faulty)} of {len(rows)} configurations the update is not the configured one.{hidden}"


def _entry(row: Row) -> dict[str, Any]:
    """What the template shows of one finding."""
    cases: Mapping[str, str] = row.get("cases") or {}
    facts = {
        "Relative error": row.get("relative_error"),
        "Residual": row.get("residual"),
        "Noise of a right step": row.get("noise"),
        "Condition": row.get("condition"),
    }
    return {
        "subject": line(row["subject"], 160),
        "versions": words.versions_in_words(row),
        "configuration": words.configuration_in_words(row["configuration"]),
        "verdict": row["verdict"],
        "kind": _kind(row["verdict"]),
        "found": words.found_in_words(row),
        "drawing": draw(row),
        "facts": {name: small(value) for name, value in facts.items() if value is not None},
        "loss": "" if words.is_right(row) or row.get("relative_error") is None else words.loss_in_words(row),
        "cases": {line(name, 80): line(text, 600) or "right" for name, text in cases.items()},
        "remedy": line(row.get("remedy") or "", 600),
        "reproducer": line(row.get("reproducer") or "", 600),
    }


def draw(row: Row) -> Drawing | None:
    """Where each bar goes; None where no weights were recovered."""
    weights, tokens = words.by_rank(row, "weights"), words.by_rank(row, "tokens")
    flat = [w for rank in weights for w in rank if isinstance(w, int | float) and math.isfinite(w)]
    if not flat:
        return None
    top = HEAD + UNIT * min(HIGHEST, max([1.0, *flat]))
    bars: list[Bar] = []
    starts: list[tuple[float, str]] = []
    x = 34.0  # room for the label of weight 1
    for rank, values in enumerate(weights):
        starts.append((x, f"rank {rank}"))
        for index, weight in enumerate(values):
            count = tokens[rank][index] if rank < len(tokens) and index < len(tokens[rank]) else None
            bars.append(_bar(weight, count, x, top, words.is_right(row)))
            x += STEP
        x += GAP
    spoken = "; ".join(f"rank {r}: {', '.join(map(number, values))}" for r, values in enumerate(weights))
    depth = UNIT * min(0.0, max(LOWEST, min(flat)))
    return Drawing(
        bars=tuple(bars),
        ranks=tuple(starts) if len(weights) > 1 else (),
        width=x - GAP + 6,
        height=top - depth + 24,
        zero=top,
        one=top - UNIT,
        spoken=f"Weights per micro-batch, 1 is right: {spoken}",
    )


def _bar(weight: Any, count: Any, x: float, zero: float, right: bool) -> Bar:
    known = isinstance(weight, int | float) and math.isfinite(weight)
    shown = min(HIGHEST, max(LOWEST, weight)) if known else 0.0
    length = abs(shown) * UNIT
    upper = zero - max(0.0, shown) * UNIT
    return Bar(
        x=x,
        y=round(upper, 1),
        height=round(max(1.5, length), 1),
        label=number(weight),
        label_y=round(upper - 5, 1),
        tokens="" if count is None else number(count),
        good=right or (known and abs(weight - 1) <= CLOSE),
        cut=known and shown != weight,
    )


def _flat(value: Row, prefix: str = "") -> dict[str, Any]:
    """Nested provenance as one list of name and text."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            flat |= _flat(entry, f"{prefix}{key} · ")
        else:
            flat[f"{prefix}{key}"] = " ".join(map(str, entry)) if isinstance(entry, list | tuple) else entry
    return flat
