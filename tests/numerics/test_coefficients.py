"""Every closed form against automatic differentiation of its paper's surrogate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from step_cases import EXACT, check
from torch import Tensor

from truestep.objective import coefficients
from truestep.objective.coefficients import Coefficient, Context
from truestep.records import Origin, TrainSequence
from truestep.testing.reference import surrogate
from truestep.testing.reference.surrogate import ScoredSequence
from truestep.train.packing import pack

NUM = 60
THRESHOLD = 1.1  # nats: some entropies of the draws reach it
Losses = Callable[[ScoredSequence], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A closed form and its surrogate. ``uniform``: one advantage for the whole sequence, as such methods
    have; 0 draws one for each token."""

    coefficient: Coefficient
    losses: Losses
    origin: Origin = Origin.EXPERT
    uniform: float = 0.0
    solved: bool = True
    near: bool = False  # ratios close to 1, where a sequence's range is


def clipped(low: float, high: float, dual: float = 0.0) -> Case:
    return Case(
        coefficient=coefficients.clipped_ratio(low, high, dual),
        losses=partial(surrogate.ppo_clip, eps_low=low, eps_high=high, dual_clip=dual or None),
        origin=Origin.POLICY,
    )


def masked(scored: ScoredSequence) -> list[Tensor]:
    return surrogate.uncertain_only(scored, surrogate.nll(scored), THRESHOLD)


CASES: dict[str, Case] = {
    "ones": Case(coefficient=coefficients.ones, losses=surrogate.nll),
    "probability": Case(coefficient=coefficients.probability, losses=surrogate.dft),
    "uncertainty": Case(coefficient=coefficients.uncertainty, losses=surrogate.chord_phi),
    "proximal_likelihood": Case(
        coefficient=coefficients.proximal_likelihood(0.28),
        losses=partial(surrogate.psft, eps_low=0.2, eps_high=0.28),
    ),
    "sequence_weighted": Case(
        coefficient=coefficients.sequence_weighted(0.7, 0.0, 16.0),
        losses=partial(surrogate.iw_sft, level="sequence", temperature=0.7, low=0.0, high=16.0),
    ),
    "sequence_weighted clamped": Case(
        coefficient=coefficients.sequence_weighted(1.0, 3.0, 16.0),
        losses=partial(surrogate.iw_sft, level="sequence", low=3.0, high=16.0),
    ),
    "token_weighted": Case(
        coefficient=coefficients.token_weighted(0.2, 1.8),
        losses=partial(surrogate.iw_sft, level="token", low=0.2, high=1.8),
    ),
    "advantage": Case(coefficient=coefficients.advantage, losses=surrogate.reinforce, origin=Origin.POLICY),
    "importance": Case(
        coefficient=coefficients.importance, losses=partial(surrogate.luffy, gamma=0.1), origin=Origin.POLICY
    ),
    "clipped_ratio 0.2 0.28": clipped(0.2, 0.28),
    "clipped_ratio 0.2 0.2": clipped(0.2, 0.2),
    "clipped_ratio 0.1 0.5": clipped(0.1, 0.5),
    "clipped_ratio dual": clipped(0.2, 0.2, 3.0),
    "softly_gated": Case(
        coefficient=coefficients.softly_gated(1.0, 1.05),
        losses=partial(surrogate.sapo, tau_positive=1.0, tau_negative=1.05),
        origin=Origin.POLICY,
    ),
    "clipped_weight": Case(
        coefficient=coefficients.clipped_weight(0.2, 0.28),
        losses=partial(surrogate.cispo, eps_low=0.2, eps_high=0.28),
        origin=Origin.POLICY,
    ),
    "clipped_sequence_ratio inside": Case(
        coefficient=coefficients.clipped_sequence_ratio(0.5, 0.5),
        losses=partial(surrogate.gspo, eps_low=0.5, eps_high=0.5),
        origin=Origin.POLICY,
        uniform=0.8,
        near=True,
    ),
    "clipped_sequence_ratio outside": Case(
        coefficient=coefficients.clipped_sequence_ratio(3e-4, 4e-4),
        losses=partial(surrogate.gspo, eps_low=3e-4, eps_high=4e-4),
        origin=Origin.POLICY,
        uniform=0.8,
    ),
    "unshaped_demonstration": Case(
        coefficient=coefficients.unshaped_demonstration, losses=surrogate.unshaped
    ),
    "shaped_replay": Case(
        coefficient=coefficients.shaped_replay(0.1),
        losses=partial(surrogate.exgrpo, beta=0.1),
        origin=Origin.STORED,
    ),
    "mixed_importance": Case(
        coefficient=coefficients.mixed_importance(0.5), losses=partial(surrogate.rl_plus, gamma=0.5)
    ),
    "where_uncertain": Case(
        coefficient=coefficients.where_uncertain(coefficients.ones, "threshold"), losses=masked
    ),
}
for gamma in (0.1, 0.5):
    CASES[f"shaped_demonstration {gamma}"] = Case(
        coefficient=coefficients.shaped_demonstration(gamma), losses=partial(surrogate.luffy, gamma=gamma)
    )
