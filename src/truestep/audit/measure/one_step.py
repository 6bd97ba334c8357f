"""Judges one step by the pattern of its weights, or else by what the weights do not explain.

Each step is judged from the parameters at its start. A pattern is a product: which micro-batches are kept ×
normaliser × scale. Causes come from this structure, so unknown faults are still described. Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from truestep import faults
from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Cause, Causes, cause
from truestep.audit.measure.observations import Step
from truestep.audit.measure.weights import Recovered, observed_gradient, recover
from truestep.faults import recover_weights

Parameters = Sequence[tuple[str, tuple[int, ...]]]
CONSTANTS = {"scale", "accumulation_factor", "rank_factor", "empty_counted"}
OTHERS = (faults.rank_mean, faults.micro_mean, faults.dp_token_mean)
NORMALISERS: dict[str, faults.WeightsOf] = {"global": faults.right, **{f.__name__: f for f in OTHERS}}
MASKS = {  # other mask → (code, kind)
    "early": ("mask_shifted", "mask_early"),
    "late": ("mask_shifted", "mask_late"),
    "endless": ("stop_untrained", "mask_endless"),
    "headless": ("start_untrained", "mask_headless"),
    "all": ("prompt_trained", "mask_all"),
    "begun": ("prompt_trained", "mask_begun"),
}
KINDS = {"prompt": "prompt_trained", "stop": "stop_untrained"}  # column → kind, if the names differ


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


def see(step: Step, previous: Step | None, dtype: str, parameters: Parameters = ()) -> Seen:
    """Judge one SGD step."""
    if not np.isfinite(step.after).all():
        empty = any(m.num_trained == 0 for m in step.microbatches)
        return Seen(causes=(cause("not_finite", "not_finite_after_empty" if empty else "not_finite"),))
    if not step.num_trained:
        return Seen(causes=(cause("unexplained", "no_trained_token"),))
    found = recover(step, dtype)
    noise, residual = thresholds.NOISE_FACTOR * found.noise, thresholds.RESIDUAL[dtype]
    if found.relative_error <= min(noise, residual):
        return Seen(recovered=found)
    if found.residual > (limit := max(residual, noise)):
        why = _rest(step, previous, found, parameters, limit)
        if why.code == "auxiliary_loss":  # the weights of the micro-batches are those without it
            carried = step.carried + why.values["coefficient"] * step.added
            without = recover(replace(step, carried=carried), dtype)
            found = replace(without, relative_error=found.relative_error)
        masked = other_mask(step, dtype, found, limit) if why.code == "unexplained" else None
        return masked or Seen(causes=(why,), recovered=found)
    pattern = fit_pattern(found, dtype)
    if pattern is None:
        named = _clipped_parts(step, found) or _unknown("unknown_weights", found.weights)
        return Seen(causes=(named,), recovered=found)
    causes = pattern.causes
    if len(causes) > 1 and causes[-1].code in CONSTANTS and reaches_clip(step):
        # Wrong weights change the norm and the clip restores it, so the constant adds no information.
        return Seen(causes=causes[:-1], recovered=found)
    return replace(pattern, hidden=not causes and hides_weights(found))


def other_mask(step: Step, dtype: str, found: Recovered, limit: float) -> Seen | None:
    """Judge a step whose gradient is that of other trained tokens as if these had been asked for. Return None
    if no mask explains it. The relative error is still against the tokens that were asked for."""
    best: tuple[float, Seen] | None = None
    rounding = step.control - step.expected * step.num_trained
    for name, batches in step.masks.items():
        control = rounding + np.sum([m.gradient for m in batches], axis=0)
        seen = see(replace(step, microbatches=batches, control=control, extras={}, masks={}), None, dtype)
        left = seen.recovered.residual if seen.recovered else 1.0
        if (
            seen.recovered
            and left <= limit
            and "unexplained" not in seen.codes
            and (best is None or left < best[0])
        ):
            recovered = replace(seen.recovered, relative_error=found.relative_error)
            causes = (cause(*MASKS[name]), *seen.causes)
            best = (left, replace(seen, causes=causes, recovered=recovered))
    return best[1] if best else None


def used_length(step: Step) -> float:
    """Return the norm of the gradient that the step used."""
    return float(np.linalg.norm(step.direction - step.carried))


def reaches_clip(step: Step) -> bool:
    """Return whether the used gradient is exactly as long as the configured clip allows."""
    limit = step.max_grad_norm
    return bool(limit) and abs(used_length(step) - limit) <= thresholds.CLOSE * limit


def alike(values: Sequence[float] | np.ndarray) -> bool:
    return bool(np.ptp(values) <= thresholds.CLOSE * np.abs(values).max())


def _unknown(kind: str, weights: np.ndarray) -> Cause:
    return cause("unknown_weights", kind, weights=weights.tolist())


def fit_pattern(recovered: Recovered, dtype: str) -> Seen | None:
    """Return the simplest pattern kept × normaliser × scale that fits the weights within their errors. Its
    wrong parts are the causes, in this order. Return None if no pattern fits."""
    weights = recovered.weights
    errors = np.maximum(thresholds.STANDARD_ERRORS * recovered.errors, thresholds.WEIGHT[dtype])
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
    if normaliser == "micro_mean":
        known.append(("empty_counted", "empty_is_zero_mean", used / asked))
    close = thresholds.KNOWN_FACTOR
    fitting = [(c, k) for c, k, value in known if value != 1.0 and abs(scale - value) <= close * abs(value)]
    if not fitting:
        return cause("scale", "scale", scale=scale)
    return cause(fitting[0][0], *(kind for _, kind in fitting[:2]))


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


def _clipped_parts(step: Step, found: Recovered) -> Cause | None:
    """Return a clip if the weights give the gradients of all micro-batches, or all ranks, the same norm."""
    used = [m for m in step.microbatches if m.num_trained]
    sizes = np.array([np.linalg.norm(m.gradient) for m in used]) * np.abs(found.weights)
    # A part below the limit is not clipped, and all clipped parts have the largest norm.
    at_limit = np.isclose(sizes, sizes.max(), rtol=thresholds.CLOSE)
    if at_limit.sum() >= max(2, len(sizes) // 2):
        return cause("clip", "clip_of_micro_batches")
    ranks = sorted({m.rank for m in used})
    parts = []
    for rank in ranks:
        mine = [(m.gradient, w) for m, w in zip(used, found.weights, strict=True) if m.rank == rank]
        if not alike([w for _, w in mine]):
            return None
        parts.append(float(np.linalg.norm(np.sum([g * w for g, w in mine], axis=0))))
    return cause("clip", "clip_of_ranks") if len(ranks) > 1 and alike(parts) else None


def _rest(step: Step, previous: Step | None, found: Recovered, parameters: Parameters, limit: float) -> Cause:
    """Return the best explanation of a residual, which is a single rule or a single added term."""
    law = _rows(step, found, limit) or _frozen(step, parameters) or _rounded(step) or _clipped_entries(step)
    added = law or _addition(step, previous, found, parameters)
    return added or cause("unexplained", "unexplained", share=found.residual)


def _rows(step: Step, found: Recovered, limit: float) -> Cause | None:
    """Explain a residual by different weights of single rows, if micro-batches contain several rows."""
    pairs = [pair for m in step.microbatches for pair in zip(m.row_counts, m.row_gradients, strict=True)]
    rows = [(n, g) for n, g in pairs if n]
    if len(rows) <= len(found.weights):
        return None
    weights, residual, _ = recover_weights(observed_gradient(step), [g / step.num_trained for _, g in rows])
    if residual > limit:
        return None
    if alike(weights * np.array([float(n) for n, _ in rows])):
        return cause("sequence_mean", "sequence_mean")
    return _unknown("unknown_row_weights", weights)


def _frozen(step: Step, parameters: Parameters) -> Cause | None:
    """Find whole tensors that have a gradient but do not move."""
    change, expected = step.after - step.before, step.expected
    least = thresholds.UNMOVED * np.linalg.norm(expected)
    asked = [(name, part) for name, part in _slices(parameters) if np.linalg.norm(expected[part]) > least]
    still = [name for name, part in asked if not change[part].any()]
    if len(still) > 1:
        return cause(
            "stale_parameters", "tensors_do_not_move", count=len(still), of=len(asked), names=still[:3]
        )
    return cause("stale_parameters", "tensor_does_not_move", name=still[0]) if still else None


def _rounded(step: Step) -> Cause | None:
    """Find float32 parameters whose values are all exact in bfloat16, or small updates that were lost."""
    bits = np.ascontiguousarray(step.after, dtype=np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any() and step.after.any():
        return cause("rounding", "rounded_parameters")
    change, size = step.after - step.before, np.abs(step.before)
    wanted = np.abs(step.learning_rate * step.clip_scale * step.expected)
    visible = wanted > thresholds.VISIBLE_UPDATE * size
    lost, small = visible & (change == 0), visible & (wanted <= thresholds.SMALL_UPDATE * size)
    if lost.sum() <= thresholds.LOST_UPDATES * visible.sum():
        return None
    if small[lost].mean() > thresholds.LOST_ARE_SMALL and lost[small].mean() > thresholds.SMALL_ARE_LOST:
        return cause("rounding", "small_updates_lost", share=float(lost.sum() / visible.sum()))
    return None


def _clipped_entries(step: Step) -> Cause | None:
    size = np.abs(observed_gradient(step))
    if (size >= 0.999 * size.max()).mean() > thresholds.CLIPPED_SHARE:
        return cause("clip", "clip_of_entries", limit=float(size.max()))
    return None


def _addition(step: Step, previous: Step | None, found: Recovered, parameters: Parameters) -> Cause | None:
    observed = observed_gradient(step)
    used = [m.gradient / step.num_trained for m in step.microbatches if m.num_trained]
    candidates = {k: v / step.num_trained for k, v in step.extras.items()} | {"weight_decay": step.before}
    matrices = np.zeros_like(step.before)
    for (_, part), (_, shape) in zip(_slices(parameters), parameters, strict=True):
        if len(shape) > 1:
            matrices[part] = step.before[part]
    candidates["weight_decay_of_matrices"] = matrices
    if previous is not None:
        candidates["momentum"] = previous.direction
    if step.added is not None:
        candidates["auxiliary_loss"] = step.added
    best: tuple[float, str, float] | None = None
    for name, column in candidates.items():
        if not np.linalg.norm(column):
            continue
        weights, residual, _ = recover_weights(observed, [*used, column])
        explains = residual * thresholds.EXPLAINED <= found.residual
        if explains and (best is None or residual < best[0] / 2):
            best = (residual, name, float(weights[-1]))
    if best is None:
        return None
    kind = KINDS.get(best[1], best[1])
    return cause(kind.removesuffix("_of_matrices"), kind, coefficient=best[2])


def _slices(parameters: Parameters) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, shape in parameters:
        stop = start + int(np.prod(shape))
        yield name, slice(start, stop)
        start = stop
