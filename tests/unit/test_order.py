"""The order of several data sets: their shares at every step, their epochs, and the end of a stage."""

from __future__ import annotations

from collections import Counter

import pytest

from truestep.train.order import Order, Shares, window

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


def test_every_set_has_epochs_of_its_own() -> None:
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