for alpha in (0.1, 0.6):
    CASES[f"trusted {alpha}"] = Case(
        coefficient=coefficients.trusted(alpha), losses=partial(surrogate.trsft, alpha=alpha)
    )
for sign in (-1.0, 1.0):
    CASES[f"entropy_weighted {sign}"] = Case(
        coefficient=coefficients.entropy_weighted(0.5, sign),
        losses=partial(surrogate.srft_imitation, scale=0.5, sign=sign),
    )
for alpha in (1e-6, 0.5, 1.0):
    CASES[f"powered {alpha}"] = Case(
        coefficient=coefficients.powered(alpha), losses=partial(surrogate.power, alpha=alpha)
    )
for correct in (True, False):
    for share in (0.0, 0.375, 1.0):
        CASES[f"implicit_negative {correct} {share}"] = Case(
            coefficient=coefficients.implicit_negative(0.02, 0.98),
            losses=partial(surrogate.nft, low=0.02, high=0.98),
            origin=Origin.POLICY,
            solved=correct,
            uniform=correct - share or 1e-9,  # R − q
        )
    CASES[f"signed_by_verdict {correct}"] = Case(
        coefficient=coefficients.signed_by_verdict(0.1),
        losses=partial(surrogate.srft_samples, scale=0.1),
        origin=Origin.POLICY,
        solved=correct,
    )
for kl in ("k1", "k2", "k3"):
    CASES[f"kl_{kl}"] = Case(
        coefficient=getattr(coefficients, f"kl_{kl}"),
        losses=partial(surrogate.kl_terms, kind=kl),
        origin=Origin.POLICY,
    )

