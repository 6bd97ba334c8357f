"""The grader alone: any file of gold and predicted answers, or any list of them, without a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.grade.score import Grader
from truestep.records import Message, Problem, Score, Verdict
from truestep.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A gold answer, and what was answered: a bare answer or a whole completion."""

    id: str
    gold: str
    pred: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file of JSON lines with the fields gold and pred, and id or the row number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({error}): give a UTF-8 file of JSON lines") from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise SettingsError(f'{path}: is empty: write one {{"gold": "1/2", "pred": "0.5"}} on each line')
    return [_pair(f"{path}: row {number}", number, line) for number, line in rows]


def _pair(where: str, number: int, line: str) -> Pair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: is no JSON ({error}): write one object on a line") from None
    if not isinstance(row, dict):
        raise SettingsError(f'{where}: expected an object: write {{"gold": "1/2", "pred": "0.5"}}')
    for name in ("gold", "pred"):
        if type(row.get(name)) not in (str, int, float):
            found = f"found {row[name]!r:.60}" if name in row else "it is missing"
            raise SettingsError(f'{where}: field {name}: expected a text or a number, {found}: write "{name}": "1/2"')
    return Pair(id=str(row.get("id", number)), gold=str(row["gold"]), pred=str(row["pred"]))


def grade_pairs(pairs: Sequence[Pair], *, workers: int = 2, seconds: float = 1.5) -> dict[str, Any]:
    """``samples``, one for each pair in order, and ``counts``; ready for JSON."""
    asked = [(Problem(id=p.id, messages=(Message(role="user", content=""),), answer=p.gold), p.pred) for p in pairs]
    by_policy: dict[str, list[Score]] = {}
    for policy in ("lenient", "strict"):
        with Grader(workers=workers, seconds=seconds, strict=policy == "strict") as grader:
            by_policy[policy] = grader.score_many(asked)
    samples = [
        {
            "id": pair.id,
            "verdict": lenient.verdict.value,
            "strict": strict.verdict.value,
            "lenient": lenient.verdict.value,
            "reason": lenient.reason,
            "extracted": lenient.extracted,
        }
        for pair, strict, lenient in zip(pairs, by_policy["strict"], by_policy["lenient"], strict=True)
    ]
    verdicts = Counter(sample["verdict"] for sample in samples)
    return {"samples": samples, "counts": {"n": len(samples), **{v.value: verdicts[v.value] for v in Verdict}}}


def table(result: dict[str, Any]) -> str:
    """The samples as lines and the counts below them."""
    lines = [f"{s['id']:>12}  {s['verdict']:<9}  {s['reason']}" for s in result["samples"]]
    return "\n".join([*lines, "  ".join(f"{name} {count}" for name, count in result["counts"].items())])
