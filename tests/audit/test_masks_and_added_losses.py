"""A step that is right for other trained tokens, or that has a part of another loss, is named and still weighed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_thresholds import COUNTS, ELSEWHERE, GRADIENTS, step

from truestep.audit.measure.one_step import MASKS, see
from truestep.audit.measure.recorder import other_masks

TOTAL = sum(COUNTS)
# Under another mask, every row has a gradient of its own and one token more or less.
MOVED = GRADIENTS + np.random.default_rng(1).normal(size=GRADIENTS.shape)
OTHER = tuple(
    replace(m, row_gradients=(g,), row_counts=(n + 1,))
    for m, g, n in zip(step().microbatches, MOVED, COUNTS, strict=True)
)
ROW = {"ids": [5, 6, 7, 8, 9, 10], "trained": [0, 0, 1, 1, 1, 0]}


def masked(weights: np.ndarray | float, name: str = "early") -> tuple[str, ...]:
    used = (MOVED * np.reshape(weights, (-1, 1))).sum(0) / (TOTAL + len(COUNTS))
    return see(step(used, masks={name: OTHER}), None, "float32").codes


@pytest.mark.parametrize("name", MASKS)
def test_the_tokens_of_another_mask_are_named(name: str) -> None:
    assert masked(np.ones(4), name) == (MASKS[name][0],)


def test_weights_are_judged_as_if_the_other_mask_had_been_asked_for() -> None:
    counts = np.array(COUNTS) + 1
    assert masked(counts.sum() / (4 * counts)) == ("mask_shifted", "micro_mean")
    assert masked(np.array([1.0, 0.0, 0.0, 1.0])) == ("mask_shifted", "kept")


def test_a_step_that_no_mask_explains_stays_unexplained() -> None:
    used = MOVED.sum(0) / (TOTAL + len(COUNTS)) + 0.1 * ELSEWHERE
    assert see(step(used, masks={"early": OTHER}), None, "float32").codes == ("unexplained",)


def test_the_mask_that_explains_most_is_named() -> None:
    close = tuple(replace(m, row_gradients=(m.row_gradients[0] + 1e-3,)) for m in OTHER)
    used = MOVED.sum(0) / (TOTAL + len(COUNTS))
    seen = see(step(used, masks={"late": close, "all": OTHER}), None, "float32")
    assert seen.codes[0] == "prompt_trained"


def test_the_error_is_against_what_was_asked_for() -> None:
    seen = see(step(MOVED.sum(0) / (TOTAL + len(COUNTS)), masks={"early": OTHER}), None, "float32")
    assert seen.recovered is not None
    assert seen.recovered.relative_error > 0.01
    assert seen.recovered.residual < 1e-6
    assert seen.recovered.weights == pytest.approx(np.ones(4), abs=1e-6)


def test_other_masks_are_these() -> None:
    found = other_masks(ROW)
    assert {name: row["trained"] for name, row in found.items()} == {
        "early": [0, 1, 1, 1, 0, 0],
        "late": [0, 0, 0, 1, 1, 1, 0],
        "all": [1, 1, 1, 1, 1, 1],
        "endless": [0, 0, 1, 1, 0, 0],
        "headless": [0, 0, 0, 1, 1, 0],
        "begun": [0, 1, 1, 1, 1, 0],
        "around": [*ROW["trained"], ROW["trained"][0]],
    }
    assert set(found) == set(MASKS)
    assert found["late"]["ids"] == [*ROW["ids"], 0]
    assert found["around"]["ids"] == [*ROW["ids"], ROW["ids"][0]]


@pytest.mark.parametrize("times", [0.0, 1.0, 4.0])
def test_an_added_loss_is_counted_and_leaves_the_weights(times: float) -> None:
    right, part = GRADIENTS.sum(0) / TOTAL, 0.3 * ELSEWHERE
    seen = see(step(right + times * part, carried=part, added=part), None, "float32")
    assert seen.recovered is not None
    assert seen.recovered.weights == pytest.approx(np.ones(4), abs=1e-6)
    assert seen.codes == (() if times == 1.0 else ("auxiliary_loss",))
    if times != 1.0:
        assert seen.causes[0].values["coefficient"] == pytest.approx(times - 1)
