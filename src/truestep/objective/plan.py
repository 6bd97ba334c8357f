"""Plans: what is sampled for a prompt, round by round, and which of it makes the group.

A plan is a pure function of what earlier rounds brought, so that it can be replayed after a kill: no
generator objects. Chance enters as one number that the caller has drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from truestep.objective.schedule import Schedule
from truestep.records import Kind


@dataclass(frozen=True, kw_only=True)
class Round:
    """``num_samples`` members of one kind. PREFIX: completions of the first ``fraction`` of the
    demonstration's tokens (all of them at 1), which are only context with ``expert_is_context``. HINT:
    completions under a prompt that shows the first ``fraction`` of its text. DEMO and REPLAY: nothing is
    generated, the expert's or a stored trace joins."""

    num_samples: int
    kind: Kind = Kind.ON
    fraction: float = 0.0
    expert_is_context: bool = False


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The prompt is done: the group consists of these rounds (all where none is named)."""

    rounds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished round and the rewards it brought (None: unscored)."""

    round: Round
    rewards: tuple[float | None, ...]

    @property
    def num_correct(self) -> int:
        return sum(r == 1.0 for r in self.rewards)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan may look at. ``draw`` is uniform in [0, 1), the prompt's own in this step; ``controls`` are
    the method's controller's values for this step; ``has_replay`` says that a stored trace of the prompt was
    chosen."""

    step: int
    num_samples: int
    history: tuple[Outcome, ...] = ()
    draw: float = 0.0
    controls: Mapping[str, float] = field(default_factory=dict)
    has_replay: bool = False


# → the rounds to be sampled next, together, or which of those so far make the group.
Plan = Callable[[Asked], Sequence[Round] | Keep]


def _once(rounds_of: Callable[[Asked], Sequence[Round]]) -> Plan:
    """A plan that asks one time."""
    return lambda asked: Keep() if asked.history else rounds_of(asked)


own: Plan = _once(lambda asked: (Round(num_samples=asked.num_samples),))
"""All samples from the current policy: every on-policy method."""

with_demonstration: Plan = _once(
    lambda asked: (Round(num_samples=asked.num_samples - 1), Round(num_samples=1, kind=Kind.DEMO))
)
"""The demonstration takes the place of one sample (LUFFY)."""

beside_demonstration: Plan = _once(
    lambda asked: (Round(num_samples=asked.num_samples), Round(num_samples=1, kind=Kind.DEMO))
)
"""The demonstration joins all samples (SRFT; HPT's gate then chooses between them)."""

with_replay: Plan = _once(
    lambda asked: (
        (Round(num_samples=asked.num_samples - 1), Round(num_samples=1, kind=Kind.REPLAY))
        if asked.has_replay
        else (Round(num_samples=asked.num_samples),)
    )
)
"""A stored trace takes the place of one sample where the source has chosen one (ExGRPO)."""


def one_prefix(low: Schedule, high: float) -> Plan:
    """All samples but one are ordinary; one continues a prefix of uniform length in [low(step), high]
    (Prefix-RFT)."""

    def rounds(asked: Asked) -> Sequence[Round]:
        start = low(asked.step)
        length = start + asked.draw * (high - start)
        return Round(num_samples=asked.num_samples - 1), Round(
            num_samples=1, kind=Kind.PREFIX, fraction=length
        )

    return _once(rounds)


def shared_prefix(probability: Schedule, num_segments: int, num_steps: int) -> Plan:
    """All samples continue the same k of ``num_segments`` parts, k ~ Binomial(num_segments,
    probability(step)); none from ``num_steps`` on (UFT)."""

    def rounds(asked: Asked) -> Sequence[Round]:
        k = _binomial(asked.draw, num_segments, probability(asked.step)) if asked.step < num_steps else 0
        if k == 0:
            return (Round(num_samples=asked.num_samples),)
        shown = min(
            k / num_segments, math.nextafter(1.0, 0.0)
        )  # with all parts shown the end is still the policy's
        return (Round(num_samples=asked.num_samples, kind=Kind.PREFIX, fraction=shown),)

    return _once(rounds)


def _binomial(draw: float, count: int, probability: float) -> int:
    """The smallest k whose cumulative probability exceeds the draw."""
    total = 0.0
    for k in range(count):
        total += math.comb(count, k) * probability**k * (1 - probability) ** (count - k)
        if draw < total:
            return k
    return count


def guided(fractions: Sequence[float], thresholds: Sequence[float]) -> Plan:
    """Micro-groups of ½, ¼, ⅛ and ⅛ of the samples. After each, a share of successes so far below its
    threshold gives the next one the prefix of that level; otherwise it is not guided (TRAPO)."""

    def plan(asked: Asked) -> Sequence[Round] | Keep:
        n = asked.num_samples
        sizes = [n // 2, n // 4]
        sizes += [(n - sum(sizes)) // 2]
        sizes += [n - sum(sizes)]
        sampled = sum(len(o.rewards) for o in asked.history)
        if sampled == n:
            return Keep()
        # The level belongs to the place in the sequence; small groups have no members at some of them.
        level = next(i for i in range(len(sizes)) if sum(sizes[: i + 1]) > sampled)
        solved = sum(o.num_correct for o in asked.history)
        if level == 0 or solved >= thresholds[level - 1] * sampled:
            return (Round(num_samples=sizes[level]),)
        return (Round(num_samples=sizes[level], kind=Kind.PREFIX, fraction=fractions[level - 1]),)

    return plan


def anchored(num_episodes: int, low: float, high: float) -> Plan:
    """Ordinary samples; where none is right, a binary search for the shortest prefix, as context, after which
    the share of right samples lies in [low, high] (BREAD). Without one the ordinary samples stay."""

    def plan(asked: Asked) -> Sequence[Round] | Keep:
        n = asked.num_samples
        if not asked.history:
            return (Round(num_samples=n),)
        if asked.history[0].num_correct:
            return Keep(rounds=(0,))
        below, above, best = 0, num_episodes, 0
        for number, outcome in enumerate(asked.history[1:], start=1):
            at = round(outcome.round.fraction * num_episodes)
            share = outcome.num_correct / n
            if share < low:
                below = at
            else:
                above = at
                best = number if share <= high else best
        if above - below <= 1:
            return Keep(rounds=(best,))
        middle = (below + above) // 2
        return (
            Round(num_samples=n, kind=Kind.PREFIX, fraction=middle / num_episodes, expert_is_context=True),
        )

    return plan


def hinted(fractions: Sequence[float]) -> Plan:
    """Ordinary samples; where none is right, all are replaced by samples under a prompt that shows more and
    more of the solution, until one is right (GHPO)."""

    def plan(asked: Asked) -> Sequence[Round] | Keep:
        done = len(asked.history)
        if done and (asked.history[-1].num_correct or done > len(fractions)):
            return Keep(rounds=(done - 1,))
        if not done:
            return (Round(num_samples=asked.num_samples),)
        return (Round(num_samples=asked.num_samples, kind=Kind.HINT, fraction=fractions[done - 1]),)

    return plan


def one_or_the_other(control: str) -> Plan:
    """The demonstration alone while the control is 1, samples alone while it is 0 (SASR)."""
    return _once(
        lambda asked: (
            (Round(num_samples=1, kind=Kind.DEMO),)
            if asked.controls[control]
            else (Round(num_samples=asked.num_samples),)
        )
    )
