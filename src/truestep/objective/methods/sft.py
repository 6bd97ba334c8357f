"""Rows that train on demonstrations alone.

Evidence of a constant that a paper does not give in plain words: [C] read in the official code, [P] in the
paper, [S] in a secondary source, [U] not verified.
"""

from __future__ import annotations

from dataclasses import replace

from truestep.objective import coefficients, schedule
from truestep.objective.coefficients import Coefficient
from truestep.objective.methods.row import EXPERT, Method, Refresh, Statistic, Term
from truestep.objective.normalise import Normaliser


def _imitation(
    coefficient: Coefficient, normaliser: Normaliser = Normaliser.TOKENS, weight: float = 1.0
) -> Term:
    return Term(
        name="sft",
        select=EXPERT,
        coefficient=coefficient,
        normaliser=normaliser,
        weight=schedule.constant(weight),
    )


def sft(*, normaliser: str = "tokens") -> Method:
    """Negative log-likelihood of demonstrations, one global token mean (or ``normaliser`` = "sequences")."""
    term = _imitation(coefficients.ones, Normaliser(normaliser))
    return Method(name="sft", terms=(term,), plan=None, source="arXiv:2604.23747, app. A")


def dft() -> Method:
    """Dynamic fine-tuning: the likelihood weighted by the model's own probability."""
    return Method(
        name="dft", terms=(_imitation(coefficients.probability),), plan=None, source="arXiv:2508.05629"
    )


def psft(*, clip_high: float = 0.28, updates_per_refresh: int = 8) -> Method:
    """Proximal SFT: the clipped surrogate with A = 1 against the policy of the last refresh. A step's
    sequences are cut into ``updates_per_refresh`` updates, 8 in the released configuration [C] (4 to 16
    studied)."""
    term = _imitation(coefficients.proximal_likelihood(clip_high))
    return Method(
        name="psft",
        terms=(term,),
        plan=None,
        parts=(Refresh(updates=updates_per_refresh),),
        source="arXiv:2508.17784",
    )


def iw_sft(
    *, level: str = "sequence", temperature: float = 1.0, weight_low: float = -1.0, weight_high: float = -1.0
) -> Method:
    """Importance-weighted SFT: exp(τ·mean(log π − log π_reference)) by sequence, clamped to [0, 16], or by
    token, clamped to [0.2, 1.8] [C]. The reference is the stage's start. −1 stands for the level's own
    clamp."""
    clamps = {"sequence": (0.0, 16.0), "token": (0.2, 1.8)}
    if level not in clamps:
        raise ValueError(f"method_options.level: expected sequence or token, got {level!r}")
    low = clamps[level][0] if weight_low < 0 else weight_low
    high = clamps[level][1] if weight_high < 0 else weight_high
    by_level = {
        "sequence": coefficients.sequence_weighted(temperature, low, high),
        "token": coefficients.token_weighted(low, high),
    }
    return Method(
        name="iw_sft",
        terms=(replace(_imitation(by_level[level]), needs=("reference_logprobs",)),),
        plan=None,
        source="arXiv:2507.12856",
    )


def trsft(*, alpha: float = 0.1) -> Method:
    """Trust-region SFT: p/max(p, α) instead of 1 [C]."""
    return Method(
        name="trsft", terms=(_imitation(coefficients.trusted(alpha)),), plan=None, source="arXiv:2512.17636"
    )


def power_sft(*, alpha: float = 0.5) -> Method:
    """The family between the likelihood (α → 0) and DFT (α = 1): the loss (1 − p^α)/α. The default α is
    ours."""
    if not 0 < alpha <= 1:
        raise ValueError(f"method_options.alpha: expected more than 0 and at most 1, got {alpha}")
    term = _imitation(coefficients.powered(alpha))
    return Method(
        name="power_sft", terms=(term,), plan=None, source="the f_α family; arXiv:2508.05629 at α = 1"
    )


def entropy_sft(*, share: float = 0.2) -> Method:
    """The likelihood of the ``share`` of tokens with the highest entropy over the whole step, by the policy
    before it; Z counts that share of all tokens. MIFO's ρ is in an appendix that was not obtained: 0.2 is
    [U]."""
    if not 0 < share <= 1:
        raise ValueError(f"method_options.share: expected more than 0 and at most 1, got {share}")
    term = _imitation(coefficients.where_uncertain(coefficients.ones, "entropy"), weight=1 / share)
    statistic = Statistic(
        name="entropy",
        select=EXPERT,
        values=lambda context: context.proximal_entropy,
        needs=("proximal_entropy",),
        reduce="quantile",
        level=1 - share,
    )
    return Method(
        name="entropy_sft", terms=(term,), plan=None, statistics=(statistic,), source="arXiv:2510.04454"
    )
