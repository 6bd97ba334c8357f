"""The detached coefficients C_t of −Σ sg(C_t)·log π_t / Z. There is one function for each closed form.

The gradient of nearly every objective in the field has this form; the value of the loss does not matter for
the update. Every input is detached and per token. p is the policy's probability of the token, r is the ratio
of p to the proximal policy's probability, and A is the advantage. Shapes: M trained tokens.
Held by: tests/numerics/test_coefficients.py (each is compared with autograd of the paper's surrogate).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from truestep.records import RecordError, TokenBatch

MAX_LOG_RATIO = 20.0  # exp(20) is far outside every clip range; exp(89) would overflow float32


def _column(name: str) -> property:
    """Make a property that returns an optional column of the batch, or raises RecordError without it."""

    def read(context: Context) -> Tensor:
        column: Tensor | None = getattr(context.batch, name)
        if column is None:
            remedy = f'declare needs=("{name}",) in its term'
            raise RecordError(f"a coefficient reads {name}, which this step does not have; {remedy}")
        return column

    return property(read)


@dataclass(frozen=True, kw_only=True)
class Context:
    """The inputs of a coefficient, which may depend on the token, its sequence and statistics of the step."""

    policy_logprobs: Tensor  # M, detached
    proximal_logprobs: Tensor  # M
    entropy: Tensor  # M, detached
    batch: TokenBatch
    step: int
    statistics: Mapping[str, float] = field(default_factory=dict)  # over all tokens of the step on all ranks

    @property
    def ratio(self) -> Tensor:
        """π_θ / π_proximal, per token."""
        return bounded_exp(self.policy_logprobs - self.proximal_logprobs)

    @property
    def probability(self) -> Tensor:
        return self.policy_logprobs.exp()

    @property
    def advantage(self) -> Tensor:
        return self.batch.advantage

    behavior_logprobs = _column("behavior_logprobs")
    proximal_entropy = _column("proximal_entropy")
    reference_logprobs = _column("reference_logprobs")


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp of the log-ratio, which is first clamped to ±20."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


Coefficient = Callable[[Context], Tensor]
Options = ParamSpec("Options")


def with_options(function: Callable[Concatenate[Context, Options], Tensor]) -> Callable[Options, Coefficient]:
    """Return a function that takes only the options of ``function`` and returns a coefficient."""
    return lambda *given, **named: lambda context: function(context, *given, **named)


# Reductions over the whole sequence of a token. Coefficients must not use other reductions in a micro-batch,
# because only sequences are never split. Shapes: [M] → [M].


def sequence_sum(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return for each token the sum over its sequence."""
    names, place = batch.sequence_index.unique(return_inverse=True)
    return values.new_zeros(names.shape[0]).index_add_(0, place, values)[place]


