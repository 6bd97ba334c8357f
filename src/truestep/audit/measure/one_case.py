"""Judges the clip, the schedule, resuming and the rows of each step, from all steps of one case together.

A correct step is known exactly from ``observations.Step`` (clip scale, rate, carried momentum), so no second
run is needed. Rows are counted, not forward passes, because the number of rows in a pass does not change the
step. A row without trained tokens adds nothing. Frameworks shuffle, so only the numbers of rows are compared.
Shapes: P parameters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from truestep.audit.measure import objectives, thresholds
from truestep.audit.measure.findings import Cause, Causes, Differences, cause
from truestep.audit.measure.observations import Observation, Step
from truestep.audit.measure.one_step import see, used_length
from truestep.audit.measure.patterns import CONSTANTS, Seen, alike
from truestep.audit.measure.weights import noise_of
from truestep.faults import recover_weights

KEPT = {"kept", "micro_mean", "rank_mean", "dp_token_mean"}  # codes of weights that are not a constant


@dataclass(frozen=True, kw_only=True)
class CaseSeen:
    """The judged steps of one case, and the differences of the case."""

    steps: Sequence[Seen]
    differences: Differences


def see_case(run: Observation, dtype: str) -> CaseSeen:
    steps = [see(s, run.steps[i - 1] if i else None, dtype, run.parameters) for i, s in enumerate(run.steps)]
    if steps and steps[0].causes and steps[0].causes[0].code in objectives.CODES:
        # The first step tells what is computed in the others.
        steps = [replace(s, causes=steps[0].causes) if s.codes == ("unexplained",) else s for s in steps]
    often = run.num_calls is not None and run.num_calls == 2 * len(run.steps)
    if often and all(s.codes and set(s.codes) <= CONSTANTS and alike([s.scale, 2.0]) for s in steps):
        steps = [replace(s, causes=(cause("scale", "stepped_twice"),)) for s in steps]
    for index, named in _related(steps, run, dtype).items():
        kept = tuple(c for c in steps[index].causes if c.code in KEPT)
        steps[index] = replace(steps[index], causes=(*kept, named))
    # Nothing moves after a schedule has reached zero: rows after that are missing because of the schedule.
    stopped = len(run.steps) < run.asked.steps and any("schedule" in s.codes for s in steps)
    data = () if stopped else data_coverage(run)
    # A step on the wrong rows, divided by the tokens of the configured ones, is off by a constant.
    regrouped = any(c.code == "grouping" for c in data)
    wrong = [s.causes for s in steps if s.causes and not (regrouped and set(s.codes) <= CONSTANTS)]
    distinct = tuple(c for i, c in enumerate(wrong) if c not in wrong[:i])
    every = len(wrong) in (0, len(steps))
    return CaseSeen(steps=steps, differences=Differences(data=data, steps=distinct, in_every_step=every))


def _related(steps: Sequence[Seen], run: Observation, dtype: str) -> Mapping[int, Cause]:
    """Return step → fault of clip, schedule or resuming. A fault replaces the constant that it looks like."""
    at = run.asked.resume_after
    noise = noise_of(run.steps[at], dtype) if at and len(run.steps) > at else 0.0
    if found := resume(run, max(thresholds.RESIDUAL[dtype], thresholds.NOISE_FACTOR * noise)):
        return dict.fromkeys(range(at, len(steps)), found)
    scales = [s.scale if set(s.codes) <= CONSTANTS | KEPT else None for s in steps]
    if found := schedule(run, scales):
        return dict.fromkeys(range(len(steps)), found)
    scaled = [i for i, s in enumerate(steps) if s.codes and s.codes[-1] in ("scale", "accumulation_factor")]
    if found := clip(run, scaled):
        return dict.fromkeys(scaled, found)
    wrong = [i for i, s in enumerate(steps) if s.codes and s.recovered and run.asked.max_grad_norm]
    parts = {i: clip_of_parts(run.steps[i], run.asked.accumulation) for i in wrong}
    return {i: found for i, found in parts.items() if found}


def clip(run: Observation, scaled: Sequence[int]) -> Cause | None:
    """Return how the clip differs from the configured one, for steps that are off only by a constant."""
    lengths = [used_length(run.steps[i]) for i in scaled]
    wanted = [float(np.linalg.norm(run.steps[i].expected)) for i in scaled]
    asked = run.asked.max_grad_norm
    if len(scaled) < 2 or np.ptp(wanted) < thresholds.CLOSE * max(wanted):
        return None
    if asked and np.allclose(lengths, wanted, rtol=thresholds.CLOSE):
        return cause("clip", "clip_missing", asked=asked)
    if alike(lengths):
        return cause("clip", "clip_to_other" if asked else "clip_to", norm=lengths[0], asked=asked)
    return None


Parts = Sequence[Sequence[np.ndarray]]  # rank, micro-batch: P


def clip_of_parts(step: Step, accumulation: int) -> Cause | None:
    """Return which clip of the step's parts (micro-batches, running sums, ranks) predicts the step, if any.

    A part may be divided by the number of micro-batches or ranks after the clip, so any constant is allowed.
    """
    used = step.direction - step.carried
    ranks = sorted({m.rank for m in step.microbatches})
    parts = [[m.gradient / step.num_trained for m in step.microbatches if m.rank == rank] for rank in ranks]
    found: list[tuple[float, str]] = []
    for kind, predict in CLIPS.items():
        for limit in dict.fromkeys(step.max_grad_norm / n for n in (1, accumulation, len(ranks))):
            wanted = predict(parts, limit)
            scale = float(used @ wanted) / float(wanted @ wanted)
            found.append((float(np.linalg.norm(used - scale * wanted) / np.linalg.norm(used)), kind))
    missed, kind = min(found, key=lambda pair: pair[0])
    return cause("clip", kind) if missed <= thresholds.FIT_OF_CLIPPED_PARTS else None


def _short(gradient: np.ndarray, limit: float) -> np.ndarray:
    return np.asarray(gradient * min(1.0, limit / max(1e-12, float(np.linalg.norm(gradient)))))


def _each(parts: Parts, limit: float) -> np.ndarray:
    return np.sum([_short(g, limit) for rank in parts for g in rank], axis=0)


def _running(parts: Parts, limit: float) -> np.ndarray:
    nothing = np.zeros_like(parts[0][0])
    sums = [reduce(lambda buffer, g: _short(buffer + g, limit), rank, nothing) for rank in parts]
    return np.sum(sums, axis=0)


def _ranks(parts: Parts, limit: float) -> np.ndarray:
    return np.sum([_short(np.sum(rank, axis=0), limit) for rank in parts], axis=0)


CLIPS = {"clip_of_micro_batches": _each, "clip_of_ranks": _ranks, "clip_after_every_micro_batch": _running}


def schedule(run: Observation, scales: Sequence[float | None]) -> Cause | None:
    """Judge whether learning rates follow the configured schedule. ``scales`` has each step's factor."""
    asked, until = run.asked, run.asked.resume_after or len(scales)
    rates = [asked.rate(i) * scale for i, scale in enumerate(scales[:until]) if scale is not None]
    if not asked.decay or len(rates) < 2 or len(rates) != min(until, len(scales)):
        return None
    right = [asked.rate(i) for i in range(len(rates))]
    early = [asked.rate(i + 1) for i in range(len(rates))]
    speed = asked.steps * (1 - rates[1] / rates[0])  # ticks per step
    line = [rates[0] * max(0.0, 1 - speed * i / asked.steps) for i in range(len(rates))]
    if np.allclose(np.array(rates) / rates[0], right, atol=thresholds.CLOSE):
        return None
    if np.allclose(rates, early, atol=thresholds.CLOSE):
        return cause("schedule", "schedule_ahead")
    if not np.allclose(rates, line, atol=thresholds.CLOSE):
        return cause("schedule", "schedule_rates", rates=rates, asked=right)
    micro, ranks = asked.accumulation, run.num_ranks
    known = [(0.0, "schedule_still"), (micro, "schedule_by_micro_batch"), (1 / micro, "schedule_too_long")]
    if ranks > 1:
        known[2:2] = [(ranks, "schedule_by_process"), (micro * ranks, "schedule_by_both")]
        known.append((1 / ranks, "schedule_of_process"))
    kinds = [kind for value, kind in known if abs(speed - value) <= thresholds.CLOSE * max(1.0, value)]
    return cause("schedule", *(kinds[:2] or ["schedule_speed"]), speed=speed)


