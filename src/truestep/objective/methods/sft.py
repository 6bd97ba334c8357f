"""Methods that train only on demonstrations.

The letters in brackets are explained in ``methods/__init__.py``.
"""

from __future__ import annotations

from dataclasses import replace

from truestep.objective import coefficients, schedule
from truestep.objective.coefficients import Coefficient
from truestep.objective.methods.row import EXPERT, Method, Refresh, Statistic, Term
from truestep.objective.normalise import Normaliser


def imitation_term(
    coefficient: Coefficient = coefficients.ones,
    weight: float = 1.0,
    normaliser: Normaliser = Normaliser.TOKENS,
) -> Term:
    """Return a term over the expert's tokens."""
    constant = schedule.constant(weight)
    return Term(name="sft", select=EXPERT, coefficient=coefficient, normaliser=normaliser, weight=constant)


def highest_entropy(name: str, share: float) -> Statistic:
    """Return a statistic: the entropy that the share ``share`` of the step's expert tokens reaches."""
    return Statistic(
        name=name,
        select=EXPERT,
        values=lambda context: context.proximal_entropy,
        needs=("proximal_entropy",),
        reduce="quantile",
        level=1 - share,
    )


def sft(*, normaliser: str = "tokens") -> Method:
    """Negative log-likelihood of demonstrations, by default as a token mean (see ``Normaliser``)."""
    term = imitation_term(normaliser=Normaliser(normaliser))
    return Method(name="sft", terms=(term,), plan=None, source="arXiv:2604.23747, app. A")


def dft() -> Method:
    """Dynamic fine-tuning: the likelihood is weighted by the model's probability of the token."""
    term = imitation_term(coefficients.probability)
    return Method(name="dft", terms=(term,), plan=None, source="arXiv:2508.05629")


def psft(*, clip_high: float = 0.28, updates_per_refresh: int = 8) -> Method:
    """Proximal SFT: the clipped surrogate with A = 1, relative to the policy at the last refresh. A step's
    sequences are cut into ``updates_per_refresh`` updates. The released configuration has 8 [C]; 4 to 16 were
    studied."""
    term = imitation_term(coefficients.proximal_likelihood(clip_high))
    refresh = Refresh(updates=updates_per_refresh)
    return Method(name="psft", terms=(term,), plan=None, parts=(refresh,), source="arXiv:2508.17784")


def iw_sft(
    *, level: str = "sequence", temperature: float = 1.0, weight_low: float = -1.0, weight_high: float = -1.0
) -> Method:
    """Importance-weighted SFT. A sequence has the weight exp(τ·mean(log π − log π_reference)), clamped to
    [0, 16]. At ``level`` = "token", a token has the weight π/π_reference, clamped to [0.2, 1.8] [C]. The
    reference is the policy at the stage's start. A bound of −1 stands for the default of the level."""
    if level not in ("sequence", "token"):
        raise ValueError(f"method_options.level: expected sequence or token, got {level!r}")
    low, high = (0.0, 16.0) if level == "sequence" else (0.2, 1.8)
    low, high = low if weight_low < 0 else weight_low, high if weight_high < 0 else weight_high
    if level == "sequence":
        weighted = coefficients.sequence_weighted(temperature, low, high)
    else:
        weighted = coefficients.token_weighted(low, high)
    term = replace(imitation_term(weighted), needs=("reference_logprobs",))
    return Method(name="iw_sft", terms=(term,), plan=None, source="arXiv:2507.12856")


def trsft(*, alpha: float = 0.1) -> Method:
    """Trust-region SFT: the coefficient is p/max(p, α) instead of 1 [C]."""
    term = imitation_term(coefficients.trusted(alpha))
    return Method(name="trsft", terms=(term,), plan=None, source="arXiv:2512.17636")


def power_sft(*, alpha: float = 0.5) -> Method:
    """The loss (1 − p^α)/α, which lies between the likelihood (α → 0) and DFT (α = 1). 0.5 is our choice."""
    if not 0 < alpha <= 1:
        raise ValueError(f"method_options.alpha: expected more than 0 and at most 1, got {alpha}")
    term = imitation_term(coefficients.powered(alpha))
    source = "the f_α family; arXiv:2508.05629 at α = 1"
    return Method(name="power_sft", terms=(term,), plan=None, source=source)


def entropy_sft(*, share: float = 0.2) -> Method:
    """SFT on the ``share`` of the step's tokens that have the highest entropy under the policy before the
    step. Z counts that share of all tokens. MIFO's ρ is in an appendix that we did not obtain, so 0.2 is
    not verified [U]."""
    if not 0 < share <= 1:
        raise ValueError(f"method_options.share: expected more than 0 and at most 1, got {share}")
    term = imitation_term(coefficients.where_uncertain(coefficients.ones, "entropy"), weight=1 / share)
    statistics, source = (highest_entropy("entropy", share),), "arXiv:2510.04454"
    return Method(name="entropy_sft", terms=(term,), plan=None, statistics=statistics, source=source)
