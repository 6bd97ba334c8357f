"""Exact fingerprints of weights: one integer per tensor, from every bit, that shards can add up.

    fingerprint = Σ_i bits_i · w(i mod B) · r(i div B)  mod 2⁶¹ − 1

bits_i is the i-th 16-bit word of the whole tensor, w is a fixed random 31-bit factor of a place in a block of
B words, and r(k) a random factor of block k. All sums are of integers, so neither order, device nor number of
shards changes the result. Two tensors that differ in one word, or in which two words are exchanged, always have
different fingerprints; other differences are missed with probability 2⁻³¹ at most.

The sums within a block are products of float64 matrices, which is fast, and exact: with the two halves of w as
separate columns, every partial sum is an integer below 2⁴⁸.

This file imports nothing of the package, because vLLM's processes run a copy of it.
Held by: tests/unit/test_fingerprints.py
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor

PRIME = 2**61 - 1
WORDS = 1 << 16  # in a block: 2¹⁶ products of less than 2³¹ in size
BLOCKS = 16  # handled at once: 8 MiB of float64
_SEED = 20260423


@cache
def _factors(device: torch.device) -> Tensor:
    """Return the low 16 bits and the high 15 bits of every w. Shapes: [B, 2] float64."""
    draw = torch.Generator().manual_seed(_SEED)
    factors = torch.randint(1, 2**31 - 1, (WORDS,), generator=draw)
    return torch.stack([factors & 0xFFFF, factors >> 16], 1).double().to(device)


def _block_factor(block: int) -> int:
    digest = hashlib.blake2b(f"{_SEED}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (PRIME - 1) + 1


@torch.no_grad()
def fingerprint(tensor: Tensor, offset: int = 0) -> int:
    """Return the fingerprint of a tensor, or of a part of one that starts at element ``offset`` of the
    flattened whole. The sum of the parts' fingerprints modulo PRIME is that of the whole.

    Raises TypeError for a dtype whose elements are not 2, 4 or 8 bytes."""
    size = tensor.element_size()
    if size not in (2, 4, 8) or tensor.is_complex():
        raise TypeError(
            f"no fingerprint for {tensor.dtype}: its elements must be real and have 2, 4 or 8 bytes"
        )
    words = tensor.detach().contiguous().view(-1).view(torch.int16)
    factors = _factors(words.device)
    total, place, taken = 0, offset * size // 2, 0
    while taken < len(words):
        block, within = divmod(place, WORDS)
        # One partial block up to the next border, or as many whole blocks as are handled at once.
        whole = 0 if within else min(BLOCKS, (len(words) - taken) // WORDS)
        count = whole * WORDS or min(WORDS - within, len(words) - taken)
        part = words[taken : taken + count].double().view(max(1, whole), -1)
        halves = (part @ (factors if whole else factors[within : within + count])).tolist()
        sums = (int(low) + (int(high) << 16) for low, high in halves)
        total += sum(value * _block_factor(block + i) for i, value in enumerate(sums))
        place, taken = place + count, taken + count
    return total % PRIME
