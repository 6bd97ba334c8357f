"""The names that the judge gives to a schedule's speed, and to wrong weights in a step that reaches its clip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_thresholds import COUNTS, GRADIENTS, run, step

from truestep.audit.measure.one_case import schedule
from truestep.audit.measure.one_step import see
from truestep.audit.measure.patterns import _clipped_sums
from truestep.audit.measure.weights import EPS

MICRO, STEPS = 4, 40


def named(speed: float, ranks: int) -> tuple[str, ...]:
    """The names for a linear decay that runs this many ticks per step, on this many processes."""
    batches = tuple(replace(m, rank=m.index % ranks) for m in step().microbatches)
    made = run(*[replace(step(), microbatches=batches)] * 3, accumulation=MICRO, steps=STEPS, decay=True)
    found = schedule(made, [(1 - speed * i / STEPS) / made.asked.rate(i) for i in range(3)])
    return () if found is None else found.kinds


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_speed_of_a_schedule_has_its_name(ranks: int) -> None:
    alone = {0.0: "schedule_still", MICRO: "schedule_by_micro_batch", 1 / MICRO: "schedule_too_long"}
    several = {
        ranks: "schedule_by_process",
        MICRO * ranks: "schedule_by_both",
        1 / ranks: "schedule_of_process",
    }
    speeds = alone | (several if ranks > 1 else {})
    assert {speed: named(speed, ranks) for speed in speeds} == {s: (kind,) for s, kind in speeds.items()}
    assert named(1.0, ranks) == ()
    assert named(1.7, ranks) == ("schedule_speed",)


def test_a_clip_explains_the_constant_and_not_the_weights() -> None:
    """With two of four micro-batches dropped, the clip decides the length of what is left."""
    left = 0.3 * (GRADIENTS[0] + GRADIENTS[3]) / sum(COUNTS)
    codes = [c.code for c in see(step(left), None, "float64").causes]
    assert codes == ["kept", "scale"]
    clipped = step(left, max_grad_norm=float(np.linalg.norm(left)))
    assert [c.code for c in see(clipped, None, "float64").causes] == ["kept"]


def test_rounding_units_are_half_of_each_types_epsilon() -> None:
    torch = pytest.importorskip("torch")
    assert {name: torch.finfo(getattr(torch, name)).eps / 2 for name in EPS} == EPS


@pytest.mark.parametrize(("num", "named"), [(3, False), (4, True)])
def test_two_equal_norms_are_no_clip_after_every_micro_batch(num: int, named: bool) -> None:
    """Three micro-batches have two sums, whose norms may be equal by chance."""
    batches = tuple(replace(m, index=i) for i, m in enumerate([*step().microbatches][:num]))
    parts = [m.gradient for m in batches]
    sums = parts[0]
    for part in parts[1:]:
        sums = sums + part
        sums = sums / np.linalg.norm(sums)
    weights = np.linalg.lstsq(np.stack(parts, axis=1), sums, rcond=None)[0]
    assert _clipped_sums(batches, weights) is named
    assert not _clipped_sums(batches, weights * np.linspace(1.0, 1.1, num))
