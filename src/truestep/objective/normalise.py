"""The only module that divides a loss. A loss is Σ (weighted token values) ÷ a global total.

Totals are computed over all micro-batches and all ranks before the first forward pass. Nothing else divides:
micro-batches are not divided by their own count, there is no accumulation factor, and no wrapper averages
gradients over ranks.
Held by: tests/architecture/test_one_division.py, tests/numerics/test_invariance.py
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from truestep.records import TokenBatch


class Normaliser(enum.StrEnum):
    """The divisor of the sum over tokens. All counts are over one optimizer step and all ranks."""

    TOKENS = "tokens"  # N_tok: DAPO, SFT, the paper's RL
    SEQUENCES = "sequences"  # 1/|y| within a sequence, then 1/N_seq: GRPO, GSPO
    SEQUENCE_SUMS = "sequence_sums"  # N_seq: RLOO, REINFORCE
    MAX_LENGTH = "max_length"  # N_seq·L with a constant L: Dr. GRPO


def local_total(normaliser: Normaliser, selected: Sequence[Tensor], batches: Sequence[TokenBatch]) -> float:
    """Count this rank's share of a term's denominator. ``selected`` has a boolean tensor [M] for
    each micro-batch. A sequence, which is never split, counts if any of its tokens is selected."""
    if normaliser is Normaliser.TOKENS:
        return float(sum(int(s.sum()) for s in selected))
    found = [b.sequence_index[s] for s, b in zip(selected, batches, strict=True)]
    return float(torch.cat(found).unique().numel()) if found else 0.0


def normalise(
    values: Tensor, *, normaliser: Normaliser, batch: TokenBatch, total: float, max_length: int
) -> Tensor:
    """Return Σ_t values_t ÷ (share_t · total), a micro-batch's part of the loss. Shapes: values [M] → scalar.

    Raises ZeroDivisionError for a term without tokens; the step skips such terms."""
    if total <= 0:
        raise ZeroDivisionError("a term whose global total is 0 has no loss")
    constant = max_length if normaliser is Normaliser.MAX_LENGTH else 1
    share: Tensor | int = batch.sequence_length if normaliser is Normaliser.SEQUENCES else constant
    return (values / (share * total)).sum()
