"""Every closed form against automatic differentiation of its paper's surrogate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_cases import EXACT, check
from torch import Tensor

from truestep.objective import coefficients
from truestep.objective.coefficients import Coefficient, Context
from truestep.records import Kind, TrainSequence
from truestep.reference import surrogate
from truestep.reference.surrogate import ScoredSequence
from truestep.train.assemble import pack

NUM = 60
CASES: dict[str, tuple[Coefficient, Callable[..., list[Tensor]], dict[str, Any], Kind]] = {
    "ones": (coefficients.ones, surrogate.nll, {}, Kind.DEMO),
    "probability": (coefficients.probability, surrogate.dft, {}, Kind.DEMO),
}
for low, high in ((0.2, 0.28), (0.2, 0.2), (0.1, 0.5)):
    CASES[f"clipped_ratio {low} {high}"] = (
        coefficients.clipped_ratio(low, high),
        surrogate.ppo_clip,
        {"eps_low": low, "eps_high": high},
        Kind.ON,
    )
for gamma in (0.1, 0.5):
    CASES[f"shaped_demonstration {gamma}"] = (
        coefficients.shaped_demonstration(gamma),
        surrogate.luffy,
        {"gamma": gamma},
        Kind.DEMO,
    )


def draws(kind: Kind) -> tuple[Tensor, list[float], TrainSequence]:
    """Log-probabilities from certain to near impossible, ratios in and out of every clip range, both signs of A."""
    draw = torch.Generator().manual_seed(4)
    policy = -8 * torch.rand(NUM, generator=draw, dtype=torch.float64) ** 2
    shift = torch.randn(NUM, generator=draw, dtype=torch.float64)
    shift[:6] = torch.tensor([0.0, 3.0, -3.0, 0.15, -0.15, 1e-9])
    advantage = torch.randn(NUM, generator=draw, dtype=torch.float64)
    advantage[10] = 0.0
    sequence = TrainSequence(
        token_ids=(0,) * (NUM + 1),
        trained=(False,) + (True,) * NUM,
        num_prefix_tokens=0,
        group=0,
        kind=kind,
        advantage=tuple(advantage.tolist()),
    )
    return policy, (policy - shift).tolist(), sequence


def context_of(policy: Tensor, proximal: list[float], sequence: TrainSequence) -> Context:
    (batch,) = pack([sequence], tokens_per_microbatch=NUM + 1, dtype=torch.float64)
    return Context(
        policy_logprobs=policy,
        proximal_logprobs=torch.tensor(proximal, dtype=torch.float64),
        entropy=torch.zeros_like(policy),
        batch=batch,
        step=0,
    )


@pytest.mark.parametrize("name", list(CASES))
def test_coefficient_is_the_surrogate_s_derivative(name: str) -> None:
    coefficient, losses, options, kind = CASES[name]
    policy, proximal, sequence = draws(kind)
    leaves = [p.clone().requires_grad_() for p in policy]
    terms = losses(ScoredSequence(sequence=sequence, policy=leaves, proximal=proximal), **options)
    grads = torch.autograd.grad(torch.stack(terms).sum(), leaves)
    got = -coefficient(context_of(policy, proximal, sequence))  # d/dlogπ of −sg(C)·log π
    for g, expected in zip(got, grads, strict=True):
        check(f"coefficient, {name}", float((g - expected).abs() / expected.abs().clamp(min=1e-3)), EXACT)
    if name.startswith("clipped"):
        inactive = int((got == 0).sum())
        assert NUM // 6 < inactive < NUM, "the draws must be clipped on either side, and not all"


def test_every_coefficient_is_tested() -> None:
    """A closed form that is added without its surrogate fails here."""
    public = {
        name
        for name, value in vars(coefficients).items()
        if callable(value) and not isinstance(value, type) and getattr(value, "__module__", "") == coefficients.__name__
    }
    assert public == {name.split()[0] for name in CASES}


def test_coefficients_are_detached_and_finite_far_out() -> None:
    policy, _, sequence = draws(Kind.ON)
    context = context_of(policy.float(), (policy + 500).tolist(), sequence)
    far = context_of(policy.float(), (policy - 500).tolist(), sequence)
    for name, (coefficient, *_) in CASES.items():
        for c in (context, far):
            values = coefficient(c)
            assert values.shape == (NUM,), name
            assert not values.requires_grad, name
            assert bool(torch.isfinite(values).all()), name
