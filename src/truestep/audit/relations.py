"""What was asked of a step besides its gradient, and what became of it: the clip, the learning rate, a
resume.

A right step is known exactly (observe.Step: clip scale, asked rate, carried momentum), so that one that is
the same however its batch is split or sharded needs no second run to be compared with. Here deviations get
their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from truestep.audit.causes import Cause
from truestep.audit.observe import Observation, Step
from truestep.faults import recover_weights

Scales = Sequence[float | None]  # of each step that weights explain: the constant on top of them
Named = Mapping[int, Cause]  # step → what it really was
CLOSE = 0.01  # relative
ALIKE = 1e-6  # parameters before and after a checkpoint


def used_length(step: Step) -> float:
    """‖gradient‖ that the step used."""
    return float(np.linalg.norm(step.direction - step.carried))


def reaches_clip(step: Step) -> bool:
    """Whether the used gradient is exactly as long as it was asked to be at most."""
    return (
        bool(step.max_grad_norm) and abs(used_length(step) - step.max_grad_norm) <= CLOSE * step.max_grad_norm
    )


def clip(run: Observation, scaled: Sequence[int]) -> Named:
    """Steps that only a constant separates from right ones: clipped unasked, otherwise than asked, or not at
    all."""
    lengths = [used_length(run.steps[i]) for i in scaled]
    wanted = [float(np.linalg.norm(run.steps[i].expected)) for i in scaled]
    asked = run.asked.max_grad_norm
    if len(scaled) < 2 or np.ptp(wanted) < CLOSE * max(wanted):
        return {}
    if asked and np.allclose(lengths, wanted, rtol=CLOSE):
        text = f"the gradient is not clipped, a norm of {asked:.3g} was asked for"
    elif np.ptp(lengths) <= CLOSE * max(lengths):
        text = f"the gradient is clipped to a norm of {lengths[0]:.3g}"
        text += f", asked for was {asked:.3g}" if asked else ""
    else:
        return {}
    return dict.fromkeys(scaled, ("clip", text))


def clip_of_parts(step: Step, accumulation: int) -> Cause | None:
    """A clip of micro-batches, of what had been added up after each of them, or of ranks: whose prediction
    the step is.

    A part may have been as long as it is in the mean over the step, or longer by the steps or the ranks that
    it is divided by afterwards; the constant that is left of this is free.
    """
    used = step.direction - step.carried
    ranks = sorted({m.rank for m in step.microbatches})
    parts = [[m.gradient / step.num_trained for m in step.microbatches if m.rank == rank] for rank in ranks]
    found: list[tuple[float, str]] = []
    for name, predict in (
        ("every micro-batch's gradient is clipped by its own norm", _each),
        ("the gradient is clipped after every micro-batch", _running),
        ("every rank's gradient is clipped by its own norm", _ranks),
    ):
        for limit in dict.fromkeys(step.max_grad_norm / n for n in (1, accumulation, len(ranks))):
            wanted = predict(parts, limit)
            scale = float(used @ wanted) / float(wanted @ wanted)
            found.append((float(np.linalg.norm(used - scale * wanted) / np.linalg.norm(used)), name))
    missed, name = min(found)
    return ("clip", name) if missed <= CLOSE / 2 else None


Parts = Sequence[Sequence[np.ndarray]]  # rank, micro-batch: P


def _short(gradient: np.ndarray, limit: float) -> np.ndarray:
    return np.asarray(gradient * min(1.0, limit / max(1e-12, float(np.linalg.norm(gradient)))))


def _each(parts: Parts, limit: float) -> np.ndarray:
    return np.sum([_short(g, limit) for rank in parts for g in rank], axis=0)


def _running(parts: Parts, limit: float) -> np.ndarray:
    total = np.zeros_like(parts[0][0])
    for rank in parts:
        buffer = np.zeros_like(total)
        for gradient in rank:
            buffer = _short(buffer + gradient, limit)
        total += buffer
    return total


def _ranks(parts: Parts, limit: float) -> np.ndarray:
    return np.sum([_short(np.sum(rank, axis=0), limit) for rank in parts], axis=0)


def schedule(run: Observation, scales: Scales) -> Named:
    """Learning rates that follow another line than the one that was asked for."""
    asked, until = run.asked, run.asked.resume_after or len(scales)
    rates = [asked.rate(i) * scale for i, scale in enumerate(scales[:until]) if scale is not None]
    if not asked.decay or len(rates) < 2 or len(rates) != min(until, len(scales)):
        return {}
    right = [asked.rate(i) for i in range(len(rates))]
    early = [asked.rate(i + 1) for i in range(len(rates))]
    speed = asked.steps * (1 - rates[1] / rates[0])  # ticks a step
    if np.allclose(np.array(rates) / rates[0], right, atol=CLOSE):
        return {}
    if np.allclose(rates, early, atol=CLOSE):
        text = "the schedule is one step ahead"
    elif np.allclose(
        rates, [rates[0] * max(0.0, 1 - speed * i / asked.steps) for i in range(len(rates))], atol=CLOSE
    ):
        text = _speed(run, speed)
    else:
        text = f"the learning rates are {', '.join(f'{r:.3g}' for r in rates)} of the first, asked for were "
        text += ", ".join(f"{r:.3g}" for r in right)
    return dict.fromkeys(range(len(scales)), ("schedule", text))


def _speed(run: Observation, speed: float) -> str:
    micro = run.asked.accumulation
    ranks = 1 + max(m.rank for s in run.steps for m in s.microbatches)
    known = (
        (0, "the learning rate stays what it is: the schedule is not stepped"),
        (micro, "the schedule is stepped at every micro-batch"),
        (ranks, "the schedule is stepped once for every process"),
        (micro * ranks, "the schedule is stepped at every micro-batch of every process"),
        (1 / micro, "the schedule is as long as if every micro-batch were a step"),
        (1 / ranks, "the schedule is as long as if every process had steps of its own"),
    )
    fitting = [
        text
        for value, text in known
        if abs(speed - value) <= CLOSE * max(1.0, value) and (ranks > 1 or "process" not in text)
    ]
    return " or ".join(dict.fromkeys(fitting[:2])) or f"the schedule advances by {speed:.3g} steps a step"


def resume(run: Observation, limit: float) -> Cause | None:
    """What did not survive the checkpoint; of the first step after it, from its gradients and the step
    before."""
    at = run.asked.resume_after
    if not at or len(run.steps) <= at:
        return None
    before, step = run.steps[at - 1], run.steps[at]
    if np.abs(step.before - before.after).max() > ALIKE:
        return "stale_parameters", "the parameters after the resume are not those that were saved"
    used = [m.gradient / step.num_trained for m in step.microbatches if m.num_trained]
    found, residual, _ = recover_weights(step.direction, [*used, before.direction])
    weights, kept = found[:-1], float(found[-1])
    rate = float(np.median(weights))
    if residual > limit or np.ptp(weights) > 5 * CLOSE * abs(rate):
        return None  # other faults than those of a resume
    texts: list[Cause] = []
    if abs(kept) <= CLOSE and run.asked.momentum:
        texts.append(("momentum_lost", "the optimizer's momentum is lost"))
    if abs(rate - 1) > CLOSE and (texts or abs(kept - rate * run.asked.momentum) <= CLOSE):
        anew = abs(rate * run.asked.rate(at) - run.asked.rate(0)) <= CLOSE
        words = (
            "the schedule starts anew"
            if anew
            else f"the learning rate is {rate:.3g} times what was asked for"
        )
        texts.append(("schedule", words))
    return (texts[0][0], f"after the resume {' and '.join(text for _, text in texts)}") if texts else None
