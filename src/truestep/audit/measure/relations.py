"""Compares the updates of the same rows, split, ordered or padded in different ways, from the same parameters.

A correct step is the same for all of them, whatever its objective is. Nothing but the observed updates is
compared. Shapes: P parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.cases import SAME_ROWS, Row
from truestep.audit.measure.observations import Observation, Step
from truestep.audit.measure.weights import noise_of
from truestep.faults import recover_weights


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One case against the case that has the same rows."""

    case: str
    base: str
    difference: float  # relative, the largest of all steps that could be compared
    equal: bool


def compare(runs: Mapping[str, Observation], dtype: str) -> dict[str, Compared]:
    """Return case → how it compares. A case is left out if its steps have other rows than those of its base
    (a framework may shuffle), since then nothing is known."""
    found = {}
    for case, base in SAME_ROWS.items():
        if case in runs and base in runs and (pairs := _pairs(runs[case], runs[base])):
            seen = [_difference(a, b, dtype) for a, b in pairs]
            # Later steps start from parameters that differ by the noise of all steps before.
            equal = all(size <= limit * (i + 1) for i, (size, limit) in enumerate(seen))
            found[case] = Compared(case=case, base=base, difference=max(s for s, _ in seen), equal=equal)
    return found


def _pairs(one: Observation, other: Observation) -> list[tuple[Step, Step]]:
    """Return the steps that both runs took on the same rows, up to the first that differs."""
    pairs: list[tuple[Step, Step]] = []
    for a, b in zip(one.steps, other.steps, strict=False):
        finite = np.isfinite(a.direction).all() and np.isfinite(b.direction).all()
        if not finite or _rows(one, a) != _rows(other, b) or not a.num_trained:
            break
        pairs.append((a, b))
    return pairs


def _rows(run: Observation, step: Step) -> Counter[Row]:
    rows = (run.asked.rows[row] for m in step.microbatches for row in m.rows)
    return Counter(row for row in rows if row.num_trained)


def _difference(a: Step, b: Step, dtype: str) -> tuple[float, float]:
    """Return the relative difference of two updates, and how large it may be by the measured noise."""
    size = max(float(np.linalg.norm(s.direction)) for s in (a, b))
    if size == 0:
        return 0.0, 0.0
    limit = thresholds.NOISE_FACTOR * sum(_noise(s, dtype, size) for s in (a, b))
    difference = float(np.linalg.norm(a.direction - b.direction)) / size
    return difference, max(limit, thresholds.RESIDUAL[dtype])


def _noise(step: Step, dtype: str, size: float) -> float:
    """Return the noise of a step relative to ``size``. Rows that cancel each other leave their noise."""
    parts = [m.gradient for m in step.microbatches if m.num_trained]
    weights = recover_weights(step.direction, parts)[0]
    added = float(np.linalg.norm(weights * np.linalg.norm(parts, axis=1)))
    return noise_of(step, dtype, used=size) * max(1.0, added / size)
