"""Statistics of a whole step, over the tokens of all its updates on all ranks, never over one micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from truestep.objective.coefficients import Context
from truestep.objective.methods.row import Statistic
from truestep.records import TokenBatch
from truestep.train.parallel import Ranks

PARTS = 16  # a search divides its range into this many parts at a time


def measure(
    statistics: Sequence[Statistic], batches: Sequence[TokenBatch], step: int, ranks: Ranks
) -> dict[str, float]:
    """Compute every statistic by name, except those that select no token on any rank. It is called before the
    first update, when the policy is still the proximal policy, so its log-probabilities are in the batches.
    Held by: tests/numerics/test_statistics.py"""
    found = {}
    for statistic in statistics:
        parts = [_values(statistic, batch, step) for batch in batches]
        values = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        total, count = ranks.sum([float(values.sum()), float(values.numel())])
        if count == 0:
            continue
        mean = total / count
        if statistic.reduce == "mean":
            found[statistic.name] = mean
        elif statistic.reduce == "std":
            squares = ranks.sum([float(((values - mean) ** 2).sum())])[0]
            found[statistic.name] = math.sqrt(squares / max(1.0, count - 1))
        else:
            # The smallest value with ⌊level·n⌋ values below it: the share above is rounded up.
            number = min(int(count) - 1, math.floor(statistic.level * count))
            found[statistic.name] = _ranked(values, number, ranks)
    return found


def _values(statistic: Statistic, batch: TokenBatch, step: int) -> Tensor:
    logprobs, entropy = batch.proximal_logprobs, batch.proximal_entropy
    assert logprobs is not None
    assert entropy is not None
    context = Context(
        policy_logprobs=logprobs, proximal_logprobs=logprobs, entropy=entropy, batch=batch, step=step
    )
    return statistic.values(context)[statistic.select(batch)].double()


def _ranked(values: Tensor, number: int, ranks: Ranks) -> float:
    """Return the exact value that has ``number`` values before it when the values of all ranks are sorted.

    The search over the ordered float64 numbers takes 16 sums of 16 counts; no values move between ranks."""
    bits = values.contiguous().view(torch.int64)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)  # integers in the same order as the numbers
    low, high = -(1 << 63), (1 << 63) - 1
    while low < high:
        edges = [low + (high - low) * part // PARTS for part in range(PARTS)]
        counts = ranks.sum([float((keys <= edge).sum()) for edge in edges])
        part = next((i for i, count in enumerate(counts) if count > number), PARTS)
        low, high = low if part == 0 else edges[part - 1] + 1, high if part == PARTS else edges[part]
    found = low ^ 0x7FFFFFFFFFFFFFFF if low < 0 else low
    return float(torch.tensor(found, dtype=torch.int64).view(torch.float64))
