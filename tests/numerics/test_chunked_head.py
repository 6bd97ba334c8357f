"""The chunked head equals the plain one in value and gradient, and never holds the logits of a whole
micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_cases import EXACT, check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from truestep import device
from truestep.objective import logprobs as head
from truestep.objective.logprobs import chunked_logprobs, logprobs_from_logits

M, D, V = 13, 5, 11


def inputs(bias: bool, num_tokens: int = M, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, D), (V, D), *([(V,)] if bias else [])]
    return [
        (2 * torch.randn(s, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes
    ]


def targets(num_tokens: int = M) -> Tensor:
    return torch.randint(0, V, (num_tokens,), generator=torch.Generator().manual_seed(1))


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, picked: Tensor, temperature: float) -> Any:
    return logprobs_from_logits(torch.nn.functional.linear(hidden, weight, bias), picked, temperature)


def chunks_of(monkeypatch: pytest.MonkeyPatch, num_tokens: int, vocabulary: int = V) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", num_tokens * vocabulary)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("outputs", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_value_and_gradient(
    chunk: int, temperature: float, bias: bool, outputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(monkeypatch, chunk)
    assert len(head._chunks(M, V)) == -(-M // chunk)
    weights = torch.randn(2, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for function in (chunked_logprobs, plain):
        tensors = inputs(bias)
        logprobs, entropy = function(
            tensors[0], tensors[1], tensors[2] if bias else None, targets(), temperature
        )
        used = {"both": (1, 1), "logprobs": (1, 0), "entropy": (0, 1)}[outputs]
        loss = sum((w * x).sum() for w, x, use in zip(weights, (logprobs, entropy), used, strict=True) if use)
        found.append([logprobs, entropy, *torch.autograd.grad(loss, tensors)])
    for got, expected in zip(*found, strict=True):
        check("chunked head", error(got, expected), EXACT)


def test_the_plain_head_is_log_softmax_written_out() -> None:
    """The yardstick itself, from the definition."""
    hidden, weight, bias = inputs(True)
    logprobs, entropy = plain(hidden, weight, bias, targets(), 0.7)
    for m in range(M):
        weights = torch.exp((hidden[m] @ weight.T + bias) / 0.7)
        p = weights / weights.sum()
        torch.testing.assert_close(logprobs[m], p[targets()[m]].log(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(entropy[m], -(p * p.log()).sum(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradcheck(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 2)
    picked = targets(5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_logprobs(h, w, b, picked, temperature), tuple(inputs(True, 5))
    )


def test_only_what_asks_for_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 4)
    hidden, weight, bias = inputs(True)
    chunked_logprobs(hidden.detach(), weight, bias.detach(), targets(), 1.0)[0].sum().backward()
    assert weight.grad is not None
    assert hidden.grad is None
    assert bias.grad is None


def test_no_tokens_are_an_exact_zero_with_a_graph() -> None:
    hidden, weight, bias = inputs(True, 0)
    logprobs, entropy = chunked_logprobs(hidden, weight, bias, targets(0), 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, D)
    for head_part in (weight, bias):  # reached as well: a sharded head is reduced on all ranks or on none
        assert torch.equal(head_part.grad, torch.zeros_like(head_part))


def test_extreme_logits_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(monkeypatch, 4)
    hidden, weight = inputs(False)
    big = (hidden * 1e4).detach().requires_grad_()
    logprobs, entropy = chunked_logprobs(big, weight, None, targets(), 1.0)
    (logprobs.sum() + entropy.sum()).backward()
    for tensor in (logprobs, entropy, big.grad, weight.grad):
        assert bool(torch.isfinite(tensor).all())
    assert bool((entropy >= 0).all())


def test_bfloat16_reduces_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities come out in float32, and the sum over chunks of the weight's gradient is not taken in
    bf16."""
    chunks_of(monkeypatch, 1)
    narrow = inputs(False, 400, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in narrow]
    logprobs, _ = chunked_logprobs(*narrow, None, targets(400), 1.0)
    assert logprobs.dtype is torch.float32
    logprobs.sum().backward()
    plain(*wide, None, targets(400), 1.0)[0].sum().backward()
    assert narrow[1].grad.dtype is torch.bfloat16
    # 400 single-token chunks: each rounded to bf16 (2^-9), their sum in float32. Summed in bf16 it is several
    # percent.
    assert error(narrow[1].grad.double(), wide[1].grad) < 2**-8


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_logits_never_exist_at_once(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, vocabulary, chunk = 96, 50, 4
    chunks_of(monkeypatch, chunk, vocabulary)
    largest = {}
    for function in (chunked_logprobs, plain):
        hidden = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(vocabulary, 3, dtype=torch.float64, requires_grad=True)
        picked = torch.randint(0, vocabulary, (num_tokens,))
        with Largest() as seen:
            logprobs, entropy = function(hidden, weight, None, picked, temperature)
            (logprobs.sum() + entropy.sum()).backward()
        largest[function] = seen.numel
    assert largest[plain] >= num_tokens * vocabulary, "the detector sees nothing"
    assert largest[chunked_logprobs] <= max(chunk * vocabulary, num_tokens * 3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_fast_product_is_the_product(rows: int, bias: bool) -> None:
    """float32 on a CPU goes another way than float64: held to it, the bias included. Largest error seen:
    1.4e-7."""
    draw = torch.Generator().manual_seed(rows)
    x, weight, added = (torch.randn(*shape, generator=draw) for shape in ((rows, 48), (200, 48), (200,)))
    given = added if bias else None
    with torch.no_grad():
        got = device.linear(x, weight, given)
    wanted = torch.nn.functional.linear(
        x.double(), weight.double(), None if given is None else given.double()
    )
    assert float((got - wanted).norm() / wanted.norm()) < 2e-6
    x.requires_grad_()
    assert device.linear(x, weight, given).requires_grad  # where a gradient is asked for there is one
