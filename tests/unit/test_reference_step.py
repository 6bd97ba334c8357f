"""The textbook optimizer step against torch's own."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from truestep.records import Origin, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.testing.reference.loss import (
    adamw,
    clip_by_global_norm,
    learning_rate,
    reference_loss,
    reference_steps,
    sgd,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def make_sequence(num_trained: int, seed: int) -> TrainSequence:
    token_ids = np.random.default_rng(seed).integers(0, 20, num_trained + 2)
    origin = (Origin.CONTEXT,) * 2 + (Origin.EXPERT,) * num_trained
    return TrainSequence(token_ids=tuple(map(int, token_ids)), origin=origin, num_prefix_tokens=2, group=seed)


SEQUENCES = [make_sequence(n, seed) for seed, n in enumerate([3, 8, 1, 4, 2, 4, 6])]


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(5, dtype=torch.float64)}


def test_adamw_is_torchs() -> None:
    ours, state = tensors(0), None
    theirs = {name: torch.nn.Parameter(t.clone()) for name, t in ours.items()}
    settings = OptimizerSettings(lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    for step in range(5):
        gradients = tensors(step + 1)
        for name, p in theirs.items():
            p.grad = gradients[name]
        optimizer.step()
        ours, state = adamw(ours, gradients, state, 0.03, settings)
    for name, p in theirs.items():
        assert torch.allclose(ours[name], p, rtol=0, atol=2e-15)


def test_sgd_is_the_plain_update() -> None:
    theta, g = tensors(0), tensors(1)
    theirs = {name: torch.nn.Parameter(t.clone()) for name, t in theta.items()}
    for name, p in theirs.items():
        p.grad = g[name]
    torch.optim.SGD(theirs.values(), lr=0.3).step()
    moved = sgd(theta, g, 0.3)
    assert all(torch.allclose(moved[name], theirs[name], rtol=0, atol=1e-15) for name in theta)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    g = tensors(0)
    theirs = [torch.nn.Parameter(torch.zeros_like(t)) for t in g.values()]
    for p, t in zip(theirs, g.values(), strict=True):
        p.grad = t.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, own_norm = clip_by_global_norm(g, max_norm)
    assert own_norm == pytest.approx(float(norm), rel=1e-15)
    assert all(
        torch.allclose(c, p.grad, rtol=1e-14, atol=0) for c, p in zip(clipped.values(), theirs, strict=True)
    )


def test_zero_means_no_clipping() -> None:
    clipped, _ = clip_by_global_norm(tensors(0), 0.0)
    assert all(torch.equal(clipped[name], t) for name, t in tensors(0).items())


def test_cosine_schedule() -> None:
    rates = [learning_rate(s, 100, 2.0, "cosine", 0.1, 0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)  # half way between the peak and the floor
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.2 < rates[99] < 0.202
    assert [learning_rate(s, 10, 2.0, warmup_fraction=0.2) for s in range(4)] == [1.0, 2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="not one of"):
        learning_rate(100, 100, 2.0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_consecutive_steps_are_torchs_loop(model: LlamaForCausalLM, kind: str) -> None:
    decay = 0.1 if kind == "adamw" else 0.0
    settings = OptimizerSettings(
        lr=0.05, kind=kind, schedule="cosine", warmup_fraction=0.25, weight_decay=decay, max_grad_norm=0.5
    )
    losses = [partial(reference_loss, sequences=SEQUENCES[i:], method="sft") for i in range(3)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    results = reference_steps(model, losses, settings, total_steps=8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    theirs = copy.deepcopy(model)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.0)
    for loss_of, rate, result in zip(losses, [0.025, 0.05, 0.05], results, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(theirs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert result.learning_rate == pytest.approx(rate)
        assert (result.loss, result.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-11)
        for name, p in theirs.named_parameters():
            # AdamW divides a gradient by its own size, so the smallest gradients bring their rounding along
            assert torch.allclose(result.parameters[name], p, rtol=0, atol=1e-9 if kind == "adamw" else 1e-13)
