"""Packed attention: no mask if rows are plain, and no repeated keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from truestep.model import attention
from truestep.model.attention import PackedLayout, grouped_attention, visible
from truestep.records import Segment

SCALE = 0.3
BATCH, LENGTH, WIDTH = 3, 40, 70


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


class Widest(TorchDispatchMode):
    """Remembers the dtypes of the matrices that are made and take memory of their size."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and min(made.shape, default=0) > 1:
            self.dtypes.add(made.dtype)
        return made


def row(length: int, window: int | None, prefix: int = 0) -> int:
    """Return the size of the largest tensor of the plan of one row, after a shared prefix."""
    first = Segment(start=0, stop=prefix, prefix_start=0, prefix_stop=0)
    own = Segment(start=prefix, stop=prefix + length, prefix_start=0, prefix_stop=prefix)
    layout = PackedLayout([first, own] if prefix else [own], torch.arange(prefix + length))
    with Largest() as seen:
        layout._plan(window)
    return seen.elements


def test_a_plain_row_needs_no_mask() -> None:
    assert row(512, None) <= 512
    assert row(512, 512) <= 512
    assert row(512, 100) >= 512 * 512  # a window does
    assert row(512, None, prefix=8) >= 512 * 520  # and a shared prefix


@pytest.mark.parametrize("window", [None, 3])
def test_a_mask_is_made_without_wider_matrices(window: int | None) -> None:
    queries, keys = torch.tensor([4, 0, 7]), torch.arange(9)
    with Widest() as seen:
        found = visible(queries, keys, window)
    reach = 9 if window is None else window
    assert found.tolist() == [[0 <= q - k < reach for k in range(9)] for q in (4, 0, 7)]
    assert seen.dtypes == {torch.bool}


def tensors(heads: int, groups: int, dtype: torch.dtype, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(heads)
    width = LENGTH if is_causal else WIDTH
    shapes = ((BATCH, heads, LENGTH, 16), *[(BATCH, groups, width, 16)] * 2)
    made = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    q, k, v = (t.to(dtype).requires_grad_() for t in made)
    return q, k, v


def causal(width: int) -> Tensor:
    mask = torch.ones(LENGTH, width, dtype=torch.bool).tril(width - LENGTH)
    return mask.expand(BATCH, 1, -1, -1)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention from its formula, in float64, head by head."""
    repeats = q.shape[1] // k.shape[1]
    found = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // repeats].mT * SCALE
        found.append(scores.masked_fill(~mask[:, 0], float("-inf")).softmax(-1) @ v[:, head // repeats])
    return torch.stack(found, 1)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 2), (6, 6)])
def test_grouped_heads_are_the_formula_and_are_not_repeated(
    heads: int, groups: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor | None]] = []
    kernel = attention.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
        asked.append((k, mask))
        return kernel(q, k, v, mask, **how)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    q, k, v = tensors(heads, groups, torch.float64, is_causal)
    mask = causal(k.shape[2])
    out = grouped_attention(q, k, v, None if is_causal else mask, SCALE)
    expected = plain(q, k, v, mask)
    keys, used = asked[0]
    if used is None:
        assert keys.untyped_storage().nbytes() <= k.numel() * k.element_size()
    else:  # one mask for all heads
        assert used.shape[:2] == (BATCH, 1)
    weight = torch.randn_like(out)
    gradients = (torch.autograd.grad(o, (q, k, v), weight) for o in (out, expected))
    for a, b in [(out, expected), *zip(*gradients, strict=True)]:
        assert float((a - b).detach().abs().max()) <= 1e-13


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_have_the_bits_of_repeated_keys(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = tensors(8, 2, dtype, is_causal)
    mask = None if is_causal else causal(k.shape[2])
    repeated = grouped_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), mask, SCALE)
    own = grouped_attention(q, k, v, mask, SCALE)
    assert torch.equal(own, repeated)
    weight = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = (torch.autograd.grad(out, (q, k, v), weight) for out in (own, repeated))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