NOT_COEFFICIENTS = {"bounded_exp", "with_options", "sequence_sum", "sequence_mean", "to_go"}


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Log-probabilities from certain to near impossible, ratios in and out of every clip range, both signs of
    A."""

    policy: Tensor
    proximal: Tensor
    reference: Tensor
    entropy: Tensor
    sequence: TrainSequence


def draws(case: Case) -> Draws:
    draw = torch.Generator().manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(NUM, generator=draw, dtype=torch.float64)

    policy = -8 * torch.rand(NUM, generator=draw, dtype=torch.float64) ** 2
    shift = normal()
    shift[:6] = torch.tensor([0.0, 3.0, -3.0, 0.15, -0.15, 1e-9])
    shift = shift / 20 if case.near else shift
    advantage = normal()
    advantage[10] = 0.0
    if case.uniform:
        advantage = torch.full_like(advantage, case.uniform)
    behavior = policy - normal()
    sequence = TrainSequence(
        token_ids=(0,) * (NUM + 1),
        origin=(Origin.CONTEXT,) + (case.origin,) * NUM,
        num_prefix_tokens=0,
        group=0,
        advantage=tuple(advantage.tolist()),
        behavior_logprobs=tuple(behavior.tolist()) if case.origin is not Origin.EXPERT else None,
        solved=case.solved,
    )
    return Draws(
        policy=policy,
        proximal=policy - shift,
        reference=policy + 0.3 - normal(),
        entropy=2 * torch.rand(NUM, generator=draw, dtype=torch.float64),
        sequence=sequence,
    )


def context_of(drawn: Draws) -> Context:
    (batch,) = pack([drawn.sequence], tokens_per_microbatch=NUM + 1, dtype=drawn.policy.dtype)
    return Context(
        policy_logprobs=drawn.policy,
        proximal_logprobs=drawn.proximal,
        entropy=drawn.entropy,
        batch=replace(batch, reference_logprobs=drawn.reference, proximal_entropy=drawn.entropy),
        step=0,
        statistics={"threshold": THRESHOLD},
    )


@pytest.mark.parametrize("name", list(CASES))
def test_coefficient_is_the_surrogate_s_derivative(name: str) -> None:
    case = CASES[name]
    drawn = draws(case)
    leaves = [p.clone().requires_grad_() for p in drawn.policy]
    scored = ScoredSequence(
        sequence=drawn.sequence,
        policy=leaves,
        proximal=drawn.proximal.tolist(),
        reference=drawn.reference.tolist(),
        entropies=list(drawn.entropy),
        proximal_entropies=drawn.entropy.tolist(),
    )
    terms = case.losses(scored)
    grads = torch.autograd.grad(torch.stack(terms).sum(), leaves, materialize_grads=True)
    got = -case.coefficient(context_of(drawn))  # d/dlogπ of −sg(C)·log π
    for g, expected in zip(got, grads, strict=True):
        check(f"coefficient, {name}", float((g - expected).abs() / expected.abs().clamp(min=1e-3)), EXACT)
    inactive = int((got == 0).sum())
    if name.startswith(("clipped_ratio", "proximal_likelihood", "where_uncertain")):
        assert NUM // 6 < inactive < NUM, "the draws must be clipped or masked, and not all"
    elif name.endswith("outside"):
        assert inactive == NUM
    else:
        assert inactive <= 2


def test_every_coefficient_is_tested() -> None:
    """A closed form that is added without its surrogate fails here."""
    public = {
        name
        for name, value in vars(coefficients).items()
        if callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", "") == coefficients.__name__
    }
    public = {name for name in public if not name.startswith("_")} - NOT_COEFFICIENTS
    assert public == {name.split()[0] for name in CASES}


def test_coefficients_are_detached_and_finite_far_out() -> None:
    for name, case in CASES.items():
        drawn = draws(case)
        for shift in (500.0, -500.0):
            moved = replace(
                drawn,
                policy=drawn.policy.float(),
                proximal=drawn.policy.float() + shift,
                reference=drawn.policy.float() + shift,
                entropy=drawn.entropy.float(),
            )
            values = case.coefficient(context_of(moved))
            assert values.shape == (NUM,), name
            assert not values.requires_grad, name
            assert bool(torch.isfinite(values).all()), name


def test_luffy_s_shape() -> None:
    """Greatest at p = γ with ¼, 0.083 at p = 1, like A·p/γ as p → 0 (with A = 1, γ = 0.1)."""
    shaped = coefficients.shaped_demonstration(0.1)
    drawn = draws(replace(CASES["ones"], uniform=0.8))
    for p, expected in ((0.1, 0.25), (1.0, 0.1 / 1.21), (1e-6, 1e-5 / (1 + 1e-5) ** 2)):
        moved = replace(drawn, policy=torch.full_like(drawn.policy, p).log())
        assert float(shaped(context_of(moved))[0]) == pytest.approx(0.8 * expected, rel=1e-12)
