"""The table of methods: a method is a row (plan + gate + advantage + terms), never a branch in a trainer.

``build("paper", {"clip_high": 0.3})`` gives a Method; the training step sees its terms and never its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from truestep.objective import coefficients, schedule
from truestep.objective.advantage import group_mean, group_mean_std
from truestep.objective.coefficients import Coefficient
from truestep.objective.gate import Gate, drop_degenerate, keep_scored
from truestep.objective.normalise import Normaliser
from truestep.objective.schedule import Schedule
from truestep.records import Kind, TokenBatch

Select = Callable[[TokenBatch], Tensor]  # → bool [M]: which trained tokens a term is about
# Differentiable (logprobs [M], entropy [M]) → values [M]: for the few objectives without a coefficient form.
Value = Callable[[Tensor, Tensor], Tensor]


ALWAYS_ONE = schedule.constant(1.0)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a loss: weight(step) · Σ_selected values ÷ total. Exactly one of coefficient and value is given;
    with a coefficient the values are −sg(C)·log π."""

    name: str
    select: Select
    normaliser: Normaliser
    coefficient: Coefficient | None = None
    value: Value | None = None
    weight: Schedule = ALWAYS_ONE

    def __post_init__(self) -> None:
        if (self.coefficient is None) == (self.value is None):
            raise ValueError(f"term {self.name}: give a coefficient or a value, one of them")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    ``plan`` names an entry of rollout.plan.PLANS (that room lies above this one); ``refill_rounds`` lets a gate that
    drops groups ask for more prompts; ``needs_proximal`` asks for a scoring pass even where one update per rollout
    batch would not need it.
    """

    name: str
    terms: tuple[Term, ...]
    plan: str = "own"
    gate: Gate = keep_scored
    advantage: Callable[..., list[float | None]] = group_mean
    refill_rounds: int = 0
    needs_proximal: bool = False
    overlong_fraction: float = 0.0  # DAPO's soft penalty on the last part of the length limit
    source: str = ""


def select_kind(*kinds: Kind) -> Select:
    def select(batch: TokenBatch) -> Tensor:
        found = batch.kind == int(kinds[0])
        for kind in kinds[1:]:
            found = found | (batch.kind == int(kind))
        return found

    return select


ON = select_kind(Kind.ON)
DEMO = select_kind(Kind.DEMO)


def _with_entropy(terms: tuple[Term, ...], bonus: float) -> tuple[Term, ...]:
    """Append −c·H over own tokens, a real loss: its gradient runs through the whole distribution."""
    if bonus == 0:
        return terms
    return (
        *terms,
        Term(
            name="entropy",
            select=ON,
            normaliser=Normaliser.TOKENS,
            value=lambda logprobs, entropy: -entropy,
            weight=schedule.constant(bonus),
        ),
    )


def _policy_term(clip_low: float, clip_high: float, normaliser: Normaliser) -> tuple[Term, ...]:
    coefficient = coefficients.clipped_ratio(clip_low, clip_high)
    return (Term(name="policy", select=ON, coefficient=coefficient, normaliser=normaliser),)


def sft(*, normaliser: str = "tokens") -> Method:
    """Negative log-likelihood of demonstrations, one global token mean (or sequence mean)."""
    term = Term(name="sft", select=DEMO, coefficient=coefficients.ones, normaliser=Normaliser(normaliser))
    return Method(name="sft", terms=(term,), plan="demonstration", source="arXiv:2604.23747, app. A")


def dft() -> Method:
    """Dynamic fine-tuning: the likelihood weighted by the model's own probability."""
    term = Term(name="sft", select=DEMO, coefficient=coefficients.probability, normaliser=Normaliser.TOKENS)
    return Method(name="dft", terms=(term,), plan="demonstration", source="arXiv:2508.05629")


def paper(*, clip_low: float = 0.2, clip_high: float = 0.28, entropy_bonus: float = 0.0) -> Method:
    """The paper's RL: R − group mean, asymmetric clipping, token-level global mean, no KL. All-equal groups count."""
    terms = _with_entropy(_policy_term(clip_low, clip_high, Normaliser.TOKENS), entropy_bonus)
    return Method(name="paper", terms=terms, source="arXiv:2604.23747, app. A")


def grpo(*, clip_low: float = 0.2, clip_high: float = 0.2, entropy_bonus: float = 0.0) -> Method:
    """Group-normalised advantages, mean over each sequence, then over sequences; without the KL term (β = 0)."""
    terms = _with_entropy(_policy_term(clip_low, clip_high, Normaliser.SEQUENCES), entropy_bonus)
    return Method(name="grpo", terms=terms, advantage=group_mean_std, source="arXiv:2402.03300, eq. 3")


def dr_grpo(*, clip_low: float = 0.2, clip_high: float = 0.2, entropy_bonus: float = 0.0) -> Method:
    """No std, and the constant length limit instead of each sequence's own length."""
    terms = _with_entropy(_policy_term(clip_low, clip_high, Normaliser.MAX_LENGTH), entropy_bonus)
    return Method(name="dr_grpo", terms=terms, source="arXiv:2503.20783")


def dapo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    entropy_bonus: float = 0.0,
    refill_rounds: int = 3,
    overlong_fraction: float = 0.2,
) -> Method:
    """GRPO's advantages, asymmetric clipping, token mean, dynamic sampling (all-equal groups are dropped and
    refilled), and a soft penalty inside the last ``overlong_fraction`` of the length limit."""
    terms = _with_entropy(_policy_term(clip_low, clip_high, Normaliser.TOKENS), entropy_bonus)
    return Method(
        name="dapo",
        terms=terms,
        gate=drop_degenerate,
        advantage=group_mean_std,
        refill_rounds=refill_rounds,
        overlong_fraction=overlong_fraction,
        source="arXiv:2503.14476",
    )


METHODS: dict[str, Callable[..., Method]] = {
    "sft": sft,
    "dft": dft,
    "paper": paper,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
}


def build(name: str, options: Mapping[str, Any]) -> Method:
    """The row of that name with its options. Raises ValueError naming the known methods or options."""
    if name not in METHODS:
        raise ValueError(f"method = {name!r} is not one of {', '.join(METHODS)}")
    row = METHODS[name]
    known = list(inspect.signature(row).parameters)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"method_options.{unknown[0]}: {name} has {', '.join(known) or 'no options'}")
    defaults = {key: p.default for key, p in inspect.signature(row).parameters.items()}
    return row(**{key: _typed(key, value, type(defaults[key])) for key, value in options.items()})


def _typed(key: str, value: Any, kind: type) -> Any:
    """The value as its option's type; a whole number may be written with or without a point."""
    if kind in (int, float) and type(value) in (int, float) and kind(value) == value:
        return kind(value)
    if type(value) is not kind:
        raise ValueError(f"method_options.{key}: expected {kind.__name__}, got {value!r}")
    return value


def shaped_reward(method: Method, reward: float, num_tokens: int, max_new_tokens: int) -> float:
    """The reward after DAPO's overlong penalty: linear from 0 to −½ over the last fraction of the limit.

    DAPO subtracts up to 1 from rewards of ±1; with rewards of 0 and 1 the same shape has half the size.
    """
    buffer = method.overlong_fraction * max_new_tokens
    over = num_tokens - (max_new_tokens - buffer)
    return reward if buffer == 0 or over <= 0 else reward - 0.5 * min(1.0, over / buffer)
