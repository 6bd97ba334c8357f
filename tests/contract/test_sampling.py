"""From logits to a token: the frequencies are the probabilities, at the edges of the interval too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from truestep.rollout.engine import SamplingParameters
from truestep.rollout.sampling import BLOCK, NonFiniteLogitsError, sample_tokens

torch.set_num_threads(1)

LAST = math.nextafter(1.0, 0.0)  # the largest uniform that a generator can give
BENDINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1e-6},  # the first token alone
]


def how(**bending: float) -> SamplingParameters:
    return SamplingParameters(max_new_tokens=1, stop_token_ids=(), **bending)  # type: ignore[arg-type]


def exact(logits: list[float], temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The bent distribution, written in plain Python: sort, cut, renormalise."""
    peak = max(logits)
    weight = [math.exp((z - peak) / temperature) for z in logits]
    order = sorted(range(len(logits)), key=lambda i: -weight[i])
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        total, mass, kept = sum(weight[i] for i in order), 0.0, []
        for i in order:
            if mass >= top_p:
                break
            kept.append(i)
            mass += weight[i] / total
        order = kept
    total = sum(weight[i] for i in order)
    return [weight[i] / total if i in order else 0.0 for i in range(len(logits))]


def some_logits(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("bending", BENDINGS)
@pytest.mark.parametrize("size", [12, 2 * BLOCK + 37])
def test_logprobs_are_those_of_the_bent_distribution(size: int, bending: dict[str, float]) -> None:
    logits = some_logits(size, 3)
    expected = exact(logits.tolist(), **bending)  # type: ignore[arg-type]
    _, logprobs = sample_tokens(logits.repeat(size, 1), [0.5] * size, how(**bending), list(range(size)))
    got = [math.exp(v) for v in logprobs]
    assert sum(got) == pytest.approx(1.0, abs=1e-12)
    assert got == pytest.approx(expected, abs=1e-12)
    assert [g == 0 for g in got] == [e == 0 for e in expected]


@pytest.mark.parametrize("bending", BENDINGS)
def test_frequencies_are_the_probabilities(bending: dict[str, float]) -> None:
    draws, size = 20_000, 12
    logits = some_logits(size, 8)
    uniforms = np.random.default_rng(2).random(draws)
    tokens, _ = sample_tokens(logits.repeat(draws, 1), uniforms.tolist(), how(**bending), [-1] * draws)
    expected: np.ndarray = np.array(exact(logits.tolist(), **bending)) * draws  # type: ignore[arg-type]
    observed = np.bincount(tokens, minlength=size)
    assert (observed[expected == 0] == 0).all(), "a token of probability zero was chosen"
    likely = expected > 5
    if likely.sum() > 1:
        seen, wanted = observed[likely], expected[likely]
        assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-4
    else:
        assert observed[likely].sum() == draws


def test_a_wrong_temperature_would_be_seen() -> None:
    """The test above has the power to notice a distribution that is 5 % off in temperature."""
    draws, size = 20_000, 12
    logits = some_logits(size, 8)
    uniforms = np.random.default_rng(2).random(draws)
    tokens, _ = sample_tokens(logits.repeat(draws, 1), uniforms.tolist(), how(temperature=1.05), [-1] * draws)
    wanted = np.array(exact(logits.tolist(), 1.0))
    assert stats.chisquare(np.bincount(tokens, minlength=size), wanted * draws).pvalue < 1e-4


def test_draws_follow_the_cumulative_distribution_in_token_order() -> None:
    logits = some_logits(2 * BLOCK + 37, 4)
    edges = np.cumsum(exact(logits.tolist(), 1.0))
    uniforms = np.linspace(0, 0.9999, 400)
    tokens, _ = sample_tokens(logits.repeat(400, 1), uniforms.tolist(), how(temperature=1.0), [-1] * 400)
    assert tokens == np.searchsorted(edges, uniforms, side="right").tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [12, BLOCK, BLOCK + 1, 2 * BLOCK + 37, 30 * BLOCK])
def test_the_ends_of_the_interval_give_tokens_that_have_weight(size: int, dtype: torch.dtype) -> None:
    """At 0 the first token of positive probability, just below 1 the last one, wherever the zeros lie."""
    for seed in range(40):
        logits = some_logits(size, seed).to(dtype)
        first, last = sorted(np.random.default_rng(seed).integers(0, size, 2).tolist())
        logits[:first] = float("-inf")
        logits[last + 1 :] = float("-inf")
        tokens, logprobs = sample_tokens(logits.repeat(2, 1), [0.0, LAST], how(temperature=1.0), [-1, -1])
        assert tokens == [first, last], seed
        assert all(math.isfinite(v) for v in logprobs)


def test_a_draw_on_an_edge_never_falls_on_a_token_without_weight() -> None:
    """Uniforms at, just below and just above every edge of the cumulative sum, zeros on both sides of it."""
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        logits = some_logits(3 * BLOCK, seed)
        logits[torch.rand(3 * BLOCK, generator=draw) < 0.8] = float("-inf")
        logits[BLOCK : BLOCK + 40] = logits[2 * BLOCK : 2 * BLOCK + 40] = float("-inf")
        weight = (logits - logits.max()).exp()
        edges = (weight.cumsum(0) / weight.sum()).unique().tolist()
        uniforms = [u for e in edges for u in (math.nextafter(e, 0), e, math.nextafter(e, 1)) if 0 <= u < 1]
        tokens, logprobs = sample_tokens(
            logits.repeat(len(uniforms), 1), uniforms, how(temperature=1.0), [-1] * len(uniforms)
        )
        assert all(math.isfinite(v) for v in logprobs), seed
        assert bool((weight[tokens] > 0).all()), seed


def test_greedy_is_a_point() -> None:
    logits = some_logits(40, 1)[None]
    assert sample_tokens(logits, [0.9], how(temperature=0.0), [-1]) == ([int(logits.argmax())], [0.0])


def test_a_forced_token_is_taken() -> None:
    logits = some_logits(40, 1).repeat(2, 1)
    tokens, _ = sample_tokens(logits, [0.0, 0.0], how(temperature=1.0), [33, -1])
    assert tokens == [33, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits = torch.zeros(1, 9)
    logits[0, 4] = bad
    for temperature in (0.0, 1.0):  # greedy too: a broken model must not be scored as a wrong one
        with pytest.raises(NonFiniteLogitsError, match="not finite"):
            sample_tokens(logits, [0.5], how(temperature=temperature), [-1])
        with pytest.raises(NonFiniteLogitsError, match="not finite"):
            sample_tokens(torch.full((1, 9), float("-inf")), [0.5], how(temperature=temperature), [-1])
