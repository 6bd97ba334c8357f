"""Solves for the weight that each micro-batch had in the gradient that was used, with standard errors.

Nothing about the noise is assumed: it is the part of the used gradient that no weights explain.
Shapes: R equations (probes of all watched modules), M micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from truestep.audit.measure import thresholds


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The weights of one step."""

    weights: np.ndarray  # M
    errors: np.ndarray  # M, standard errors
    residual: float  # share of the used gradient that no weights explain
    scale: float  # the common weight that explains most
    equal_residual: float  # share that the common weight leaves
    condition: float
    by_module: tuple[float, ...]  # the common weight of each module alone

    def differ(self, dtype: str) -> np.ndarray:
        """Return which weights [M] differ from the common weight by more than noise. The common weight is that
        of most micro-batches."""
        limit = np.maximum(
            thresholds.STANDARD_ERRORS * self.errors, TOLERANCE[dtype] * np.abs(self.weights).max()
        )
        middle = np.median(self.weights)
        return np.abs(self.weights - middle) > limit


# Relative, measured: the largest error of a weight in clean runs was 4e-6 in float32 and 1e-2 in bfloat16.
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}
RESIDUAL = {"float32": 1e-3, "bfloat16": 5e-2}


def solve(columns: np.ndarray, target: np.ndarray, modules: np.ndarray) -> Solved:
    """Solve columns [R, M] · w = target [R]. ``modules`` [R] numbers each equation's module; all modules count
    the same."""
    sizes = np.array([np.linalg.norm(np.c_[columns, target][modules == m]) for m in range(modules.max() + 1)])
    by_row = np.where(sizes > 0, sizes, 1.0)[modules]
    a, t = columns / by_row[:, None], target / by_row
    lengths = np.linalg.norm(a, axis=0)
    unit = a / np.where(lengths > 0, lengths, 1.0)
    scaled, _, rank, singular = np.linalg.lstsq(unit, t, rcond=None)
    weights = scaled / np.where(lengths > 0, lengths, 1.0)
    size = float(np.linalg.norm(t))
    missed = t - a @ weights
    residual = float(np.linalg.norm(missed)) / size if size else 0.0
    free = max(1, len(t) - len(weights))
    covariance = np.linalg.pinv(unit.T @ unit) * float(missed @ missed) / free
    errors = np.sqrt(np.abs(np.diag(covariance))) / np.where(lengths > 0, lengths, 1.0)
    total = a.sum(1)
    scale = float(total @ t) / max(1e-300, float(total @ total))
    equal = float(np.linalg.norm(t - scale * total)) / size if size else 0.0
    condition = float(singular[0] / singular[-1]) if rank == len(weights) else math.inf
    alone = tuple(
        float(total[modules == m] @ t[modules == m])
        / max(1e-300, float(total[modules == m] @ total[modules == m]))
        for m in range(modules.max() + 1)
    )
    return Solved(
        weights=weights, errors=np.maximum(errors, thresholds.NOISE_FLOOR * np.abs(weights).max()), residual=residual,
        scale=scale, equal_residual=equal, condition=condition, by_module=alone,
    )  # fmt: skip