def resume(run: Observation, limit: float) -> Cause | None:
    """Return what the checkpoint lost, judged by the step before and the gradients of the step after."""
    at, momentum = run.asked.resume_after, run.asked.momentum
    if not at or len(run.steps) <= at:
        return None
    before, step = run.steps[at - 1], run.steps[at]
    if np.abs(step.before - before.after).max() > thresholds.RESTORED:
        return cause("stale_parameters", "resume_parameters")
    used = [m.gradient / step.num_trained for m in step.microbatches if m.num_trained]
    found, residual, _ = recover_weights(step.direction, [*used, before.direction])
    weights, kept = found[:-1], float(found[-1])
    rate = float(np.median(weights))
    if residual > limit or np.ptp(weights) > 5 * thresholds.CLOSE * abs(rate):
        return None  # faults other than those of resuming
    forgotten = bool(momentum) and abs(kept) <= thresholds.CLOSE
    off = abs(rate - 1) > thresholds.CLOSE and (forgotten or abs(kept - rate * momentum) <= thresholds.CLOSE)
    anew = abs(rate * run.asked.rate(at) - run.asked.rate(0)) <= thresholds.CLOSE
    schedule = ("_schedule" if anew else "_rate") if off else ""
    if not forgotten and not off:
        return None
    code, kind = ("momentum_lost", "resume_momentum") if forgotten else ("schedule", "resume")
    return cause(code, kind + schedule, **({"rate": rate} if off and not anew else {}))


