"""Renders findings as one self-contained HTML page without scripts.

All text is untrusted, so ``words.line`` makes invisible characters visible and Jinja escapes markup.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2

from truestep import pages
from truestep.audit.measure.findings import Verdict
from truestep.audit.present import words
from truestep.audit.present.table import CLOSE
from truestep.audit.present.words import Row, line, number, small

UNIT, HIGHEST, LOWEST = 44, 2.0, -0.5  # pixels of weight 1; longer bars are cut off and marked
STEP, GAP, HEAD = 46, 26, 32  # pixels: a bar with its space, the gap between ranks, the room above bars
KINDS = dict.fromkeys(Verdict, "unanswered") | {Verdict.RIGHT: "right", Verdict.FAULT: "fault"}
KINDS |= dict.fromkeys((Verdict.DEFAULT, Verdict.DOCUMENTED_CHOICE), "choice")


def render_page(rows: Sequence[Row], provenance: Row) -> str:
    """Return the whole page as text."""
    counts = Counter(row["verdict"] for row in rows)
    how: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = pages.loader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(autoescape=True, loader=loader, **how)
    return environment.get_template("audit.html.j2").render(
        outcome=_outcome(rows),
        counts=[(counts[v], v.value, KINDS[v]) for v in Verdict if counts[v]],
        rows=[_entry(row) for row in rows],
        provenance={line(k, 80): line(v, 2000) for k, v in _flat(provenance).items()},
    )


def _outcome(rows: Sequence[Row]) -> str:
    faulty = [row for row in rows if row["verdict"] == Verdict.FAULT]
    if not rows:
        return "Nothing was audited."
    if not faulty:
        right = sum(words.is_right(row) for row in rows)
        return f"No fault was found; in {right} of {len(rows)} configurations the step is exactly the configured one."
    silent = sum(row.get("logged_loss_could_show_it") is False for row in faulty)
    hidden = f" In {silent} of them the logged loss is correct and does not show the fault." if silent else ""
    return f"In {len(faulty)} of {len(rows)} configurations the update is not the configured one.{hidden}"


def _entry(row: Row) -> dict[str, Any]:
    """Return what the template shows about one finding."""
    cases: Mapping[str, str] = row.get("cases") or {}
    facts = {"relative_error": "Relative error", "residual": "Residual", "noise": "Measured noise"}
    facts |= {"condition": "Condition number"}
    return {
        "subject": line(row["subject"], 160),
        "versions": words.versions_in_words(row),
        "configuration": words.configuration_in_words(row["configuration"]),
        "verdict": row["verdict"],
        "kind": KINDS[row["verdict"]],
        "found": words.found_in_words(row),
        "drawing": draw(row),
        "facts": {name: small(row[k]) for k, name in facts.items() if row.get(k) is not None},
        "loss": "" if words.is_right(row) or row.get("relative_error") is None else words.loss_in_words(row),
        "cases": {line(name, 80): line(text, 600) or "right" for name, text in cases.items()},
        "remedy": line(row.get("remedy") or "", 600),
        "reproducer": line(row.get("reproducer") or "", 600),
    }


def draw(row: Row) -> SimpleNamespace | None:
    """Return the positions of the bars, of the rank labels and of the lines for weights 0 and 1, in pixels
    from the left and the top. Return None if no weights were recovered."""
    weights, tokens = words.by_rank(row, "weights"), words.by_rank(row, "tokens")
    flat = [w for rank in weights for w in rank if isinstance(w, int | float) and math.isfinite(w)]
    if not flat:
        return None
    top = HEAD + UNIT * min(HIGHEST, max([1.0, *flat]))
    bars, starts = [], []
    x = 34.0  # room for the label of weight 1
    for rank, values in enumerate(weights):
        starts.append((x, f"rank {rank}"))
        for index, weight in enumerate(values):
            count = tokens[rank][index] if rank < len(tokens) and index < len(tokens[rank]) else None
            bars.append(_bar(weight, count, x, top, words.is_right(row)))
            x += STEP
        x += GAP
    spoken = "; ".join(f"rank {r}: {', '.join(map(number, values))}" for r, values in enumerate(weights))
    spoken = f"Weights per micro-batch (1 is correct): {spoken}"
    size = {"width": x - GAP + 6, "height": top - UNIT * min(0.0, max(LOWEST, min(flat))) + 24}
    ranks = starts if len(weights) > 1 else []
    return SimpleNamespace(bars=bars, ranks=ranks, zero=top, one=top - UNIT, spoken=spoken, **size)


def _bar(weight: Any, count: Any, x: float, zero: float, right: bool) -> SimpleNamespace:
    known = isinstance(weight, int | float) and math.isfinite(weight)
    shown = min(HIGHEST, max(LOWEST, weight)) if known else 0.0
    upper, height = zero - max(0.0, shown) * UNIT, round(max(1.5, abs(shown) * UNIT), 1)
    label, tokens = number(weight), "" if count is None else number(count)
    good, cut = right or (known and abs(weight - 1) <= CLOSE), known and shown != weight
    place = {"x": x, "y": round(upper, 1), "height": height, "label_y": round(upper - 5, 1)}
    return SimpleNamespace(label=label, tokens=tokens, good=good, cut=cut, **place)


def _flat(value: Row, prefix: str = "") -> dict[str, Any]:
    """Return nested provenance as one flat mapping from name to text."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            flat |= _flat(entry, f"{prefix}{key} · ")
        else:
            flat[f"{prefix}{key}"] = " ".join(map(str, entry)) if isinstance(entry, list | tuple) else entry
    return flat
