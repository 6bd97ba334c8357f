"""A fingerprint sees every bit and every place, and parts of a tensor add up to the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.rollout.fingerprints import PRIME, WORDS, _block_factor, _factors, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def words_of(tensor: torch.Tensor) -> list[int]:
    return tensor.flatten().view(torch.int16).tolist()


def slowly(tensor: torch.Tensor) -> int:
    """The formula, word by word, in Python's integers."""
    factors = [int(low) + 65536 * int(high) for low, high in _factors(torch.device("cpu")).tolist()]
    words = enumerate(words_of(tensor))
    return sum(w * factors[i % WORDS] * _block_factor(i // WORDS) for i, w in words) % PRIME


def made(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, WORDS - 1, 2 * WORDS + 3])
def test_it_is_the_formula(dtype: torch.dtype, count: int) -> None:
    tensor = made(count, dtype)
    assert fingerprint(tensor) == slowly(tensor)
    assert 0 <= fingerprint(tensor) < PRIME


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_words_are_summed_exactly(dtype: torch.dtype) -> None:
    """A partial sum of more than 53 bits would be rounded."""
    for word in (-(2**15), 2**15 - 1):
        full = torch.full((5 * WORDS,), word, dtype=torch.int16).view(dtype)
        assert fingerprint(full) == slowly(full)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 3 * WORDS),
    cuts=st.lists(st.integers(0, 3 * WORDS), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_parts_add_up(count: int, cuts: list[int], dtype: torch.dtype) -> None:
    tensor = made(count, dtype, seed=count)
    ends = sorted({0, count, *(c for c in cuts if c < count)})
    parts = [fingerprint(tensor[a:b], a) for a, b in pairwise(ends)]
    assert sum(parts) % PRIME == fingerprint(tensor)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, WORDS + 4), bit=st.integers(0, 31))
def test_every_bit_counts(place: int, bit: int) -> None:
    tensor = made(WORDS + 5, torch.float32)
    other = tensor.clone()
    other.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(2**31)
    assert fingerprint(other) != fingerprint(tensor)


def test_the_sign_of_zero_and_the_kind_of_nan_count() -> None:
    zero, minus = torch.zeros(8), -torch.zeros(8)
    assert torch.equal(zero, minus)
    assert fingerprint(zero) != fingerprint(minus)
    assert fingerprint(torch.full((8,), float("nan"))) == fingerprint(torch.full((8,), float("nan")))


@settings(max_examples=100, deadline=None)
@given(a=st.integers(0, 3 * WORDS - 1), b=st.integers(0, 3 * WORDS - 1))
def test_an_exchange_counts(a: int, b: int) -> None:
    tensor = made(3 * WORDS, torch.bfloat16)
    other = tensor.clone()
    other[a], other[b] = tensor[b], tensor[a]
    assert (fingerprint(other) == fingerprint(tensor)) == (words_of(tensor[a]) == words_of(tensor[b]))


def test_changes_that_cancel_in_a_plain_sum_count() -> None:
    """+1, −2, +1 leaves a sum, and a sum weighted by the place, as it was."""
    tensor = torch.arange(100, 200, dtype=torch.int16).view(torch.bfloat16)
    other = tensor.view(torch.int16).clone()
    other[10:13] += torch.tensor([1, -2, 1], dtype=torch.int16)
    assert fingerprint(other.view(torch.bfloat16)) != fingerprint(tensor)


def test_a_layout_in_memory_does_not_count() -> None:
    tensor = made(12, torch.float32).view(3, 4)
    assert fingerprint(tensor.t().contiguous().t()) == fingerprint(tensor)
    assert fingerprint(tensor.t()) != fingerprint(tensor)


def test_a_dtype_without_whole_words_is_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        fingerprint(torch.zeros(4, dtype=torch.uint8))
