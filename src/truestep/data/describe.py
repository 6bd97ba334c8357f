"""Describes a set of problems: counts, lengths, and texts that occur more than once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from truestep.data.overlap import problem_text
from truestep.records import Problem


def describe(problems: Sequence[Problem]) -> dict[str, Any]:
    """Return counts, lengths in characters, and duplicate texts (contradictory if their answers differ),
    ready for JSON."""
    rows: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        rows[problem_text(problem)].append(problem)
    repeated = [same for same in rows.values() if len(same) > 1]
    contradictory = [same for same in repeated if len({p.answer for p in same if p.answer}) > 1]
    solutions = [p.solution for p in problems if p.solution]
    return {
        "num_problems": len(problems),
        "num_answers": sum(bool(p.answer) for p in problems),
        "num_solutions": len(solutions),
        "checkers": dict(sorted(Counter(p.checker for p in problems).items())),
        "problem_characters": _lengths([sum(len(m.content) for m in p.messages) for p in problems]),
        "solution_characters": _lengths([len(text) for text in solutions]),
        "num_duplicate_texts": sum(len(same) - 1 for same in repeated),
        "num_contradictory_texts": len(contradictory),
        "duplicate_examples": [[p.row for p in same[:2]] for same in (contradictory or repeated)[:3]],
    }


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Return the smallest, median, mean and largest length; empty without lengths."""
    if not lengths:
        return {}
    mean = round(sum(lengths) / len(lengths), 1)
    return {"min": min(lengths), "median": median(lengths), "mean": mean, "max": max(lengths)}
