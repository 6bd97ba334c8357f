"""Statistics of a step: exact, whatever the micro-batches and ranks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from table_cases import sequences

from truestep.objective.methods.row import ALL, EXPERT, Statistic
from truestep.records import Origin, TokenBatch
from truestep.train.packing import pack
from truestep.train.parallel import Ranks
from truestep.train.statistics import measure


def batches(limit: int, seed: int = 0) -> list[TokenBatch]:
    """Entropies that are a function of the token alone, so that every cut has the same ones."""
    packed = pack(sequences(seed), tokens_per_microbatch=limit, dtype=torch.float64)
    return [
        replace(
            b,
            proximal_entropy=torch.sin(b.target_ids.double() + 10 * b.sequence_index),
            proximal_logprobs=b.weight,
        )
        for b in packed
    ]


def statistic(reduce: str, level: float = 0.0) -> Statistic:
    return Statistic(
        name="x", select=ALL, values=lambda c: c.batch.proximal_entropy, reduce=reduce, level=level
    )


def everything(found: Sequence[TokenBatch]) -> np.ndarray:
    return np.sort(torch.cat([b.proximal_entropy for b in found]).numpy())


@pytest.mark.parametrize("limit", [40, 10_000])
def test_moments(limit: int) -> None:
    made = batches(limit)
    values = everything(made)
    for reduce, expected in (("mean", values.mean()), ("std", values.std(ddof=1))):
        assert measure([statistic(reduce)], made, 0, Ranks())["x"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 0.8, 0.999])
def test_a_quantile_is_a_value_that_occurs(level: float) -> None:
    values = everything(batches(10_000))
    for limit in (40, 70, 10_000):
        found = measure([statistic("quantile", level)], batches(limit), 0, Ranks())["x"]
        assert found == values[int(level * len(values))]
        assert (values >= found).sum() >= len(values) - int(level * len(values))
    assert values.min() < 0 < values.max()


def test_no_token_no_statistic() -> None:
    only = Statistic(name="x", select=EXPERT, values=lambda c: c.entropy, reduce="mean")
    own = [replace(b, origin=torch.full_like(b.origin, int(Origin.POLICY))) for b in batches(10_000)]
    assert measure([only], own, 0, Ranks()) == {}
    assert measure([only], [], 0, Ranks()) == {}
