"""The order of several data sets: their shares at every step, their epochs, and the end of a stage."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from truestep.train.order import LONGEST, Order, Shares, window

WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (2.0, 1.0),
    (0.7, 0.3),
    (1.0, 2.0, 4.0),
    (0.1, 0.9),
    (1.0, 0.001),
    (3.0, 3.0, 1.5, 0.5),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_weight_is_a_share_of_all_places(weights: tuple[float, ...], size: int) -> None:
    shares, seen = Shares(weights, size), Counter[int]()
    for step in range(60):
        assert [shares.before(step, k) for k in range(len(weights))] == [seen[k] for k in range(len(weights))]
        places = shares.of_step(step)
        assert len(places) == size
        seen.update(places)
        for k, weight in enumerate(weights):
            assert abs(seen[k] - (step + 1) * size * weight / sum(weights)) < 1
            assert places.count(k) <= shares.most(k)


@pytest.mark.parametrize("weights", WEIGHTS[1:])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_stage_ends_when_the_named_set_was_seen(weights: tuple[float, ...], count: int) -> None:
    shares = Shares(weights, 5)
    for k in range(len(weights)):
        steps = shares.steps_until(k, count)
        assert shares.before(steps, k) >= count
        assert shares.before(steps - 1, k) < count


def test_every_set_has_separate_epochs() -> None:
    """Until a row of a set comes again, all others of the set were seen; the rows of a step are spread over it."""
    sets = [[f"a{i}" for i in range(7)], [f"b{i}" for i in range(4)]]
    order = Order(sets, (2.0, 1.0), ("a", "b"))
    seen = [item for step in range(21) for item in order.at(step, 6, seed=3)]
    for rows in sets:
        own = [item for item in seen if item in rows]
        assert len(own) == len(seen) * (2 if "a0" in rows else 1) // 3
        for start in range(0, len(own) - len(rows) + 1, len(rows)):
            assert set(own[start : start + len(rows)]) == set(rows)
    own = [item for item in seen if item[0] == "a"]
    assert own[:7] != own[7:14]
    assert [item[0] for item in order.at(0, 6, seed=3)] == ["a", "b", "a", "a", "b", "a"]


def test_the_order_of_a_set_depends_only_on_its_name_and_the_seed() -> None:
    sets = [list(range(5)), list(range(100, 105)), list(range(200, 205))]
    two, three = Order(sets[:2], (1.0, 1.0), ("a", "b")), Order(sets, (1.0, 1.0, 1.0), ("a", "b", "c"))

    def of(order: Order[int], most: int, seed: int) -> list[int]:
        return [x for step in range(30) for x in order.at(step, 3, seed) if x < most][:20]

    assert of(two, 100, 1) == of(three, 100, 1) != of(two, 100, 2)


def test_one_set_is_ordered_as_before() -> None:
    items = list(range(10))
    for step in range(4):
        assert Order([items]).at(step, 3, 5, limit=11) == window(items, step, 3, 5, 11)
        assert Order([items]).at(step, 3, 5, item="stream") == window(items, step, 3, 5, item="stream")


@pytest.mark.parametrize("weights", [w for w in WEIGHTS if len(w) > 1])
def test_the_largest_debt_is_paid_first(weights: tuple[float, ...]) -> None:
    """The definition, place by place, with exact fractions."""
    exact = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    owed, shares = [Fraction(0)] * len(exact), Shares(weights, 3)
    for step in range(50):
        places = []
        for _ in range(3):
            owed = [debt + share for debt, share in zip(owed, exact, strict=True)]
            largest = max(range(len(owed)), key=lambda k: owed[k])
            owed[largest] -= 1
            places.append(largest)
        assert shares.of_step(step) == places


@pytest.mark.parametrize("weights", [(1 / 3, 1.0), (0.123456789, 0.7, 2.0), (1e-9, 1.0), (1e-9, 1e-9, 1.0)])
def test_weights_with_many_digits_are_rounded(weights: tuple[float, ...]) -> None:
    """They repeat after at most LONGEST places, and no set is left out."""
    shares, size = Shares(weights, 7), 7
    steps = LONGEST
    had = [shares.before(steps, k) for k in range(len(weights))]
    assert sum(had) == steps * size
    for k, weight in enumerate(weights):
        assert abs(had[k] / (steps * size) - weight / sum(weights)) <= (len(weights)) / LONGEST
        assert had[k] > 0
        assert 0 < shares.most(k) <= size
        assert shares.before(shares.steps_until(k, 3), k) >= 3
