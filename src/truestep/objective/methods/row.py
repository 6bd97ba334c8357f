"""The parts of a method: terms, statistics, and what the method needs from data and scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from truestep.objective import coefficients, corrections, plan, schedule
from truestep.objective.advantage import Advantage, group_mean
from truestep.objective.coefficients import Coefficient, Context
from truestep.objective.controller import Controller
from truestep.objective.gate import Gate, keep_scored
from truestep.objective.normalise import Normaliser
from truestep.objective.plan import Plan
from truestep.objective.schedule import Schedule
from truestep.records import OPTIONAL_FIELDS, BatchTotals, Origin, TokenBatch

Select = Callable[[TokenBatch], Tensor]  # → bool [M]: which trained tokens a term applies to
# Differentiable (logprobs [M], entropy [M]) → values [M]: for the few objectives without a coefficient form.
Value = Callable[[Tensor, Tensor], Tensor]

ALWAYS_ONE = schedule.constant(1.0)


def of(origin: Origin) -> Select:
    """Return a function that selects the trained tokens of this origin."""
    return lambda batch: batch.origin == int(origin)


POLICY, STORED, EXPERT = of(Origin.POLICY), of(Origin.STORED), of(Origin.EXPERT)
ALL: Select = lambda batch: batch.origin != int(Origin.CONTEXT)  # noqa: E731


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a loss: weight(step) · Σ_selected values ÷ total. Exactly one of coefficient and value is
    given; with a coefficient, the values are −sg(C)·log π.

    ``counted`` selects the tokens of the total, if these are more than the selected ones: a surrogate can sum
    several parts over one denominator. ``needs`` names the optional columns of ``TokenBatch`` that the
    coefficient reads. If ``clips`` is True, a coefficient of 0 on a token with an advantage means that the
    token was clipped. ``correction`` is a factor on the coefficient for the mismatch between engine and
    trainer. ``control`` names a value of the method's controller that multiplies the weight. ``scale`` is a
    factor that depends on the step's global totals (only for ``legacy_scale``)."""

    name: str
    select: Select
    normaliser: Normaliser
    coefficient: Coefficient | None = None
    value: Value | None = None
    weight: Schedule = ALWAYS_ONE
    counted: Select | None = None
    needs: tuple[str, ...] = ()
    clips: bool = False
    correction: Coefficient | None = None
    control: str = ""
    scale: Callable[[BatchTotals], float] | None = None

    def __post_init__(self) -> None:
        if (self.coefficient is None) == (self.value is None):
            raise ValueError(f"term {self.name} needs either a coefficient or a value, and not both")
        unknown = [name for name in self.needs if name not in OPTIONAL_FIELDS]
        if unknown:
            known = ", ".join(OPTIONAL_FIELDS)
            raise ValueError(f"term {self.name}: needs has {unknown[0]!r}, which is not one of {known}")


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One number for the whole step. It is computed before the first update, with the proximal policy, from
    the selected tokens of all updates on all ranks. ``reduce`` is mean, std (unbiased) or quantile (at
    ``level``; always a value that occurs). ``needs`` is as in ``Term``."""

    name: str
    select: Select
    values: Callable[[Context], Tensor]
    reduce: str
    level: float = 0.0
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refill:
    """Replaces groups that the gate drops entirely with groups of other prompts, at most ``rounds`` times."""

    rounds: int


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """DAPO's soft penalty: the reward falls by up to ½ over the last ``fraction`` of the length limit.

    DAPO subtracts up to 1 from rewards of ±1; with rewards of 0 and 1 the same shape has half the size."""

    fraction: float

    def shaped(self, reward: float, num_tokens: int, limit: int) -> float:
        """Return the reward after the penalty."""
        buffer = self.fraction * limit
        over = num_tokens - (limit - buffer)
        return reward if buffer == 0 or over <= 0 else reward - 0.5 * min(1.0, over / buffer)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream of demonstrations in addition to the groups. ``share`` is its share of a step's sequences."""

    share: float


@dataclass(frozen=True, kw_only=True)
class DemonstrationBuffer:
    """A buffer of demonstrations that a gate has set aside. As soon as ``size`` of them wait, the newest are
    used for one more update at the end of the step, by a separate optimizer with ``lr`` and
    ``max_grad_norm``."""

    size: int
    lr: float
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A store of the policy's samples that solved their problem. Once at least the share ``start`` of a
    step's samples is correct, ``share`` of each later step's prompts come from the store. They are partly
    solved problems, drawn with probability ∝ N(k; K/2, σ) if k of K samples were correct the last time. Each
    comes with its stored sample of lowest entropy."""

    share: float
    start: float
    sigma: float
    most_stored: int  # samples per problem


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Cuts an SFT step into ``updates`` updates that share one proximal policy."""

    updates: int


