"""What is in a step besides weights of its micro-batches: the one addition, or the one law, that explains the
rest.

Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from truestep.audit.observe import Step
from truestep.audit.weights import Recovered, observed_gradient
from truestep.faults import recover_weights

Cause = tuple[str, str]  # code, words
Parameters = Sequence[tuple[str, tuple[int, ...]]]
EXPLAINED = 20.0  # an added column must shrink the residual by this factor
CLIPPED_SHARE = 0.01  # of the entries at the very largest value: a smooth gradient has one
SMALL_UPDATE = 2.0**-7  # of its parameter: what half of bfloat16's digits cannot hold
ADDITIONS = {
    "prompt": ("prompt_trained", "tokens outside the mask are trained"),
    "shift_0": ("shift_0", "labels are not shifted"),
    "shift_2": ("shift_2", "labels are shifted twice"),
    "stop": ("stop_untrained", "the last token of each answer is not trained"),
    "decay": ("weight_decay", "weight decay"),
    "decay of matrices": ("weight_decay", "weight decay of matrices"),
    "before": ("momentum", "part of the step before is applied again"),
}


def find(step: Step, previous: Step | None, found: Recovered, parameters: Parameters, limit: float) -> Cause:
    """The best explanation of a residual; ("unexplained", …) where there is none."""
    for law in (_rows, _frozen, _rounded, _clipped_entries):
        if cause := law(step, found, parameters, limit):
            return cause
    if cause := _addition(step, previous, found, parameters):
        return cause
    return (
        "unexplained",
        f"{100 * found.residual:.1f} % of the gradient is explained by no weights of the micro-batches",
    )


def _rows(step: Step, found: Recovered, parameters: Parameters, limit: float) -> Cause | None:
    """Weights of single rows, where micro-batches hold several."""
    counts = np.array([n for m in step.microbatches for n in m.row_counts], dtype=float)
    gradients = [g / step.num_trained for m in step.microbatches for g in m.row_gradients]
    if sum(counts > 0) <= len(found.weights):
        return None
    used = counts > 0
    weights, residual, _ = recover_weights(
        observed_gradient(step), [g for g, on in zip(gradients, used, strict=True) if on]
    )
    if residual > limit:
        return None
    products = weights * counts[used]
    if np.ptp(products) <= 0.01 * np.abs(products).max():
        return "sequence_mean", "mean of the rows' means"
    shown = ", ".join(f"{w:.3g}" for w in weights)
    return "unknown_weights", f"rows of one micro-batch have different weights [{shown}]"


def _frozen(step: Step, found: Recovered, parameters: Parameters, limit: float) -> Cause | None:
    """Whole tensors that have a gradient and do not move."""
    change, expected = step.after - step.before, step.expected
    gone = [
        name
        for name, part in _slices(parameters)
        if not change[part].any() and np.linalg.norm(expected[part]) > 1e-3 * np.linalg.norm(expected)
    ]
    if not gone:
        return None
    return "stale_parameters", f"{gone[0]} does not move: the optimizer does not hold what the model uses"


def _rounded(step: Step, found: Recovered, parameters: Parameters, limit: float) -> Cause | None:
    """Parameters that lie on bfloat16's grid although they are stored in float32, or small updates that are
    lost."""
    bits = np.ascontiguousarray(step.after, dtype=np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any() and step.after.any():
        return "rounding", "parameters are rounded to bfloat16 at every step"
    change, wanted = step.after - step.before, step.learning_rate * step.clip_scale * step.expected
    visible = np.abs(wanted) > 2.0**-20 * np.abs(step.before)
    lost = visible & (change == 0)
    small = visible & (np.abs(wanted) <= SMALL_UPDATE * np.abs(step.before))
    # The small ones are lost, and hardly anything else is.
    if lost.sum() > 0.01 * visible.sum() and small[lost].mean() > 0.95 and lost[small].mean() > 0.3:
        return "rounding", f"small updates are lost ({100 * lost.sum() / visible.sum():.0f} % of the entries)"
    return None


def _clipped_entries(step: Step, found: Recovered, parameters: Parameters, limit: float) -> Cause | None:
    size = np.abs(observed_gradient(step))
    if (size >= 0.999 * size.max()).mean() > CLIPPED_SHARE:
        return "clip", f"every entry of the gradient is clipped to {size.max():.3g}"
    return None


def _addition(step: Step, previous: Step | None, found: Recovered, parameters: Parameters) -> Cause | None:
    observed = observed_gradient(step)
    used = [m.gradient / step.num_trained for m in step.microbatches if m.num_trained]
    candidates = {k: v / step.num_trained for k, v in step.extras.items()} | {"decay": step.before}
    matrices = np.zeros_like(step.before)
    for (_, part), (_, shape) in zip(_slices(parameters), parameters, strict=True):
        if len(shape) > 1:
            matrices[part] = step.before[part]
    candidates["decay of matrices"] = matrices
    if previous is not None:
        candidates["before"] = previous.direction
    best: tuple[float, str, float] | None = None
    for name, column in candidates.items():
        if not np.linalg.norm(column):
            continue
        weights, residual, _ = recover_weights(observed, [*used, column])
        if residual * EXPLAINED <= found.residual and (best is None or residual < best[0] / 2):
            best = (residual, name, float(weights[-1]))
    if best is None:
        return None
    _, name, amount = best
    code, words = ADDITIONS[name]
    return code, f"{words} (coefficient {amount:.3g})"


def clipped_parts(step: Step, found: Recovered) -> Cause | None:
    """Weights that make every micro-batch's, or every rank's, gradient equally long."""
    used = [m for m in step.microbatches if m.num_trained]
    sizes = np.array([np.linalg.norm(m.gradient) for m in used]) * np.abs(found.weights)
    # A part below the limit is left alone: the clipped ones have the one length that is the largest.
    at_limit = np.isclose(sizes, sizes.max(), rtol=0.01)
    if at_limit.sum() >= max(2, len(sizes) // 2):
        return "clip", "every micro-batch's gradient is clipped by its own norm"
    ranks = sorted({m.rank for m in used})
    if len(ranks) > 1:
        parts = []
        for rank in ranks:
            mine = [(m.gradient, w) for m, w in zip(used, found.weights, strict=True) if m.rank == rank]
            if np.ptp([w for _, w in mine]) > 0.01 * max(abs(w) for _, w in mine):
                return None
            parts.append(float(np.linalg.norm(np.sum([g * w for g, w in mine], axis=0))))
        if np.ptp(parts) <= 0.01 * max(parts):
            return "clip", "every rank's gradient is clipped by its own norm"
    return None


def _slices(parameters: Parameters) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, shape in parameters:
        stop = start + int(np.prod(shape))
        yield name, slice(start, stop)
        start = stop
