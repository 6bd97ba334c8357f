"""Samples one token per row of logits from a uniform random number, and returns its log-probability.

Shapes: R rows, V vocabulary, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truestep.rollout.engine import SamplingParameters

BLOCK = 256


class NonFiniteLogitsError(ArithmeticError):
    """Raised if the model's logits contain NaN or infinity, so that no token can be sampled."""


def sample_tokens(
    logits: Tensor, uniforms: Sequence[float], sampling: SamplingParameters, forced: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Sample by the inverse CDF, except that ``forced[r]`` ≥ 0 replaces a draw. At temperature 0, the token
    with the largest logit is taken, with log-probability 0 (the distribution is a point).

    Shapes: logits [R, V] → R tokens, R log-probabilities of the distribution after temperature, top-k and
    top-p.
    Raises NonFiniteLogitsError if a row has NaN, plus infinity, or no finite logit."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The maximum is NaN if any logit is NaN; a logit of minus infinity is a token that the model rules out.
    if not bool(torch.isfinite(logits.amax(1)).all()):
        raise NonFiniteLogitsError("the model's logits are not finite: a weight is NaN or infinite")
    if sampling.temperature == 0:
        return logits.argmax(1).tolist(), [0.0] * logits.shape[0]
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits = _truncate(logits, sampling)
    shifted = logits.sub_(logits.amax(1, keepdim=True))
    # Two short searches of the CDF, over zero-padded blocks, replace one long cumulative sum.
    padding = -shifted.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(shifted.exp(), (0, padding)).view(shifted.shape[0], -1, BLOCK)
    block_sums = blocks.sum(2, dtype=torch.float64)  # R B
    total = block_sums.sum(1)
    target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device) * total
    tokens = _invert(blocks, block_sums, target)
    given = torch.tensor(list(forced), device=logits.device)
    tokens = torch.where(given >= 0, given, tokens)
    logprobs = shifted.gather(1, tokens[:, None])[:, 0].double() - total.log()
    return tokens.tolist(), logprobs.tolist()


def _invert(blocks: Tensor, block_sums: Tensor, target: Tensor) -> Tensor:
    """Return the token at which the cumulative weight first exceeds ``target`` [R]."""
    edges = block_sums.cumsum(1)
    # Rounding may put the target on the last edge or just before a block; in both cases the result must be a
    # token with weight.
    target = torch.minimum(target, edges[:, -1].nextafter(torch.zeros_like(target)))
    block = (edges <= target[:, None]).sum(1)
    rows = torch.arange(blocks.shape[0], device=blocks.device)
    inside = blocks[rows, block].double()
    rest = (target - (edges[rows, block] - block_sums[rows, block])).clamp(min=0)
    index = (inside.cumsum(1) <= rest[:, None]).sum(1)
    # Rounding can also move the search past the last token with weight; then that token is taken.
    last = BLOCK - 1 - (inside > 0).flip(1).to(torch.int8).argmax(1)
    return block * BLOCK + torch.minimum(index, last)


def _truncate(logits: Tensor, sampling: SamplingParameters) -> Tensor:
    """Set the logits to −∞ outside the top k and outside the smallest set with mass ≥ top_p (never empty)."""
    ordered, order = logits.sort(dim=1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        drop[:, sampling.top_k :] = True
    if sampling.top_p < 1:
        mass = ordered.masked_fill(drop, float("-inf")).softmax(1)
        drop |= mass.cumsum(1) - mass >= sampling.top_p
    return logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