Part = Refill | Overlong | Stream | DemonstrationBuffer | Replay | Refresh | Controller
P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Options of any method that samples: an entropy bonus, a KL term to the policy at the stage's start (k1,
    k2 or k3 in the loss, or in the reward), and a correction for the gap between engine and trainer."""

    entropy_bonus: float = 0.0
    """Weight of the policy's mean entropy, which is added to the objective."""
    kl: str = "none"
    """KL to the policy at the stage's start: "k1", "k2" or "k3" (a term of the loss), or "reward"."""
    kl_coef: float = 0.0
    """Weight of the KL. Set both kl and kl_coef, or neither."""
    correction: str = "none"
    """Weights tokens by π_proximal/π_engine: "truncate", "clamp", "drop", "mask", "sequence" or "geometric"."""
    correction_low: float = 0.5
    """Lower limit of the weight, or of the ratios that are kept."""
    correction_high: float = 2.0
    """Upper limit of the weight, or of the ratios that are kept."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method: a plan, a gate, an advantage and terms, used in this order, and optional ``parts``.

    If ``plan`` is None, nothing is sampled, and only demonstrations are trained on (an SFT stage). ``extras``
    are the method's values for the options that a recipe may set for any method."""

    name: str
    terms: tuple[Term, ...]
    plan: Plan | None = plan.own
    gate: Gate = keep_scored
    advantage: Advantage = group_mean
    statistics: tuple[Statistic, ...] = ()
    parts: tuple[Part, ...] = ()
    extras: Extras = Extras()
    source: str = ""

    def part(self, kind: type[P]) -> P | None:
        """Return the method's part of that kind, if it has one."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def needs(self, column: str) -> bool:
        """Return whether a term or a statistic reads this optional column of ``TokenBatch``."""
        names = [*(t.needs for t in self.terms), *(s.needs for s in self.statistics)]
        return any(column in needs for needs in names)

    @property
    def staleness_fault(self) -> str:
        """Return "" if the method may train on samples of an older version of the policy, or why not.

        Every term with a coefficient on the policy's tokens must have the factor π_proximal/π_behavior (a
        correction), or read the behavior log-probabilities itself. And what is sampled in a step must not depend
        on the memory of the step before it, which is still training then."""
        for kind in (Replay, Controller):
            if self.part(kind) is not None:
                return f"what a step samples depends on what the step before it has learned ({kind.__name__})"
        for term in self.terms:
            if term.coefficient is None or term.select in (EXPERT, STORED):
                continue
            if term.correction is None and "behavior_logprobs" not in term.needs:
                remedy = '; set kl = "reward"' if term.name == "kl" and self.extras.kl in KL_TERMS else ""
                return f"its term {term.name} has no correction by π_proximal/π_behavior{remedy}"
        if self.extras.correction not in ("none", *corrections.REWEIGHTING):
            return (
                f'correction = "{self.extras.correction}" leaves tokens out, but does not weight the others'
            )
        return ""

    @property
    def needs_reference(self) -> bool:
        return self.needs("reference_logprobs")

    @property
    def scores_first(self) -> bool:
        """Whether even the first update of a rollout batch needs a proximal pass."""
        return bool(self.statistics) or self.needs("proximal_entropy")

    @property
    def needs_demonstrations(self) -> bool:
        planned = self.plan is not None and self.plan.needs_demonstrations
        return planned or self.part(Stream) is not None or self.part(DemonstrationBuffer) is not None

    @property
    def updates_per_step(self) -> int:
        """The number of updates in an SFT step."""
        refresh = self.part(Refresh)
        return 1 if refresh is None else refresh.updates


KL_TERMS = {"k1": coefficients.kl_k1, "k2": coefficients.kl_k2, "k3": coefficients.kl_k3}


def complete(row: Method, given: Mapping[str, Any]) -> Method:
    """Return the method with its extra options applied. ``given`` overrides them. Raises ValueError."""
    extras = replace(row.extras, **given)
    for key, known in (("kl", ("none", *KL_TERMS, "reward")), ("correction", corrections.CORRECTIONS)):
        if (value := getattr(extras, key)) not in known:
            raise ValueError(f"method_options.{key}: expected {', '.join(known)}, got {value!r}")
    if (extras.kl == "none") != (extras.kl_coef == 0):
        raise ValueError("method_options.kl: kl and kl_coef belong together; set both or neither")
    terms, statistics = row.terms, row.statistics
    if extras.correction != "none":
        weight = corrections.mismatch_weight(extras.correction, extras.correction_low, extras.correction_high)
        terms = tuple(t if t.coefficient is None else replace(t, correction=weight) for t in terms)
    if extras.kl == "reward":
        charge = corrections.kl_in_reward(extras.kl_coef)

        def charged(part: Any, field: str) -> Any:
            function, needs = getattr(part, field), (*part.needs, "reference_logprobs")
            # Parts that select expert or stored tokens are not charged: they may have no reference values.
            if function is None or part.select in (EXPERT, STORED):
                return part
            return replace(part, **{field: corrections.with_advantage(function, charge)}, needs=needs)

        terms = tuple(charged(t, "coefficient") for t in terms)
        statistics = tuple(charged(s, "values") for s in statistics)
    elif extras.kl != "none":
        kl = KL_TERMS[extras.kl]
        terms = (*terms, _own_term("kl", extras.kl_coef, coefficient=kl, needs=("reference_logprobs",)))
    if extras.entropy_bonus:
        terms = (*terms, _own_term("entropy", extras.entropy_bonus, value=lambda logprobs, entropy: -entropy))
    return replace(row, terms=terms, statistics=statistics, extras=extras)


def _own_term(name: str, weight: float, **given: Any) -> Term:
    """Return a term over the policy's tokens with a token mean."""
    constant = schedule.constant(weight)
    return Term(name=name, select=POLICY, normaliser=Normaliser.TOKENS, weight=constant, **given)
