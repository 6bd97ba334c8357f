"""Methods that train only on the policy's samples. ``grpo_token_mean`` is the RL of the paper after which the
project is named."""

from __future__ import annotations

from functools import partial

from truestep.objective import coefficients, corrections
from truestep.objective.advantage import Advantage, group_mean_std, leave_one_out, own_mean, raw_reward
from truestep.objective.coefficients import Coefficient
from truestep.objective.gate import drop_degenerate
from truestep.objective.methods.row import POLICY, Method, Overlong, Refill, Statistic, Term
from truestep.objective.normalise import Normaliser


def policy_term(coefficient: Coefficient, normaliser: Normaliser, *, clips: bool = False) -> Term:
    return Term(name="policy", select=POLICY, coefficient=coefficient, normaliser=normaliser, clips=clips)


def clipped_term(clip_low: float, clip_high: float, normaliser: Normaliser, dual_clip: float = 0.0) -> Term:
    """Return the clipped surrogate over the policy's tokens."""
    return policy_term(coefficients.clipped_ratio(clip_low, clip_high, dual_clip), normaliser, clips=True)


def grpo_token_mean(*, clip_low: float = 0.2, clip_high: float = 0.28) -> Method:
    """The paper's RL: advantage R − group mean, asymmetric clipping, token mean over all groups, no KL."""
    term = clipped_term(clip_low, clip_high, Normaliser.TOKENS)
    return Method(name="grpo_token_mean", terms=(term,), source="arXiv:2604.23747, app. A")


def grpo(*, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """GRPO: advantages are normalised per group, and the loss is a mean over sequences of token means. The
    options ``kl`` and ``kl_coef`` set the KL term (β = 0.04, k3)."""
    term = clipped_term(clip_low, clip_high, Normaliser.SEQUENCES)
    return Method(name="grpo", terms=(term,), advantage=group_mean_std, source="arXiv:2402.03300, eq. 3")


def dr_grpo(*, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """Dr. GRPO: GRPO without the std, divided by the constant length limit, not by each sequence's length."""
    term = clipped_term(clip_low, clip_high, Normaliser.MAX_LENGTH)
    return Method(name="dr_grpo", terms=(term,), source="arXiv:2503.20783")


def dapo(
    *, clip_low: float = 0.2, clip_high: float = 0.28, refill_rounds: int = 3, overlong_fraction: float = 0.2
) -> Method:
    """DAPO: GRPO's advantages, asymmetric clipping, a token mean, dynamic sampling (groups with equal rewards
    are replaced), and a soft penalty within the last ``overlong_fraction`` of the length limit."""
    return Method(
        name="dapo",
        terms=(clipped_term(clip_low, clip_high, Normaliser.TOKENS),),
        gate=drop_degenerate,
        advantage=group_mean_std,
        parts=(Refill(rounds=refill_rounds), Overlong(fraction=overlong_fraction)),
        source="arXiv:2503.14476",
    )


def ppo(*, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0) -> Method:
    """PPO's clipped surrogate with a token mean and a second clip for A < 0, as in verl's defaults
    [C]. There is no critic; the group's mean is the baseline."""
    term = clipped_term(clip_low, clip_high, Normaliser.TOKENS, dual_clip)
    return Method(name="ppo", terms=(term,), source="arXiv:1707.06347, eq. 7; arXiv:1912.09729")


def rloo() -> Method:
    """RLOO: the baseline is the mean of the other samples. The loss is a mean of sequence sums; no clip."""
    term = policy_term(coefficients.importance, Normaliser.SEQUENCE_SUMS)
    return Method(name="rloo", terms=(term,), advantage=leave_one_out, source="arXiv:2402.14740")


def _whitened(name: str, advantage: Advantage, clip_low: float, clip_high: float) -> Method:
    """Return a method that whitens advantages over the step's tokens, so that long samples count more [C]."""
    clipped = coefficients.clipped_ratio(clip_low, clip_high)
    coefficient = corrections.with_advantage(clipped, corrections.whitened("mean", "std"))
    moment = partial(Statistic, select=POLICY, values=coefficients.advantage)
    moments = (moment(name="mean", reduce="mean"), moment(name="std", reduce="std"))
    terms, source = (policy_term(coefficient, Normaliser.TOKENS, clips=True),), "arXiv:2501.03262"
    return Method(name=name, terms=terms, advantage=advantage, statistics=moments, source=source)


def reinforce_pp(*, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """REINFORCE++: the clipped surrogate with the reward, whitened over the batch's tokens, as the advantage.
    ``kl = "reward"`` sets the KL in the reward."""
    return _whitened("reinforce_pp", raw_reward, clip_low, clip_high)


def reinforce_pp_baseline(*, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """REINFORCE++-baseline: the advantage is R − the group's mean, whitened over the batch's tokens."""
    return _whitened("reinforce_pp_baseline", own_mean, clip_low, clip_high)


def gspo(*, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Method:
    """GSPO: one ratio per sequence, clipped as a whole; the loss is a mean over sequences of token means."""
    clipped = coefficients.clipped_sequence_ratio(clip_low, clip_high)
    term = policy_term(clipped, Normaliser.SEQUENCES, clips=True)
    return Method(name="gspo", terms=(term,), advantage=group_mean_std, source="arXiv:2507.18071, eq. 5")


def cispo(*, clip_low: float = 0.2, clip_high: float = 0.28) -> Method:
    """CISPO: the clipped ratio is a weight on log π, so no token loses its gradient. Both sides are clipped,
    relative to 1, as in verl [C] (TRL's number is an absolute upper bound)."""
    term = policy_term(coefficients.clipped_weight(clip_low, clip_high), Normaliser.TOKENS)
    return Method(name="cispo", terms=(term,), advantage=group_mean_std, source="arXiv:2506.13585, eq. 4")


def nft(*, share_low: float = 0.02, share_high: float = 0.98) -> Method:
    """Negative-aware fine-tuning, for rewards of 0 and 1. Let q be a group's share of correct samples. NFT
    maximizes log r of correct samples and log((1 − q·r)/(1 − q)) of others, both scaled by 1 − q
    (``normalize`` = 1 in the official code [C]). All-equal groups are dropped. With one update per rollout
    batch, this is Dr. GRPO. The official code has 1,000 tokens in place of the length limit [C]."""
    term = policy_term(coefficients.implicit_negative(share_low, share_high), Normaliser.MAX_LENGTH)
    return Method(name="nft", terms=(term,), gate=drop_degenerate, source="arXiv:2505.18116")


def sapo(*, temperature_right: float = 1.0, temperature_wrong: float = 1.05) -> Method:
    """SAPO: a soft gate at r = 1 (narrower if A < 0) replaces the clip; mean of the token means [C]."""
    term = policy_term(coefficients.softly_gated(temperature_right, temperature_wrong), Normaliser.SEQUENCES)
    return Method(name="sapo", terms=(term,), advantage=group_mean_std, source="arXiv:2511.20347")
