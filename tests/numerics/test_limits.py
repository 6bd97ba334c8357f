"""Where one method's parameter goes to its end, the step is another method's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from step_cases import MAX_LENGTH, check, close, flat, plan_for, relative_error, sgd_gradient
from table_cases import models, policies, row_gradient, sequences
from test_coefficients import CASES, context_of, draws
from torch import Tensor

from truestep.objective import coefficients, plan
from truestep.objective.advantage import GroupView
from truestep.objective.methods import build
from truestep.objective.plan import Done, PlanState
from truestep.records import Origin, Round, TrainSequence
from truestep.testing.reference.loss import gradient, score
from truestep.testing.reference.rows import ROWS, Part, Row, expert, own, row_loss
from truestep.testing.reference.surrogate import reinforce, unshaped
from truestep.train.packing import pack


def reference(parts: tuple[Part, ...], given: list[TrainSequence]) -> dict[str, Tensor]:
    return gradient(models()[0], row_loss(Row(parts=parts), score(*models(), given), MAX_LENGTH))


def of(*kinds: str) -> list[TrainSequence]:
    return sequences(kinds=kinds)


def test_luffy_with_a_large_gamma_is_plain_importance_sampling() -> None:
    """γ·C → A·p: the gap falls as 1/γ."""
    case = CASES["shaped_demonstration 0.1"]
    context = context_of(draws(case))
    plain = coefficients.unshaped_demonstration(context)
    gaps = [
        float((gamma * coefficients.shaped_demonstration(gamma)(context) - plain).abs().max())
        for gamma in (1e3, 1e6, 1e9)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(1e3, rel=0.01)
    assert gaps[2] < 1e-8
    demos = of("demonstration")
    scaled = row_gradient("luffy", demos, options={"gamma": 1e5, "entropy_bonus": 0})
    expected = reference((Part(about=expert, losses=unshaped, normaliser="drg"),), demos)
    close("limit, luffy", {k: 1e5 * v for k, v in scaled.items()}, expected, 1e-4)


def test_rl_plus_leaves_alone_what_is_certain() -> None:
    """p = p_proximal → 1: the coefficient falls to 0 as (1 − p)^γ, and is A there where γ = 0."""
    context = context_of(draws(CASES["mixed_importance"]))

    def at(gap: float, exponent: float) -> Tensor:
        logprobs = torch.full_like(context.policy_logprobs, -gap)
        certain = replace(context, policy_logprobs=logprobs, proximal_logprobs=logprobs)
        return coefficients.mixed_importance(exponent)(certain)

    assert not at(0.0, 0.5).any()
    far, near = (at(gap, 0.5).abs().max() for gap in (1e-4, 1e-8))
    assert float(far / near) == pytest.approx(100.0, rel=0.01)
    assert torch.equal(at(0.0, 0.0), context.advantage)


def test_prefix_rft_without_a_prefix_is_dr_grpo() -> None:
    given = [s for s in of("own", "prefix") if s.origin.count(Origin.EXPERT) == 0]
    assert len(given) > len(of("own")), "one continues a prefix of no length"
    close("limit, prefix_rft", row_gradient("prefix_rft", given), row_gradient("dr_grpo", given))


def test_prefix_rft_that_masks_nothing_is_dr_grpo_over_all_tokens() -> None:
    given = of("own", "prefix")
    alone = [
        replace(s, origin=tuple(Origin.POLICY if o is Origin.EXPERT else o for o in s.origin)) for s in given
    ]
    close("limit, prefix_rft", row_gradient("prefix_rft", given, options={"entropy_share": 1.0}),
          row_gradient("dr_grpo", alone))  # fmt: skip


def hpt_step(most_correct: int) -> dict[str, Tensor]:
    """HPT's gate over a group of two samples, one of them right, and a demonstration; then its step."""
    group = sequences(groups=(1,))
    origins = tuple(s.origin[-1] for s in group)
    assert origins == (Origin.POLICY, Origin.POLICY, Origin.EXPERT)
    members = GroupView(rewards=(1.0, 0.0, 1.0), solved=(True, False, True), origins=origins)
    decision = build("hpt", {"most_correct": most_correct}).gate(members)
    kept = [s for s, keep in zip(group, decision.keep, strict=True) if keep]
    return row_gradient("hpt", kept, options={"entropy_bonus": 0})


def test_hpt_without_imitation_is_dr_grpo_without_a_clip() -> None:
    samples = [s for s in sequences(groups=(1,)) if s.origin.count(Origin.POLICY)]
    unclipped = row_gradient("dr_grpo", samples, options={"clip_low": 1.0, "clip_high": 1e9})
    close("limit, hpt γ = −1", hpt_step(-1), unclipped)
    assert relative_error(unclipped, row_gradient("dr_grpo", samples)) > 1e-3


def test_hpt_that_always_imitates_is_sft() -> None:
    demos = [s for s in sequences(groups=(1,)) if s.origin.count(Origin.EXPERT)]
    close("limit, hpt γ = n", hpt_step(8), row_gradient("sft", demos))


@pytest.mark.parametrize(("mu", "other"), [(0.0, "super_rl"), (1.0, "sft")])
def test_chord_with_one_part_alone(mu: float, other: str) -> None:
    """μ = 0: the clipped token mean of the samples (SuperRL's policy part); μ = 1: SFT."""
    given = sequences()
    expected = {
        "sft": lambda: row_gradient("sft", given),
        "super_rl": lambda: reference((ROWS["super_rl"].parts[0],), given),
    }[other]()
    close("limit, chord_mu", row_gradient("chord_mu", given, options={"mu_peak": mu}), expected)


