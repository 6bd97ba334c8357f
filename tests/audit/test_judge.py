"""The judge against single laws; against whole trainers see test_judge_mutants.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from truestep import faults
from truestep.audit.measure.cases import Case, Row
from truestep.audit.measure.observations import MicroBatch, Observation, Step
from truestep.audit.measure.one_case import see_case
from truestep.audit.measure.patterns import fit_pattern, hides_weights
from truestep.audit.measure.weights import Recovered
from truestep.audit.present.words import sentence


def recovered(weights: np.ndarray, counts: list[list[int]]) -> Recovered:
    return Recovered(
        weights=weights,
        errors=np.full(len(weights), 1e-6),
        residual=1e-6,
        condition=1.0,
        relative_error=1.0,
        noise=1e-6,
        counts=tuple(map(tuple, counts)),
        empty=(),
    )


@pytest.mark.parametrize("name", [n for n in faults.FAULTS if n != "right"])
@pytest.mark.parametrize(
    "counts", [[[2, 27, 3, 17]], [[2, 27, 3, 17], [40, 5, 22, 9]]], ids=["1 rank", "2 ranks"]
)
def test_every_catalogued_fault_has_words(name: str, counts: list[list[int]]) -> None:
    weights = faults.FAULTS[name][0](counts)
    if np.allclose(weights, 1):
        pytest.skip("on one rank this is no fault")
    pattern = fit_pattern(recovered(weights, counts), "float32")
    assert pattern is not None
    assert pattern.causes
    assert all(map(sentence, pattern.causes))


def test_weights_that_obey_no_law_have_no_pattern() -> None:
    assert fit_pattern(recovered(np.array([1.0, 0.3, 1.7, 0.9]), [[2, 27, 3, 17]]), "float32") is None


def test_a_weight_that_noise_hides_is_no_sign_of_a_drop() -> None:
    """Clipped steps in bfloat16 are read back with such errors: 1 ± 1.9 is not told from zero."""
    noisy = replace(
        recovered(np.array([1.0, 1.01, 0.99, 1.0]), [[9, 2, 7, 5]]), errors=np.array([0.38, 0.1, 0.3, 0.1])
    )
    pattern = fit_pattern(noisy, "bfloat16")
    assert pattern is not None
    assert pattern.causes == ()
    hidden = fit_pattern(
        replace(noisy, errors=np.full(4, 0.5)), "bfloat16"
    )  # not one of them is told from zero
    assert hidden is not None
    assert hidden.causes == ()
    assert hides_weights(noisy)
    doubled = fit_pattern(
        replace(noisy, weights=2 * noisy.weights, errors=np.array([0.38, 0.01, 0.01, 0.01])), "bfloat16"
    )
    assert doubled is not None
    assert doubled.scale == pytest.approx(
        2.0, rel=0.02
    )  # one noisy weight does not hide what the others show
    dropped = fit_pattern(replace(noisy, weights=np.array([1.0, 0.0, 1.0, 1.0])), "bfloat16")
    assert dropped is not None
    assert dropped.causes[0].code == "kept"


@pytest.mark.parametrize("scale", [1.5, 0.25, 4.0, 7.0])
def test_a_constant_is_recovered(scale: float) -> None:
    pattern = fit_pattern(recovered(scale * np.ones(4), [[2, 27, 3, 17]]), "float32")
    assert pattern is not None
    assert pattern.scale == pytest.approx(scale)
    assert ("accumulation_factor" in [c.code for c in pattern.causes]) == (scale in (4.0, 0.25))


def seen_rows(
    rank_rows: list[list[int]], untrained: tuple[int, ...], num_rows: int, after: int = 0
) -> tuple[str, ...]:
    """The codes of a right step over one row a micro-batch, these on each rank, of so many rows that were
    asked for. ``after``: forward passes behind it."""
    draw = np.random.default_rng(0)
    gradients = {row: np.zeros(50) if row in untrained else draw.normal(size=50) for row in range(num_rows)}
    batches = tuple(
        MicroBatch(
            rank=rank,
            index=index,
            lines=((row,),),
            row_counts=(0 if row in untrained else row + 1,),
            row_gradients=(gradients[row],),
            loss_sum=1.0,
            size=50,
        )
        for rank, rows in enumerate(rank_rows)
        for index, row in enumerate(rows)
    )
    total = np.sum([m.gradient for m in batches], axis=0)
    used = total / sum(m.num_trained for m in batches)
    step = Step(
        before=np.zeros(50), after=-used, learning_rate=1.0, microbatches=batches, control=total, extras={}
    )
    rows = tuple(Row(ids=(3, 4), trained=(0, int(row not in untrained))) for row in range(num_rows))
    asked = Case(name="made up", rows=rows, accumulation=9, steps=1)
    run = Observation(asked=asked, steps=(step,), forwards_without_step=after)
    return see_case(run, "float32").differences.codes


def test_rows_may_be_left_out_if_nothing_of_them_is_trained() -> None:
    assert seen_rows([[0, 1, 2]], (3,), 4) == ()
    assert seen_rows([[0, 1, 2, 3]], (3,), 4) == ()
    assert "data_lost" in seen_rows([[0, 1, 2]], (), 4)


def test_a_forward_pass_after_the_last_step_loses_no_row() -> None:
    assert seen_rows([[0, 1, 2]], (), 3, after=1) == ()
    assert "data_lost" in seen_rows([[0, 1]], (), 3, after=1)


def test_ranks_may_be_evened_out_by_a_repeated_row_and_only_then() -> None:
    assert seen_rows([[0, 2, 4], [1, 3, 0]], (), 5) == ()
    assert "data_lost" in seen_rows([[0, 2, 4, 0], [1, 3, 5, 1]], (), 6)