def sequence_mean(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return for each token the mean over the trained tokens of its sequence."""
    return sequence_sum(values, batch) / batch.sequence_length


def to_go(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return for each token the sum from it to the end of its sequence. The tokens of a sequence are adjacent
    and in order, so one running sum (in float64) is enough for all sequences."""
    before = torch.cumsum(values.double(), 0) - values.double()
    first = torch.ones_like(batch.sequence_index, dtype=torch.bool)
    first[1:] = batch.sequence_index[1:] != batch.sequence_index[:-1]
    start = before[first][torch.cumsum(first, 0) - 1]
    return sequence_sum(values, batch) - (before - start).to(values.dtype)


# --------------------------------------------------------------------------------------- only demonstrations


def ones(context: Context) -> Tensor:
    """C = 1: negative log-likelihood."""
    return torch.ones_like(context.policy_logprobs)


def probability(context: Context) -> Tensor:
    """C = p: DFT (arXiv:2508.05629)."""
    return context.probability


def powered(alpha: float) -> Coefficient:
    """C = p^α, for the loss (1 − p^α)/α: α → 0 is the likelihood, α = 1 is DFT."""
    return lambda context: (alpha * context.policy_logprobs).exp()


def uncertainty(context: Context) -> Tensor:
    """C = p(1−p): CHORD-φ (arXiv:2508.11408)."""
    return context.probability * (1 - context.probability)


def trusted(alpha: float) -> Coefficient:
    """C = p / max(p, α): TrSFT (arXiv:2512.17636). α → 0 is the likelihood, α = 1 is DFT."""
    return lambda context: context.probability / context.probability.clamp(min=alpha)


def proximal_likelihood(clip_high: float) -> Coefficient:
    """C = r·1[r ≤ 1+ε]: PSFT (arXiv:2508.17784), the clipped surrogate with A = 1 (no lower clip)."""
    return lambda context: context.ratio * (context.ratio <= 1 + clip_high)


@with_options
def sequence_weighted(context: Context, temperature: float, low: float, high: float) -> Tensor:
    """C = clamp(exp(τ·mean_t(log π − log π_ref)), low, high), one per sequence: iw-SFT (arXiv:2507.12856)."""
    gain = sequence_mean(context.policy_logprobs - context.reference_logprobs, context.batch)
    return bounded_exp(temperature * gain).clamp(low, high)


def token_weighted(low: float, high: float) -> Coefficient:
    """C = clamp(π/π_reference, low, high): iw-SFT's form per token (arXiv:2507.12856)."""
    return lambda context: bounded_exp(context.policy_logprobs - context.reference_logprobs).clamp(low, high)


def entropy_weighted(scale: float, sign: float) -> Coefficient:
    """C = scale·exp(sign·H), where H is the sequence's mean entropy: SRFT's imitation (arXiv:2506.19767)."""
    return lambda context: scale * torch.exp(sign * sequence_mean(context.entropy, context.batch))


# ------------------------------------------------------------------------------------------------ own samples


def advantage(context: Context) -> Tensor:
    """C = A: REINFORCE."""
    return context.advantage


def importance(context: Context) -> Tensor:
    """C = A·r: the unclipped surrogate of LUFFY's code and of RLOO after the first update."""
    return context.advantage * context.ratio


@with_options
def clipped_ratio(context: Context, clip_low: float, clip_high: float, dual_clip: float = 0.0) -> Tensor:
    """C = A·r if the clipped surrogate still has a gradient: r ≤ 1+ε_high if A > 0, r ≥ 1−ε_low if A < 0.

    With ``dual_clip`` c > 0, a token with A < 0 has no gradient above r = c either. Unlike in the surrogate,
    the log-ratio is first clamped to ±20, which matters only for A < 0 and r > e²⁰.
    Source: PPO (arXiv:1707.06347), asymmetric as in DAPO (arXiv:2503.14476), dual clip (arXiv:1912.09729)."""
    gain, ratio = context.advantage, context.ratio
    below = ratio >= 1 - clip_low
    if dual_clip > 0:
        below = below & (ratio <= dual_clip)
    return gain * ratio * torch.where(gain > 0, ratio <= 1 + clip_high, below)


def clipped_weight(clip_low: float, clip_high: float) -> Coefficient:
    """C = A·clip(r, 1−ε_low, 1+ε_high): CISPO (arXiv:2506.13585); no token loses its gradient."""
    return lambda context: context.advantage * context.ratio.clamp(1 - clip_low, 1 + clip_high)


@with_options
def clipped_sequence_ratio(context: Context, clip_low: float, clip_high: float) -> Tensor:
    """C = A·s inside the range, where s = exp(mean_t(log π − log π_proximal)): GSPO (arXiv:2507.18071).

    The factor 1/|y| in the ratio's gradient comes from the ``sequences`` normaliser."""
    gain = context.advantage
    ratio = bounded_exp(sequence_mean(context.policy_logprobs - context.proximal_logprobs, context.batch))
    return gain * ratio * torch.where(gain > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)


@with_options
def softly_gated(context: Context, temperature_right: float, temperature_wrong: float) -> Tensor:
    """C = A·r·4σ(x)(1 − σ(x)), where x = τ(r − 1) and τ depends on the sign of A: SAPO (arXiv:2511.20347)."""
    gain, ratio, moved = context.advantage, context.ratio, context.ratio - 1
    gate = torch.sigmoid(torch.where(gain > 0, temperature_right * moved, temperature_wrong * moved))
    return gain * ratio * 4 * gate * (1 - gate)


@with_options
def implicit_negative(context: Context, low: float, high: float) -> Tensor:
    """C = 1 − q on a correct sample, otherwise −q·r / max((1 − q·r)/(1 − q), 1): NFT (arXiv:2505.18116).
    q is the group's clamped share of correct samples. With rewards of 0 and 1, the advantage is R − q."""
    gain, correct, ratio = context.advantage, context.batch.solved, context.ratio
    share = torch.where(correct, 1 - gain, -gain).clamp(low, high)
    rest = ((1 - share * ratio) / (1 - share)).clamp(min=1.0)
    return torch.where(correct, 1 - share, -share * ratio / rest)


@with_options
def signed_by_verdict(context: Context, scale: float) -> Tensor:
    """C = scale·exp(H) on a correct sample and −1 on any other: SRFT's samples (arXiv:2506.19767).
    H is the mean entropy of the sequence."""
    weight = scale * torch.exp(sequence_mean(context.entropy, context.batch))
    return torch.where(context.batch.solved, weight, -torch.ones_like(weight))


# --------------------------------------------------------------------------- demonstrations with an advantage


def unshaped_demonstration(context: Context) -> Tensor:
    """C = A·p: importance sampling of a demonstration with an assumed behavior probability of 1 (SRFT)."""
    return context.advantage * context.probability


def shaped_demonstration(gamma: float) -> Coefficient:
    """C = A·γp/(p+γ)²: LUFFY's off-policy term (arXiv:2504.14945), the gradient of p/(p+γ)."""
    return lambda c: c.advantage * gamma * c.probability / (c.probability + gamma) ** 2


@with_options
def shaped_replay(context: Context, beta: float) -> Tensor:
    """C = A·βw/(w+β)², where w = π/π_behavior of the stored sample: ExGRPO (arXiv:2510.02245)."""
    w = bounded_exp(context.policy_logprobs - context.behavior_logprobs)
    return context.advantage * beta * w / (w + beta) ** 2


@with_options
def mixed_importance(context: Context, exponent: float) -> Tensor:
    """C = A·(1−p)^γ·4p/(3p_proximal+1): RL-PLUS (arXiv:2508.00222). The last factor is p divided by
    the mean of p_proximal and a behavior policy ½(p_proximal+1). A small p raises the advantage."""
    p, old = context.probability, context.proximal_logprobs.exp()
    return context.advantage * (1 - p).clamp(min=0) ** exponent * 4 * p / (3 * old + 1)


@with_options
def where_uncertain(context: Context, coefficient: Coefficient, statistic: str) -> Tensor:
    """Return the coefficient if the proximal policy's entropy reaches a statistic of the step, otherwise 0.

    Source: Prefix-RFT (arXiv:2507.01679), entropy-masked SFT (arXiv:2510.04454)."""
    threshold = context.statistics.get(statistic)
    if threshold is None:  # the step has no such token
        return torch.zeros_like(context.policy_logprobs)
    return coefficient(context) * (context.proximal_entropy >= threshold)


# ------------------------------------------------------------------------------------ distance to a reference


def _log_distance(context: Context) -> Tensor:
    return (context.policy_logprobs - context.reference_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_k1(context: Context) -> Tensor:
    """C = −1: the loss k1 = log π − log π_ref, whose expected gradient is zero on the policy's samples."""
    return -torch.ones_like(context.policy_logprobs)


def kl_k2(context: Context) -> Tensor:
    """C = −d, where d = log π − log π_ref: the loss k2 = d²/2, with the expected gradient of KL(π‖π_ref)."""
    return -_log_distance(context)


def kl_k3(context: Context) -> Tensor:
    """C = −(1 − e^(−d)): the loss k3 = e^(−d) + d − 1, whose expected gradient is that of KL(π_ref‖π)."""
    return -(1 - torch.exp(-_log_distance(context)))