@pytest.mark.parametrize(("options", "other"), [({"alpha": 1e-200}, "sft"), ({"alpha": 1.0}, "dft")])
def test_trsft_between_likelihood_and_dft(options: dict[str, Any], other: str) -> None:
    demos = of("demonstration")
    close("limit, trsft", row_gradient("trsft", demos, options=options), row_gradient(other, demos))


@pytest.mark.parametrize(("options", "other"), [({"alpha": 1e-200}, "sft"), ({"alpha": 1.0}, "dft")])
def test_power_sft_between_likelihood_and_dft(options: dict[str, Any], other: str) -> None:
    demos = of("demonstration")
    close("limit, power_sft", row_gradient("power_sft", demos, options=options), row_gradient(other, demos))


@pytest.mark.parametrize("penalty", [0.0, -0.3])
def test_one_token_rollouts_are_dft_in_expectation(penalty: float) -> None:
    """REINFORCE on tokens drawn from the policy, 1 for the demonstration's and β < 0 for others
    (arXiv:2509.26313), has the expected coefficient (1 − β)·p: DFT at another learning rate, which is why OTR
    is no row of its own."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    logprobs = logits.log_softmax(-1)
    rewards = torch.full((9,), penalty, dtype=torch.float64)
    rewards[4] = 1.0
    (expected,) = torch.autograd.grad(
        (logprobs.exp().detach() * rewards * logprobs).sum(), logits, retain_graph=True
    )
    (found,) = torch.autograd.grad((1 - penalty) * logprobs[4].exp().detach() * logprobs[4], logits)
    assert float((found - expected).norm() / expected.norm()) < 1e-12


def test_nft_at_the_first_update_is_dr_grpo() -> None:
    """With ratios of 1 a correct sample weighs 1 − q and a wrong one −q: R minus the group's mean."""
    given = [replace(s, advantage=s.solved - 0.375) for s in of("own")]
    batches = pack(given, tokens_per_microbatch=10_000, dtype=torch.float64)
    gradients = {
        name: sgd_gradient(policies()[0], batches, plan_for(build(name, {}), max_length=MAX_LENGTH))
        for name in ("nft", "dr_grpo")
    }
    close("limit, nft", gradients["nft"], gradients["dr_grpo"])
    assert relative_error(row_gradient("nft", given), row_gradient("dr_grpo", given)) > 1e-3


def test_entropy_sft_of_all_tokens_is_sft() -> None:
    demos = of("demonstration")
    close(
        "limit, entropy_sft",
        row_gradient("entropy_sft", demos, options={"share": 1.0}),
        row_gradient("sft", demos),
    )


def test_iw_sft_with_a_closed_clamp_is_sft() -> None:
    demos = of("demonstration")
    for level in ("sequence", "token"):
        options = {"level": level, "weight_low": 1.0, "weight_high": 1.0}
        close("limit, iw_sft", row_gradient("iw_sft", demos, options=options), row_gradient("sft", demos))


def test_at_the_first_update_every_ratio_is_1() -> None:
    """With the policy as its own proximal policy every clipped, weighted or sequence ratio is 1."""
    given = of("own")
    batches = pack(given, tokens_per_microbatch=10_000, dtype=torch.float64)
    expected = reference((Part(about=own, losses=reinforce, normaliser="tok"),), given)
    for name in ("grpo_token_mean", "ppo", "cispo", "dapo"):
        got = sgd_gradient(policies()[0], batches, plan_for(build(name, {}), max_length=MAX_LENGTH))
        close("limit, first update", got, expected)
    sums = reference((Part(about=own, losses=reinforce, normaliser="sum"),), given)
    close("limit, first update", sgd_gradient(policies()[0], batches, plan_for(build("rloo", {}))), sums)
    means = reference((Part(about=own, losses=reinforce, normaliser="seq"),), given)
    for name in ("grpo", "gspo", "sapo"):
        close("limit, first update", sgd_gradient(policies()[0], batches, plan_for(build(name, {}))), means)


def test_ppo_without_its_second_clip_is_one_clip() -> None:
    given = of("own")
    close("limit, ppo", row_gradient("ppo", given, options={"dual_clip": 0}),
          row_gradient("grpo_token_mean", given, options={"clip_high": 0.2}))  # fmt: skip


def test_legacy_scale_is_n_over_w_times_the_global_mean() -> None:
    given = sequences()
    bare = {"entropy_bonus": 0}
    for name in ("luffy", "trapo"):
        got = row_gradient(name, given, options={"legacy_scale": 8, **bare})
        expected = {k: v * len(given) / 8 for k, v in row_gradient(name, given, options=bare).items()}
        close("legacy scale", got, expected)
    demos = of("demonstration")
    got = row_gradient("hpt", demos, options={"legacy_scale": 8, "legacy_microbatches": 5})
    close("legacy scale", got, {k: 5 * v for k, v in row_gradient("sft", demos).items()})


def test_plans_at_their_ends() -> None:
    """No prefix, a whole demonstration, no hint: what a plan asks for where its schedule ends."""
    uft = build("uft", {"prefix_steps": 10}).plan
    assert uft is not None
    assert uft(PlanState(step=10, num_samples=4, draw=0.99)) == plan.own(PlanState(step=0, num_samples=4))
    late = plan.one_prefix(lambda step: 0.0, 0.0)(PlanState(step=0, num_samples=4, draw=0.7))
    assert not isinstance(late, Done)
    assert late[1] == Round(num_samples=1, prefix=0.0)


def test_the_limits_can_fail() -> None:
    demos = of("demonstration")
    near = row_gradient("trsft", demos, options={"alpha": 1.0 - 1e-3})
    error = relative_error(near, row_gradient("dft", demos))
    assert error > 1e-6
    check("limits can fail", 0.0)
    assert float(flat(near).norm()) > 0
