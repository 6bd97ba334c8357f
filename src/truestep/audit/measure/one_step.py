"""Judges one step by the pattern of its weights, or else by what the weights do not explain.

Each step is judged from the parameters at its start. A pattern is a product: which micro-batches are kept ×
normaliser × scale. Causes come from this structure, so unknown faults are still described. Shapes: P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from truestep.audit.measure import objectives, thresholds
from truestep.audit.measure.findings import Cause, cause
from truestep.audit.measure.observations import Parts, Step
from truestep.audit.measure.patterns import (
    CONSTANTS,
    Seen,
    alike,
    fit_pattern,
    hides_weights,
    unknown,
    without_pattern,
)
from truestep.audit.measure.weights import Recovered, observed_gradient, recover
from truestep.faults import recover_weights

Parameters = Sequence[tuple[str, tuple[int, ...]]]
MASKS = {  # other mask → (code, kind)
    "early": ("mask_shifted", "mask_early"),
    "late": ("mask_shifted", "mask_late"),
    "endless": ("stop_untrained", "mask_endless"),
    "headless": ("start_untrained", "mask_headless"),
    "all": ("prompt_trained", "mask_all"),
    "begun": ("prompt_trained", "mask_begun"),
    "around": ("start_predicted", "mask_around"),
}
KINDS = {"prompt": "prompt_trained", "stop": "stop_untrained"}  # column → kind, if the names differ


def see(step: Step, previous: Step | None, dtype: str, parameters: Parameters = ()) -> Seen:
    """Judge one SGD step."""
    if not np.isfinite(step.after).all():
        empty = any(m.num_trained == 0 for m in step.microbatches)
        return Seen(causes=(cause("not_finite", "not_finite_after_empty" if empty else "not_finite"),))
    if not step.num_trained and not step.direction.any():
        return Seen()
    if not step.num_trained:
        return Seen(causes=(cause("unexplained", "no_trained_token"),))
    if step.used is not None and not step.used.any():
        return Seen(causes=(cause("data_lost", "no_gradient"),))
    found = recover(step, dtype)
    noise, residual = thresholds.NOISE_FACTOR * found.noise, thresholds.RESIDUAL[dtype]
    if found.relative_error <= min(noise, thresholds.CAST if step.narrow else residual):
        return Seen(recovered=found)
    if found.residual > (limit := max(residual, noise)):
        return _rest(step, previous, found, parameters, limit, dtype)
    pattern = fit_pattern(found, dtype)
    if pattern is None:
        return Seen(causes=(without_pattern(step, found),), recovered=found)
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
        seen = see(
            replace(step, microbatches=batches, control=control, extras={}, masks={}, parts=Parts()),
            None,
            dtype,
        )
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


def _rest(
    step: Step, previous: Step | None, found: Recovered, parameters: Parameters, limit: float, dtype: str
) -> Seen:
    """Judge a residual by its best explanation, which is a single rule, a single added term or an objective."""
    law = _rows(step, found, limit) or _frozen(step, parameters)
    if step.read_back:
        law = law or _rounded(step)
    law = law or _clipped_entries(step)
    if added := law or _addition(step, previous, found, parameters):
        if added.code == "auxiliary_loss":  # the weights of the micro-batches are those without it
            carried = step.carried + added.values["coefficient"] * step.added
            without = recover(replace(step, carried=carried), dtype)
            found = replace(without, relative_error=found.relative_error)
        return Seen(causes=(added,), recovered=found)
    if masked := other_mask(step, dtype, found, limit):
        return masked
    if named := objectives.name(step, limit):
        return _of_objective(step, named, found, limit, dtype)
    return Seen(causes=(cause("unexplained", "unexplained", share=found.residual),), recovered=found)


def _of_objective(step: Step, named: objectives.Named, found: Recovered, limit: float, dtype: str) -> Seen:
    """Add the pattern of the weights that the objective gives to rows, if its micro-batches have one row."""
    used = [m for m in step.microbatches if m.num_trained]
    rows = [[row for row, n in zip(m.rows, m.row_counts, strict=True) if n] for m in used]
    if named.cause.code == "token_weights" or any(len(several) > 1 for several in rows):
        return Seen(causes=(named.cause,), recovered=found)
    weights = np.array([named.weights[row] for (row,) in rows])
    own = replace(found, weights=weights, errors=np.maximum(found.errors, limit))
    pattern = fit_pattern(own, dtype)
    more = pattern.causes if pattern else (unknown("unknown_weights", own.weights),)
    return Seen(causes=(named.cause, *more), recovered=own, scale=pattern.scale if pattern else 1.0)


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
    return unknown("unknown_row_weights", weights)


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
    if kind == "stop_untrained" and best[2] > 0:
        return cause("stop_overweighted", "stop_overweighted", weight=1 + best[2])
    if kind == "momentum" and abs(best[2] - 1) <= thresholds.CLOSE:
        return cause("not_cleared", "not_cleared")
    return cause(kind.removesuffix("_of_matrices"), kind, coefficient=best[2])


def _slices(parameters: Parameters) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, shape in parameters:
        stop = start + int(np.prod(shape))
        yield name, slice(start, stop)
        start = stop
