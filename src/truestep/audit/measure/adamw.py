"""Which weights explain AdamW's update? Its first steps hide every scale.

From the exact gradients of every step the textbook update is computed for each known weight vector; the one
that comes closest names what happened. Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from truestep.audit.measure.observations import Step
from truestep.faults import FAULTS

BETAS, EPSILON = (0.9, 0.999), 1e-8


def predicted(steps: Sequence[Step], name: str) -> list[np.ndarray] | None:
    """Each step's Δ [P] under AdamW without weight decay, with the fault's gradients; None if it has none."""
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


def errors(steps: Sequence[Step]) -> dict[str, float]:
    """Fault → relative error of its predicted updates over all steps, best first."""
    observed = [s.after - s.before for s in steps]
    size = sum(float(np.linalg.norm(o)) for o in observed)
    found = {}
    for name in FAULTS:
        changes = predicted(steps, name)
        if changes is not None and size:
            missed = sum(float(np.linalg.norm(o - c)) for o, c in zip(observed, changes, strict=True))
            found[name] = missed / size
    return dict(sorted(found.items(), key=lambda item: item[1]))
