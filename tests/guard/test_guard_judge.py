"""The judgement of a step from numbers alone: many ranks, many micro-batches, and the limits on both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from truestep.guard.judge import Judged, judge
from truestep.guard.options import Declared
from truestep.guard.ranks import MicroSeen, RankSeen, pack, unpack
from truestep.guard.solve import RESIDUAL, TOLERANCE
from truestep.guard.tokens import Tokens

MODULES = np.repeat(np.arange(6), 32)
ROWS = len(MODULES)
TOKENS = Tokens(
    trained=10, negative=0, weight=1.0, token_spread=0.0, spread=0.0, sequence_spread=0.0, form=0.0, shift=1, outside=0, missing=0,
    missing_ends=0, slots=20, stops=0, stops_trained=0,
)  # fmt: skip


def step_of(
    weights: np.ndarray,
    *,
    noise: float = 1e-7,
    seed: int = 0,
    counts: np.ndarray | None = None,
    share: float = 1.0,
) -> list[RankSeen]:
    """Return what the ranks of weights [D, K] see: random columns, and a target with this relative noise."""
    random = np.random.default_rng(seed)
    columns = random.normal(size=(*weights.shape, ROWS)) + random.normal(size=ROWS)
    target = (weights[..., None] * columns).sum((0, 1))
    target += noise * np.linalg.norm(target) / np.sqrt(ROWS) * random.normal(size=ROWS)
    counts = np.full(weights.shape, 10) if counts is None else counts
    marks = random.integers(1, 2**40, weights.shape)
    unread = np.full(ROWS, np.nan)
    each = 1 / counts.sum()
    return [
        RankSeen(
            failed=False, is_narrow=False, target=target, previous=unread,
            micro=tuple(
                MicroSeen(column=columns[r, k], mark=int(marks[r, k]),
                          tokens=replace(TOKENS, trained=int(counts[r, k]), weight=each))
                for k in range(weights.shape[1])
            ),
        )
        for r in range(len(weights))
    ]  # fmt: skip


def judged(weights: np.ndarray, **how: float) -> Judged:
    return judge(step_of(weights, **how), MODULES, Declared())


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (8, 16), (64, 8), (2, 200)])
def test_right_steps_of_any_size(shape: tuple[int, int]) -> None:
    found = judged(np.ones(shape))
    assert found.verdict == "RIGHT", found.causes
    assert [len(rank) for rank in found.weights] == [shape[1]] * shape[0]
    assert np.allclose(np.array(found.weights), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (2, 8), (8, 16), (64, 8)])
def test_a_dropped_place_is_named_at_any_size(shape: tuple[int, int]) -> None:
    weights = np.ones(shape)
    weights[:, 1:-1] = 0
    found = judged(weights)
    assert [c.kinds for c in found.causes] == [("kept_first_and_last",)]


def test_a_dropped_rank_is_named_among_many() -> None:
    weights = np.ones((16, 16))
    weights[5] = 0
    found = judged(weights)
    assert [c.code for c in found.causes] == ["kept"]
    assert found.causes[0].values["dropped"] == {"5": list(range(1, 17))}


def test_a_pattern_that_no_group_explains_is_unexplained() -> None:
    weights = np.ones((16, 16))
    weights[5, 3] = weights[7, 9] = 0
    assert [c.code for c in judged(weights).causes] == ["unexplained"]


@pytest.mark.parametrize(
    ("off", "is_fault"), [(0.5 * TOLERANCE["float32"], False), (2 * TOLERANCE["float32"], True)]
)
def test_the_tolerance_of_a_weight(off: float, is_fault: bool) -> None:
    assert (judged(np.array([[1.0, 1.0, 1.0, 1 + off]])).verdict == "FAULT") == is_fault


@pytest.mark.parametrize(
    ("noise", "is_fault"), [(RESIDUAL["float32"] / 2, False), (RESIDUAL["float32"] * 2, True)]
)
def test_the_limit_of_the_residual(noise: float, is_fault: bool) -> None:
    assert (judged(np.ones((1, 4)), noise=noise).verdict == "FAULT") == is_fault


def test_a_read_back_noise_raises_the_limit() -> None:
    ranks = step_of(np.ones((1, 4)), noise=0.01)
    assert judge(ranks, MODULES, Declared()).verdict == "FAULT"
    assert judge([replace(r, noise=0.01) for r in ranks], MODULES, Declared()).verdict == "RIGHT"


def test_nothing_to_see() -> None:
    ranks = step_of(np.ones((1, 4)))
    unread = [replace(r, target=np.full(ROWS, np.nan)) for r in ranks]
    assert judge(unread, MODULES, Declared()).verdict == "NOT OBSERVABLE"
    assert judge([replace(r, micro=()) for r in ranks], MODULES, Declared()).verdict == "NOT OBSERVABLE"


def test_packing_keeps_every_number() -> None:
    ranks = step_of(np.ones((2, 3)))
    full = replace(
        ranks[0], failed=True, is_narrow=True, replicated=2**48 - 1, still=tuple(i % 3 == 0 for i in range(101)),
        wrong_update=True, norm=0.25, noise=1e-3,
        micro=(*ranks[0].micro, replace(ranks[0].micro[0], tokens=None)),
    )  # fmt: skip
    back = unpack(np.concatenate([pack(full), np.zeros(7)]))
    for name in ("failed", "is_narrow", "replicated", "still", "wrong_update", "norm", "noise"):
        assert getattr(back, name) == getattr(full, name), name
    assert np.array_equal(back.target, full.target)
    assert [m.tokens for m in back.micro] == [m.tokens for m in full.micro]
    assert [m.mark for m in back.micro] == [m.mark for m in full.micro]
