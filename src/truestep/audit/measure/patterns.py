"""Describes the weights of a step's micro-batches by a pattern: which are kept × normaliser × scale.

Causes come from this structure, so unknown faults are still described. Shapes: M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truestep import faults
from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Cause, Causes, cause
from truestep.audit.measure.observations import MicroBatch, Step
from truestep.audit.measure.weights import Recovered

CONSTANTS = {"scale", "accumulation_factor", "rank_factor", "empty_counted", "sum", "other_count"}
OTHERS = (faults.rank_mean, faults.micro_mean, faults.dp_token_mean)
NORMALISERS: dict[str, faults.WeightsOf] = {"global": faults.right, **{f.__name__: f for f in OTHERS}}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One judged step, which is correct if it has no causes."""

    causes: Causes = ()
    recovered: Recovered | None = None
    scale: float = 1.0
    hidden: bool = False  # no fault is visible, but noise hides single weights

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(c.code for c in self.causes)


def alike(values: Sequence[float] | np.ndarray) -> bool:
    return bool(np.ptp(values) <= thresholds.CLOSE * np.abs(values).max())


def fit_pattern(recovered: Recovered, dtype: str) -> Seen | None:
    """Return the simplest pattern kept × normaliser × scale that fits the weights within their errors. Its
    wrong parts are the causes, in this order. Return None if no pattern fits."""
    weights = recovered.weights
    least = thresholds.WEIGHT[dtype] * min(1.0, float(np.abs(weights).max()))
    errors = np.maximum(thresholds.STANDARD_ERRORS * recovered.errors, least)
    seen = np.abs(weights) > errors * max(1.0, np.abs(weights).max())
    # Nothing is wrong or dropped unless the weights show it: 1 ± 1.5 could be zero, but does not show it.
    if (np.abs(weights - 1.0) <= errors).all():
        return Seen(recovered=recovered)
    if not seen.any():
        return None
    for kept in (np.ones_like(seen), seen):
        for name in NORMALISERS:
            if found := _fit(recovered, kept, name, errors):
                return found
    return None


def hides_weights(recovered: Recovered) -> bool:
    """Return whether a weight of the step could also be zero, within the noise."""
    return bool((thresholds.STANDARD_ERRORS * recovered.errors >= 1.0).any())


def _fit(recovered: Recovered, kept: np.ndarray, name: str, errors: np.ndarray) -> Seen | None:
    """Return kept × the normaliser × the scale that fits best, or None if the weights do not match it."""
    try:
        predicted = NORMALISERS[name](recovered.counts)
    except ValueError:
        return None  # ranks with different numbers of micro-batches have no common micro-steps
    weights = recovered.weights
    scale = float(np.median(weights[kept] / predicted[kept]))
    allowed = errors * max(1.0, abs(scale) * float(predicted[kept].max()))
    if not (np.abs(weights - scale * predicted * kept) <= allowed).all():
        return None
    # A scale of 1, if no weight contradicts it: a single noisy weight does not hide the scale of the others.
    scale = 1.0 if (np.abs(weights - predicted * kept) <= allowed).all() else scale
    normaliser = cause(name, name) if name != "global" else None
    parts = (_kept_cause(kept, recovered), normaliser, scale_cause(scale, recovered, kept, name))
    return Seen(causes=tuple(p for p in parts if p), recovered=recovered, scale=scale)


def scale_cause(scale: float, recovered: Recovered, kept: np.ndarray, normaliser: str) -> Cause | None:
    """Return the cause of a constant factor, with two readings if two known factors coincide."""
    if scale == 1.0:
        return None
    counts = recovered.counts
    flat = [n for rank in counts for n in rank]
    total, empty, ranks = sum(flat), len(recovered.empty), len(counts)
    used = max(len(rank) for rank in counts)
    asked = max(len(rank) + sum(r == i for r, _ in recovered.empty) for i, rank in enumerate(counts))
    # With one process, the product is the accumulation factor; with one micro-batch, it is the rank factor.
    both = ranks * asked if ranks > 1 < asked else 1
    known = [
        ("accumulation_factor", "accumulation_missing", asked),
        ("accumulation_factor", "accumulation_twice", 1 / asked),
        ("rank_factor", "ranks_summed", ranks),
        ("rank_factor", "ranks_twice", 1 / ranks),
        ("rank_factor", "both_missing", both),
        ("rank_factor", "both_twice", 1 / both),
        ("kept", "divided_by_kept", total / sum(n for n, k in zip(flat, kept, strict=True) if k)),
        ("empty_counted", "empty_is_one_token", total / (total + empty)),
    ]
    if recovered.lengths and normaliser == "global":
        rows, tokens = len(recovered.lengths), sum(recovered.lengths)
        known += [("sum", "sum", total), ("sum", "divided_by_rows", total / rows)]
        with_first = total + recovered.num_first
        known.append(("other_count", "first_counted", total / with_first))
        known += [
            ("other_count", "masked_counted", total / n) for n in (tokens, tokens - rows) if n != with_first
        ]
        known += [
            ("padding", "padding_counted", total / n)
            for n in recovered.slots
            if n not in (tokens, tokens - rows)
        ]
    if normaliser == "micro_mean":
        known.append(("empty_counted", "empty_is_zero_mean", used / asked))
    close = thresholds.KNOWN_FACTOR
    fitting = {k: c for c, k, value in known if value != 1.0 and abs(scale - value) <= close * abs(value)}
    if not fitting:
        return cause("scale", "scale", scale=scale)
    return cause(next(iter(fitting.values())), *list(fitting)[:2])