def data_coverage(run: Observation) -> Causes:
    """Return faults if rows are lost, repeated or regrouped. Each trained row must count once per epoch."""
    if any(not np.isfinite(s.after).all() for s in run.steps):
        return ()  # a change of NaN is not a step
    asked = run.asked
    seen = Counter(row for s in run.steps for m in s.microbatches for row in m.rows)
    trained = [i for i, row in enumerate(asked.rows) if row.num_trained]
    lost = sum(max(0, asked.epochs - seen[row]) for row in trained)
    twice = sum(max(0, seen[row] - asked.epochs) for row in trained)
    # Rows without a trained token: a framework may leave them out.
    never = sum(not seen[i] for i, row in enumerate(asked.rows) if not row.num_trained)
    found: list[Cause] = []
    lost_whole, sizes = False, None
    if not any(len(line) > 1 for s in run.steps for m in s.microbatches for line in m.lines):  # not packed
        # The busiest rank counts, because samplers may give the other ranks rows twice.
        sizes = [max(Counter(m.rank for m in s.microbatches for _ in m.rows).values()) for s in run.steps]
        filtered = _asked_sizes(run, len(asked.rows) - never)  # left out before rows were put into windows
        whole = _asked_sizes(run, len(asked.rows))
        if sizes != filtered and not _skipped(sizes, whole, never * asked.epochs):
            lost_whole = sizes == [n for n in filtered if n == asked.accumulation * asked.rows_per_microbatch]
            over = not lost and _over_end(sizes, filtered, asked.accumulation * asked.rows_per_microbatch)
            kind = "window_over_end" if over else "step_sizes"
            found.append(cause("grouping", kind, rows=sizes, asked=filtered))
    if lost:
        early = len(run.steps) < asked.steps and not any(seen[row] > asked.epochs for row in trained)
        early = early and sizes == filtered[: len(sizes)] if sizes is not None else False
        kind = "ends_early" if early else "rows_lost"
        about = cause("data_lost", kind, rows=lost, steps=len(run.steps), asked=asked.steps)
        if early:
            return (about,)
        found.insert(0 if lost_whole else len(found), about)
    # A sampler may repeat rows so that all ranks have the same number of batches.
    elif twice > (never - len(asked.rows)) % (run.num_ranks * asked.rows_per_microbatch) * asked.epochs:
        found.append(cause("data_lost", "rows_repeated", rows=twice))
    return tuple(found)


def _over_end(sizes: Sequence[int], asked: Sequence[int], window: int) -> bool:
    """Return whether windows run on over the end of an epoch, so that only the very last one may be short."""
    total = sum(asked)
    return sum(sizes) == total and all(n == window for n in sizes[:-1]) and len(sizes) == -(-total // window)


def _skipped(sizes: Sequence[int], asked: Sequence[int], untrained: int) -> bool:
    """Return whether the windows are as configured, except for skipped rows without trained tokens."""
    missing = [a - s for a, s in zip(asked, sizes, strict=False)]
    return len(sizes) == len(asked) and min(missing) >= 0 and sum(missing) <= untrained


def _asked_sizes(run: Observation, num_rows: int) -> list[int]:
    """Return each step's configured row count on the busiest rank. An epoch may end with a short step."""
    size = run.asked.rows_per_microbatch
    mine = min(num_rows, size * math.ceil(math.ceil(num_rows / size) / run.num_ranks))
    window = run.asked.accumulation * size
    whole, rest = divmod(mine, window)
    return ([window] * whole + ([rest] if rest else [])) * run.asked.epochs
