"""Schedules, as pure functions of the step (0-based)."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    return lambda step: value


def cosine(start: float, end: float, num_steps: int) -> Schedule:
    """Return end + (start − end)·½(1 + cos(π·min(step, T)/T)). Used by Prefix-RFT, UFT and CHORD."""
    return lambda step: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step, num_steps) / num_steps))


def warmed_cosine(*, valley: float, peak: float, warmup_steps: int, decay_steps: int) -> Schedule:
    """Return a schedule that rises linearly from 0 to the peak, falls as a cosine to the valley and stays
    there. Source: CHORD's μ (arXiv:2508.11408)."""
    decay = cosine(peak, valley, decay_steps)
    return lambda step: peak * step / warmup_steps if step < warmup_steps else decay(step - warmup_steps)


def learning_rate(
    *,
    peak: float,
    kind: str,
    total_steps: int,
    warmup_fraction: float,
    min_ratio: float,
    decay_fraction: float = 0.1,
) -> Schedule:
    """Return a linear warm-up over W = ⌈fraction·T⌉ steps from peak/W, then a constant, a cosine or a line.

    Cosine and line begin after the warm-up and reach min_ratio·peak at step T. With "wsd" (warm-up, stable, decay),
    the peak is kept until the last D = ⌈decay_fraction·T⌉ steps, and the line begins there.
    Source: WSD is MiniCPM's (arXiv:2404.06395), with SmolLM2's linear decay (arXiv:2502.02737); the others are arXiv:2604.23747's,
    app. A (SFT: cosine, 10 % warm-up, floor 0.1; RL: constant)."""
    warmup = math.ceil(warmup_fraction * total_steps)
    begin = max(warmup, total_steps - math.ceil(decay_fraction * total_steps)) if kind == "wsd" else warmup

    def at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        if kind == "constant":
            return peak
        done = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
        left = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
        return peak * (min_ratio + (1 - min_ratio) * left)

    return at
