"""Changes to a coefficient: other advantages, or weights for the difference between engine and trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from truestep.objective import coefficients
from truestep.objective.coefficients import Coefficient, Context, bounded_exp, with_options
from truestep.records import Origin


@with_options
def mismatch_weight(context: Context, correction: str, low: float, high: float) -> Tensor:
    """Return each token's weight, from ρ = π_proximal/π_engine, or 1 if the engine did not sample the token.

    truncate: min(ρ, high) (TIS) · clamp: ρ limited to [low, high] · drop: ρ if in [low, high], else 0
    (IcePop) · mask: 1 if in [low, high], else 0 (MIS) · sequence: min(Πρ, high) · geometric: ρ if the
    sequence's geometric mean of ρ is in [low, high], else 0 (ρ itself is not bounded, as in OpenRLHF's code).
    Held by: tests/numerics/test_corrections.py"""
    batch = context.batch
    if batch.behavior_logprobs is None:  # no token of this micro-batch was sampled
        return torch.ones_like(context.policy_logprobs)
    known = batch.origin == int(Origin.POLICY)
    log_rho = torch.where(known, context.proximal_logprobs - batch.behavior_logprobs, 0.0)
    rho = bounded_exp(log_rho)
    inside = (rho >= low) & (rho <= high)
    if correction == "truncate":
        found = rho.clamp(max=high)
    elif correction == "clamp":
        found = rho.clamp(low, high)
    elif correction == "drop":
        found = rho * inside
    elif correction == "mask":
        found = inside.to(rho.dtype)
    elif correction == "sequence":
        found = bounded_exp(coefficients.sequence_sum(log_rho, batch)).clamp(max=high)
    else:
        mean = bounded_exp(coefficients.sequence_mean(log_rho, batch))
        found = rho * ((mean >= low) & (mean <= high))
    return torch.where(known, found, 1.0)


# Those with which a token's weight is its ratio ρ, but for bounds. A mask only leaves tokens out.
REWEIGHTING = ("truncate", "clamp", "drop", "sequence", "geometric")
CORRECTIONS = ("none", "truncate", "clamp", "drop", "mask", "sequence", "geometric")


def with_advantage(coefficient: Coefficient, advantage: Callable[[Context], Tensor]) -> Coefficient:
    """Return the coefficient that uses these advantages instead of the batch's."""
    return lambda c: coefficient(replace(c, batch=replace(c.batch, advantage=advantage(c))))


@with_options
def kl_in_reward(context: Context, beta: float) -> Tensor:
    """Return the advantage A_t − β·Σ_{s≥t} (log π_proximal − log π_ref). A token that the
    policy did not sample keeps its advantage and is not in the sum. With REINFORCE, the gradient is that of
    the reverse KL."""
    own = context.batch.origin == int(Origin.POLICY)
    charge = torch.where(own, context.proximal_logprobs - context.reference_logprobs, 0.0)
    charges = beta * coefficients.to_go(charge, context.batch)
    return torch.where(own, context.advantage - charges, context.advantage)


def whitened(mean: str, std: str) -> Callable[[Context], Tensor]:
    """Return (A − mean)/(std + 1e-8) over a step's sampled tokens. Source: REINFORCE++ (arXiv:2501.03262)."""
    return lambda context: (context.advantage - context.statistics[mean]) / (context.statistics[std] + 1e-8)
