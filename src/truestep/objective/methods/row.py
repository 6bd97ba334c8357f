"""What a row of the table is made of: terms, statistics, and what a method asks of data, buffers and scoring
passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from truestep.objective import coefficients, corrections, plan, schedule
from truestep.objective.advantage import Advantage, group_mean
from truestep.objective.coefficients import Coefficient, Context
from truestep.objective.controller import Controller
from truestep.objective.gate import Gate, keep_scored
from truestep.objective.normalise import Normaliser
from truestep.objective.plan import Plan
from truestep.objective.schedule import Schedule
from truestep.records import BatchTotals, Kind, TokenBatch

Select = Callable[[TokenBatch], Tensor]  # → bool [M]: which trained tokens a term is about
# Differentiable (logprobs [M], entropy [M]) → values [M]: for the few objectives without a coefficient form.
Value = Callable[[Tensor, Tensor], Tensor]

ALWAYS_ONE = schedule.constant(1.0)


def select_kind(*kinds: Kind) -> Select:
    def select(batch: TokenBatch) -> Tensor:
        found = batch.kind == int(kinds[0])
        for kind in kinds[1:]:
            found = found | (batch.kind == int(kind))
        return found

    return select


ALL: Select = lambda batch: batch.kind >= 0  # noqa: E731
DEMO = select_kind(Kind.DEMO)
REPLAY = select_kind(Kind.REPLAY)
EXPERT: Select = lambda batch: batch.is_expert  # noqa: E731
OWN: Select = lambda batch: ~batch.is_expert & (batch.kind != int(Kind.REPLAY))  # noqa: E731


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a loss: weight(step) · Σ_selected values ÷ total. Exactly one of coefficient and value is
    given; with a coefficient the values are −sg(C)·log π.

    ``counted`` says which tokens make the total where these are more than the selected ones: parts that one
    surrogate of the paper sums under one denominator. ``control`` names a value of the method's controller
    that multiplies the weight. ``scale`` multiplies it by a function of the step's global totals
    (``legacy_scale`` only).
    """

    name: str
    select: Select
    normaliser: Normaliser
    coefficient: Coefficient | None = None
    value: Value | None = None
    weight: Schedule = ALWAYS_ONE
    counted: Select | None = None
    control: str = ""
    scale: Callable[[BatchTotals], float] | None = None

    def __post_init__(self) -> None:
        if (self.coefficient is None) == (self.value is None):
            raise ValueError(f"term {self.name}: give a coefficient or a value, one of them")


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One number of the whole step: over the selected tokens of all its updates on all ranks, by the proximal
    policy, before the first update. ``reduce`` is mean, std (unbiased) or quantile (``level``; a value that
    occurs)."""

    name: str
    select: Select
    values: Callable[[Context], Tensor]
    reduce: str
    level: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DemonstrationBuffer:
    """Demonstrations that a gate has set aside; as soon as ``size`` of them wait, the newest are one update
    of their own, after the step's others, with an optimizer of their own at ``lr`` and ``max_grad_norm``."""

    size: int
    lr: float
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Correct own samples are stored by problem. From the first step on whose share of right samples reached
    ``start``, ``share`` of a step's prompts come from the store: partly solved ones, by N(k; K/2, σ) of the
    number k right of K the last time, each with its stored sample of the lowest entropy."""

    share: float
    start: float
    sigma: float
    most_stored: int  # of one problem


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    ``plan`` None: nothing is sampled, demonstrations alone are trained on (an SFT stage). ``refill_rounds``
    lets a gate that drops groups ask for more prompts; ``needs_proximal`` asks for a scoring pass even where
    one update per rollout batch would not need it, as statistics always do. ``stream_share`` of a step's
    sequences are demonstrations from a stream beside the groups. ``updates_per_step`` cuts an SFT step into
    updates that share one proximal policy.
    """

    name: str
    terms: tuple[Term, ...]
    plan: Plan | None = plan.own
    gate: Gate = keep_scored
    advantage: Advantage = group_mean
    refill_rounds: int = 0
    needs_proximal: bool = False
    needs_reference: bool = False
    needs_demonstrations: bool = False
    shown_fraction: float = 0.0  # of a solution, at most, that a hint shows in the prompt
    statistics: tuple[Statistic, ...] = ()
    controller: Controller | None = None
    stream_share: float = 0.0
    buffer: DemonstrationBuffer | None = None
    replay: Replay | None = None
    updates_per_step: int = 1
    overlong_fraction: float = 0.0  # DAPO's soft penalty on the last part of the length limit
    entropy_bonus: float = 0.0
    kl: str = "none"  # none, k1, k2, k3 (in the loss), reward
    kl_coef: float = 0.0
    source: str = ""

    @property
    def scores_first(self) -> bool:
        """Whether even the first update needs the proximal pass."""
        return self.needs_proximal or bool(self.statistics)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What any row that samples may have on top; None leaves the row's own value."""

    entropy_bonus: float | None = None
    kl: str | None = None
    kl_coef: float | None = None
    correction: str = "none"
    correction_low: float = 0.5
    correction_high: float = 2.0


KL_TERMS = {"k1": coefficients.kl_k1, "k2": coefficients.kl_k2, "k3": coefficients.kl_k3}


def complete(row: Method, extras: Extras) -> Method:
    """The row with its entropy bonus, KL and correction laid over its terms. Raises ValueError for unknown
    names."""
    given = {
        k: getattr(extras, k) for k in ("entropy_bonus", "kl", "kl_coef") if getattr(extras, k) is not None
    }
    row = replace(row, **given)
    if row.kl not in ("none", "reward", *KL_TERMS):
        raise ValueError(f"method_options.kl: expected none, {', '.join(KL_TERMS)} or reward, got {row.kl!r}")
    if extras.correction not in corrections.CORRECTIONS:
        raise ValueError(
            f"method_options.correction: expected {', '.join(corrections.CORRECTIONS)}, got {extras.correction!r}"
        )
    if (row.kl == "none") != (row.kl_coef == 0):
        raise ValueError("method_options.kl: kl and kl_coef go together: give both or neither")
    terms, statistics = row.terms, row.statistics
    if extras.correction != "none":
        weight = corrections.mismatch_weight(extras.correction, extras.correction_low, extras.correction_high)
        terms = tuple(_recoefficient(t, lambda c: corrections.weighted(c, weight)) for t in terms)
    if row.kl == "reward":
        charge = corrections.kl_in_reward(row.kl_coef)
        terms = tuple(_recoefficient(t, lambda c: corrections.with_advantage(c, charge)) for t in terms)
        statistics = tuple(
            replace(s, values=corrections.with_advantage(s.values, charge)) for s in statistics
        )
    elif row.kl != "none":
        terms = (*terms, _own_term("kl", row.kl_coef, coefficient=KL_TERMS[row.kl]))
    if row.entropy_bonus:
        terms = (*terms, _own_term("entropy", row.entropy_bonus, value=lambda logprobs, entropy: -entropy))
    needs_reference = row.needs_reference or row.kl != "none"
    return replace(row, terms=terms, statistics=statistics, needs_reference=needs_reference)


def _recoefficient(term: Term, change: Callable[[Coefficient], Coefficient]) -> Term:
    return term if term.coefficient is None else replace(term, coefficient=change(term.coefficient))


def _own_term(
    name: str, weight: float, *, coefficient: Coefficient | None = None, value: Value | None = None
) -> Term:
    """A term over own tokens, token mean."""
    return Term(
        name=name,
        select=OWN,
        normaliser=Normaliser.TOKENS,
        coefficient=coefficient,
        value=value,
        weight=schedule.constant(weight),
    )
