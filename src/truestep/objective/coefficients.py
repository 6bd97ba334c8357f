"""One function per closed form: the detached coefficient C_t of −Σ sg(C_t)·log π_t / Z.

The gradient of nearly every objective in the field has this form; the loss's value does not matter for the update.
Every input is detached and per token. Shapes: M trained tokens.
Held by: tests/numerics/test_coefficients.py (each against autograd of the paper's own surrogate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from truestep.records import TokenBatch

MAX_LOG_RATIO = 20.0  # exp(20) is far outside every clip range; beyond it float32 would overflow


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a coefficient may look at: its own token, its own sequence, and statistics of the whole step."""

    policy_logprobs: Tensor  # M, detached
    proximal_logprobs: Tensor  # M
    entropy: Tensor  # M, detached
    batch: TokenBatch
    step: int

    @property
    def ratio(self) -> Tensor:
        """π_θ / π_proximal, per token."""
        return (self.policy_logprobs - self.proximal_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


Coefficient = Callable[[Context], Tensor]


def ones(context: Context) -> Tensor:
    """C = 1: negative log-likelihood."""
    return torch.ones_like(context.policy_logprobs)


def clipped_ratio(clip_low: float, clip_high: float) -> Coefficient:
    """C = A·r where the clipped surrogate still has a gradient: r ≤ 1+ε_high if A > 0, r ≥ 1−ε_low if A < 0.

    The log-ratio is clamped to ±20 first, which the surrogate does not do: it matters only for A < 0 and r > e²⁰.
    Source: PPO (arXiv:1707.06347), asymmetric as in DAPO (arXiv:2503.14476).
    """

    def coefficient(context: Context) -> Tensor:
        advantage, ratio = context.batch.advantage, context.ratio
        inside = torch.where(advantage > 0, ratio <= 1 + clip_high, ratio >= 1 - clip_low)
        return advantage * ratio * inside

    return coefficient


def probability(context: Context) -> Tensor:
    """C = p: DFT (arXiv:2508.05629)."""
    return context.policy_logprobs.exp()


def shaped_demonstration(gamma: float) -> Coefficient:
    """C = A·γp/(p+γ)²: LUFFY's off-policy term (arXiv:2504.14945), the gradient of p/(p+γ)."""

    def coefficient(context: Context) -> Tensor:
        p = context.policy_logprobs.exp()
        return context.batch.advantage * gamma * p / (p + gamma) ** 2

    return coefficient
