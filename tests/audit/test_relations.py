"""Updates of the same rows are compared; their limit follows the measured noise, on both of its sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_thresholds import ELSEWHERE, RIGHT, run, step

from truestep.audit.measure.cases import SAME_ROWS, Row, build
from truestep.audit.measure.relations import compare


@pytest.mark.parametrize(("noise", "limit"), [(0.0, 1e-4), (1e-4, 2e-3)])
def test_a_difference_is_judged_by_the_noise_of_both(noise: float, limit: float) -> None:
    for share, equal in ((0.7, True), (1.4, False)):
        other = step(RIGHT + share * limit * ELSEWHERE, noise=noise)
        found = compare({"ragged": run(step(noise=noise)), "unsplit": run(other)}, "float32")
        assert found["unsplit"].equal is equal
        assert found["unsplit"].difference == pytest.approx(share * limit, rel=0.1)


def test_any_objective_may_be_compared() -> None:
    strange = np.random.default_rng(3).normal(size=RIGHT.shape)
    found = compare({"ragged": run(step(strange)), "padded": run(step(strange))}, "float32")
    assert found["padded"].equal
    assert found["padded"].difference == 0


def test_steps_on_other_rows_are_not_compared() -> None:
    shuffled = run(step(2 * RIGHT))
    others = tuple(replace(row, ids=(3, 5)) for row in shuffled.asked.rows)
    other = replace(shuffled, asked=replace(shuffled.asked, rows=others))
    assert compare({"ragged": run(step()), "unsplit": other}, "float32") == {}
    assert not compare({"ragged": run(step()), "unsplit": shuffled}, "float32")["unsplit"].equal


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("accumulation", [3, 4])
def test_cases_with_the_same_rows_have_them_in_every_step(world_size: int, accumulation: int) -> None:
    def steps(name: str) -> list[set[Row]]:
        case = build(name, world_size=world_size, accumulation=accumulation)
        size = world_size * case.accumulation * case.rows_per_microbatch
        return [set(case.rows[at : at + size]) for at in range(0, len(case.rows), size)]

    for case, base in SAME_ROWS.items():
        assert steps(case) == steps(base)[: len(steps(case))]
        assert steps(case)
