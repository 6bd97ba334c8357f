"""Reductions over a token's own whole sequence: the only ones that a coefficient may make in a micro-batch,
since sequences are never split. Shapes: M trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from truestep.records import TokenBatch


def sequence_sum(values: Tensor, batch: TokenBatch) -> Tensor:
    """Σ over the token's sequence, given to each of its tokens. Shapes: [M] → [M]."""
    names, place = batch.sequence_index.unique(return_inverse=True)
    return values.new_zeros(names.shape[0]).index_add_(0, place, values)[place]


def sequence_mean(values: Tensor, batch: TokenBatch) -> Tensor:
    """The sum over the token's sequence ÷ its number of trained tokens. Shapes: [M] → [M]."""
    return sequence_sum(values, batch) / batch.sequence_length


def to_go(values: Tensor, batch: TokenBatch) -> Tensor:
    """Σ from the token to the end of its sequence. Shapes: [M] → [M].

    The tokens of a sequence are adjacent and in order, so one running sum (in float64) serves all
    sequences."""
    before = torch.cumsum(values.double(), 0) - values.double()
    first = torch.ones_like(batch.sequence_index, dtype=torch.bool)
    first[1:] = batch.sequence_index[1:] != batch.sequence_index[:-1]
    start = before[first][torch.cumsum(first, 0) - 1]
    return sequence_sum(values, batch) - (before - start).to(values.dtype)