def _kept_cause(kept: np.ndarray, recovered: Recovered) -> Cause | None:
    """Return the cause that says which micro-batches are missing, or None."""
    if kept.all():
        return None
    by_rank = [part.tolist() for part in by_ranks(kept, recovered.counts)]
    gone = {str(r): [i + 1 for i, k in enumerate(rank) if not k] for r, rank in enumerate(by_rank)}
    first, size = by_rank[0], len(by_rank[0])
    if any(rank != first for rank in by_rank):
        return cause("kept", "dropped_by_rank", dropped={r: places for r, places in gone.items() if places})
    places = tuple(i for i, k in enumerate(first) if k)
    known = {(0,): "kept_first", (size - 1,): "kept_last", (0, size - 1): "kept_first_and_last"}
    if places in known:
        return cause("kept", known[places])
    return cause("kept", "dropped", dropped=gone["0"], of=size)


def by_ranks(values: np.ndarray, counts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(rank) for rank in counts])[:-1])


def without_pattern(step: Step, found: Recovered) -> Cause:
    """Describe weights that no pattern fits."""
    named = (
        _clipped_parts(step, found) or _decaying(found) or _by_slots(step, found) or _by_firsts(step, found)
    )
    return named or unknown("unknown_weights", found.weights)


def unknown(kind: str, weights: np.ndarray) -> Cause:
    return cause("unknown_weights", kind, weights=weights.tolist())


def _decaying(found: Recovered) -> Cause | None:
    """Find micro-batches whose weights are multiplied by a constant at each one that follows. A running average
    does not multiply the first one."""
    if not found.weights.all():
        return None
    for first in (0, 1):
        ranks = [w[first:] for w in by_ranks(found.weights, found.counts)]
        ratios = np.concatenate([np.zeros(0), *(w[:-1] / w[1:] for w in ranks)])
        if (
            len(ratios) >= 2
            and min(ratios) > 0
            and np.ptp(ratios) <= thresholds.KNOWN_FACTOR
            and not alike([1.0, ratios[0]])
        ):
            return cause("decaying_weights", "decaying_weights", ratio=float(np.median(ratios)))
    return None


def _by_slots(step: Step, found: Recovered) -> Cause | None:
    """Find a mean over all positions of each micro-batch, which includes the masked ones and the padding."""
    for shift in (0, 1):  # the last position of a line may be left out
        slots = [m.slots(shift) for m in step.microbatches if m.num_trained]
        if all(slots) and len(set(slots)) > 1 and alike(found.weights * np.array(slots)):
            return cause("padding", "padding_counted")
    return None


def _by_firsts(step: Step, found: Recovered) -> Cause | None:
    """Find means over the trained tokens that are weighted by counts in which first tokens are included."""
    used = [m for m in step.microbatches if m.num_trained]
    factors = np.array([1 + m.num_first / m.num_trained for m in used])
    if not alike(factors) and alike(found.weights / factors):
        return cause("count_of_firsts", "weighted_with_first")
    return None


def _clipped_parts(step: Step, found: Recovered) -> Cause | None:
    """Return a clip if the weights give the gradients of all micro-batches, or all ranks, the same norm."""
    used = [m for m in step.microbatches if m.num_trained]
    sizes = np.array([np.linalg.norm(m.gradient) for m in used]) * np.abs(found.weights)
    # A part below the limit is not clipped, and all clipped parts have the largest norm.
    at_limit = np.isclose(sizes, sizes.max(), rtol=thresholds.CLOSE)
    if at_limit.sum() >= max(2, len(sizes) // 2):
        return cause("clip", "clip_of_micro_batches")
    ranks = sorted({m.rank for m in used})
    if len(ranks) == 1 and _clipped_sums(used, found.weights):
        return cause("clip", "clip_after_every_micro_batch")
    parts = []
    for rank in ranks:
        mine = [(m.gradient, w) for m, w in zip(used, found.weights, strict=True) if m.rank == rank]
        if not alike([w for _, w in mine]):
            return None
        parts.append(float(np.linalg.norm(np.sum([g * w for g, w in mine], axis=0))))
    return cause("clip", "clip_of_ranks") if len(ranks) > 1 and alike(parts) else None


def _clipped_sums(used: Sequence[MicroBatch], weights: np.ndarray) -> bool:
    """Return whether every sum of the micro-batches so far was clipped to the same norm."""
    kept, norms = weights.copy(), []
    for last in range(len(used) - 1, 0, -1):
        parts = zip(used[: last + 1], kept[: last + 1], strict=True)
        norms.append(float(np.linalg.norm(np.sum([m.gradient * w for m, w in parts], axis=0))))
        if not kept[last]:
            return False
        kept = kept / kept[last]
    # Two norms may be close by chance; those of a clip differ only by rounding.
    return len(norms) > 2 and bool(np.ptp(norms) <= thresholds.KNOWN_FACTOR * max(norms))
