"""Recovers from an observed step the weight that each micro-batch's tokens had, with a standard error.

Under plain SGD, the gradient that the step used is (before − after) / lr. It is written as Σ w_i · g_i / N,
where g_i is the exact gradient sum of micro-batch i, and N is the number of trained tokens. Correct weights
are 1. The noise is not assumed. It follows from the error of the same rows in the subject's own precision,
and from the error of reading a small change back from stored parameters. AdamW's first steps hide every
scale, so its textbook update is computed for each known weight vector, and the closest vector names what
happened.

Shapes: P parameters, M micro-batches (those with trained tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.observations import Step
from truestep.faults import FAULTS, recover_weights

EPS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
CLIP_EPSILON = 1e-6  # torch's and DeepSpeed's
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of AdamW


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What is recovered from one step."""

    weights: np.ndarray  # M
    errors: np.ndarray  # M, standard errors from the measured noise
    residual: float  # share of the observed gradient that no weights explain
    condition: float
    relative_error: float  # of the observed gradient against the correct one
    noise: float  # relative error of a correct step
    counts: tuple[tuple[int, ...], ...]  # trained tokens, rank after rank, without the empty micro-batches
    empty: tuple[tuple[int, int], ...]  # (rank, index) of micro-batches without trained tokens
    lengths: tuple[int, ...] = ()  # of the rows of the step
    slots: tuple[int, ...] = ()  # positions of the step with padding: all, and all that predict something
    num_first: int = 0  # rows whose first token is marked as trained


def observed_gradient(step: Step) -> np.ndarray:
    """Return (before − after) / lr without the configured momentum and clip. Units: loss per parameter."""
    return np.asarray((step.direction - step.carried) / step.clip_scale)


def noise_of(step: Step, dtype: str, used: float = 0.0) -> float:
    """Return the relative error of a correct step in this precision: what was measured on the same rows or
    the rounding of the read-back (half a unit in the last place of each stored parameter), whichever is
    larger. The parameters of a bfloat16 step may be stored in float32, which their bits show. ``used`` is the
    norm of the gradient that the step used, by default that of a correct one."""
    exact = step.expected * step.num_trained
    size = float(np.linalg.norm(exact))
    if size == 0:
        return math.inf
    measured = float(np.linalg.norm(step.control - exact)) / size
    used = used or size / step.num_trained * step.clip_scale
    read_back = (
        min(EPS[dtype], EPS[step.stored]) * float(np.linalg.norm(step.after)) / (step.learning_rate * used)
    )
    read_back *= step.read_back
    if step.narrow:
        measured = max(measured, EPS[step.narrow])
    # Clipping divides by the norm plus CLIP_EPSILON; momentum was also read back, from the step before.
    clipping = CLIP_EPSILON * step.num_trained / size if step.max_grad_norm else 0.0
    return max(thresholds.NOISE_FLOOR, measured, clipping, read_back * (2 if np.any(step.carried) else 1))


def condition_of(step: Step) -> float:
    """Return the condition number of the micro-batches' gradients, each scaled to unit length."""
    used = [m.gradient for m in step.microbatches if m.num_trained]
    unit = np.stack([g / max(1e-300, float(np.linalg.norm(g))) for g in used])
    smallest, largest = np.linalg.eigvalsh(unit @ unit.T)[[0, -1]]
    return math.sqrt(largest / smallest) if smallest > 1e-14 * largest else math.inf


def recover(step: Step, dtype: str = "float32") -> Recovered:
    """Solve for the weights of one SGD step. Raises ValueError if no token in the step was trained."""
    used = [m for m in step.microbatches if m.num_trained]
    if not used:
        raise ValueError("no trained token in the step")
    observed = observed_gradient(step)
    parts = [m.gradient / step.num_trained for m in used]
    weights, residual, condition = recover_weights(observed, parts)
    noise = noise_of(step, dtype)
    if moved := float(np.linalg.norm(step.direction)):
        noise = max(noise, noise_of(step, dtype, used=moved))  # of a step that is too small
    expected = step.expected
    size, unit = max(float(np.linalg.norm(observed)), float(np.linalg.norm(expected))), 1.0
    if not step.read_back:  # then the noise is as small as the gradient is
        size, unit = float(np.linalg.norm(observed)), float(np.abs(weights).max())
    covariance = np.linalg.pinv(np.stack(parts, axis=1).T @ np.stack(parts, axis=1))
    # The noise vector is spread over P directions; only its part along the g_i reaches the weights.
    spread = np.sqrt(np.diag(covariance)) * noise * size / math.sqrt(len(observed))
    # How far the weights of a correct step are from 1.
    drift = np.abs(recover_weights(step.control / step.num_trained, parts)[0] - 1.0)
    # Whatever is rounded to a narrow dtype may be a factor of everything.
    least = EPS[step.narrow] if step.narrow else thresholds.NOISE_FLOOR
    return Recovered(
        weights=weights,
        errors=np.maximum(spread, np.maximum(drift, least) * unit),
        residual=residual,
        condition=condition,
        relative_error=float(np.linalg.norm(observed - expected) / np.linalg.norm(expected)),
        noise=noise,
        counts=tuple(tuple(n for n in rank if n) for rank in step.counts),
        empty=tuple((m.rank, m.index) for m in step.microbatches if not m.num_trained),
        lengths=tuple(length for m in step.microbatches for length in m.row_lengths),
        slots=tuple(sum(m.slots(shift) for m in step.microbatches) for shift in (0, 1)),
        num_first=sum(m.num_first for m in step.microbatches),
    )


def adamw_changes(steps: Sequence[Step], name: str) -> list[np.ndarray] | None:
    """Return each step's update [P] by AdamW without weight decay under a known fault; None if undefined."""
    first = second = np.zeros(1)
    changes = []
    for number, step in enumerate(steps, start=1):
        counts = [[n for n in rank if n] for rank in step.counts]
        try:
            weights = FAULTS[name][0](counts)
        except ValueError:
            return None
        used = [m.gradient for m in step.microbatches if m.num_trained]
        total = np.sum([w * g for w, g in zip(weights, used, strict=True)], axis=0)
        gradient = total / max(1, step.num_trained)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        mean, variance = first / (1 - BETAS[0] ** number), second / (1 - BETAS[1] ** number)
        changes.append(-step.learning_rate * mean / (np.sqrt(variance) + EPSILON))
    return changes


def adamw_errors(steps: Sequence[Step]) -> dict[str, float]:
    """Return fault → relative error of its predicted updates over all steps, smallest first."""
    observed = [s.after - s.before for s in steps]
    size = sum(float(np.linalg.norm(o)) for o in observed)
    found = {}
    for name in FAULTS:
        changes = adamw_changes(steps, name)
        if changes is not None and size:
            missed = sum(float(np.linalg.norm(o - c)) for o, c in zip(observed, changes, strict=True))
            found[name] = missed / size
    return dict(sorted(found.items(), key=lambda item: item[1]))
