"""Plans, which say what is sampled for a prompt, round by round, and which rounds make up the group.

A plan is a pure function of the results of earlier rounds and of one random number that the caller draws, so
that a killed run can repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from truestep.objective.schedule import Schedule
from truestep.records import Origin, Round


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of a plan. The group consists of these rounds, or of all rounds if none are named."""

    rounds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """A finished round and which of its samples solved the problem (None: unscored)."""

    round: Round
    solved: tuple[bool | None, ...]

    @property
    def num_solved(self) -> int:
        return sum(s is True for s in self.solved)


@dataclass(frozen=True, kw_only=True)
class PlanState:
    """The inputs of a plan. ``draw`` is uniform in [0, 1), with one draw for each prompt of a step.
    ``controls`` are the values of the method's controller for this step. ``has_stored`` is True if a stored
    sample of the prompt was chosen."""

    step: int
    num_samples: int
    history: tuple[RoundResult, ...] = ()
    draw: float = 0.0
    controls: Mapping[str, float] = field(default_factory=dict)
    has_stored: bool = False


# Returns the rounds to be sampled next, or which of the finished rounds make up the group.
NextRounds = Callable[[PlanState], Sequence[Round] | Done]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan. ``next_rounds`` is its function, and ``words`` say what it does. ``needs_demonstrations`` is True if
    every problem must have a demonstration. ``most_shown`` is the largest share of a solution's text that a prompt may
    show."""

    next_rounds: NextRounds
    words: str = ""
    needs_demonstrations: bool = False
    most_shown: float = 0.0

    def __call__(self, state: PlanState) -> Sequence[Round] | Done:
        return self.next_rounds(state)


def _once(
    rounds_of: Callable[[PlanState], Sequence[Round]], words: str = "", *, needs_demonstrations: bool = True
) -> Plan:
    """Return a plan that requests rounds only once."""
    rounds: NextRounds = lambda state: Done() if state.history else rounds_of(state)  # noqa: E731
    return Plan(next_rounds=rounds, words=words, needs_demonstrations=needs_demonstrations)


DEMONSTRATION = Round(num_samples=1, prefix=1.0)


def _own(state: PlanState, without: int = 0) -> Round:
    return Round(num_samples=state.num_samples - without)


own = _once(lambda state: (_own(state),), "all samples come from the policy", needs_demonstrations=False)

with_demonstration = _once(
    lambda state: (_own(state, 1), DEMONSTRATION), "the demonstration takes the place of one sample"
)
"""LUFFY's plan."""

beside_demonstration = _once(
    lambda state: (_own(state), DEMONSTRATION), "the demonstration is added to the full number of samples"
)
"""The plan of SRFT, and of HPT, whose gate then drops one kind."""

with_replay = _once(
    lambda state: (_own(state, 1), Round(num_samples=1, stored=True)) if state.has_stored else (_own(state),),
    "a stored sample, if the problem has been chosen from the store, takes the place of one sample",
    needs_demonstrations=False,
)
"""ExGRPO's plan."""


def one_prefix(low: Schedule, high: float) -> Plan:
    """Return a plan in which one sample continues a prefix of the demonstration. The length is uniform in
    [low(step), high] (Prefix-RFT)."""

    def rounds(state: PlanState) -> Sequence[Round]:
        start = low(state.step)
        return _own(state, 1), Round(num_samples=1, prefix=start + state.draw * (high - start))

    return _once(rounds, "one sample continues a prefix of the demonstration")


def shared_prefix(probability: Schedule, num_segments: int, num_steps: int) -> Plan:
    """Return a plan in which all samples continue the first k of ``num_segments`` parts of the demonstration,
    k ~ Binomial(num_segments, probability(step)). From ``num_steps`` on there is no prefix (UFT)."""

    def rounds(state: PlanState) -> Sequence[Round]:
        k = _binomial(state.draw, num_segments, probability(state.step)) if state.step < num_steps else 0
        if k == 0:
            return (_own(state),)
        # If all parts are shown, the policy still samples the last token.
        shown = min(k / num_segments, math.nextafter(1.0, 0.0))
        return (Round(num_samples=state.num_samples, prefix=shown),)

    return _once(rounds, "all samples continue the same prefix of the demonstration, whose length is random")


def _binomial(draw: float, count: int, probability: float) -> int:
    """Return the smallest k whose cumulative probability exceeds the draw."""
    total = 0.0
    for k in range(count):
        total += math.comb(count, k) * probability**k * (1 - probability) ** (count - k)
        if draw < total:
            return k
    return count


def guided(fractions: Sequence[float], thresholds: Sequence[float]) -> Plan:
    """Return a plan with micro-groups of ½, ¼, ⅛ and ⅛ of the samples. If the share of successes so far is
    below a level's threshold, the next micro-group continues that level's prefix, otherwise none (TRAPO)."""

    def plan(state: PlanState) -> Sequence[Round] | Done:
        n = state.num_samples
        rest = n - n // 2 - n // 4
        sizes = (n // 2, n // 4, rest // 2, rest - rest // 2)
        sampled = sum(len(o.solved) for o in state.history)
        if sampled == n:
            return Done()
        # The level is the index of the micro-group; in small groups, some levels have no members.
        level = next(i for i in range(len(sizes)) if sum(sizes[: i + 1]) > sampled)
        solved = sum(o.num_solved for o in state.history)
        if level == 0 or solved >= thresholds[level - 1] * sampled:
            return (Round(num_samples=sizes[level]),)
        return (Round(num_samples=sizes[level], prefix=fractions[level - 1]),)

    words = "one micro-group after another; if too few samples have been correct, the next continues a prefix"
    return Plan(next_rounds=plan, words=words, needs_demonstrations=True)


def anchored(num_episodes: int, low: float, high: float) -> Plan:
    """Return a plan with ordinary samples. If none is correct, a binary search finds the shortest prefix,
    used as context, after which the share of correct samples is in [low, high] (BREAD). If there is no such
    prefix, the ordinary samples are kept."""

    def plan(state: PlanState) -> Sequence[Round] | Done:
        n = state.num_samples
        if not state.history:
            return (_own(state),)
        if state.history[0].num_solved:
            return Done(rounds=(0,))
        below, above, best = 0, num_episodes, 0
        for number, result in enumerate(state.history[1:], start=1):
            at = round(result.round.prefix * num_episodes)
            share = result.num_solved / n
            if share < low:
                below = at
            else:
                above, best = at, number if share <= high else best
        if above - below <= 1:
            return Done(rounds=(best,))
        middle = (below + above) // 2
        return (Round(num_samples=n, prefix=middle / num_episodes, prefix_origin=Origin.CONTEXT),)

    words = "if no sample is correct, all branch from the shortest prefix after which some are correct"
    return Plan(next_rounds=plan, words=words, needs_demonstrations=True)


def hinted(fractions: Sequence[float]) -> Plan:
    """Return a plan with ordinary samples. If none is correct, all are replaced by samples from a prompt
    that shows more and more of the solution, until a sample is correct (GHPO)."""

    def plan(state: PlanState) -> Sequence[Round] | Done:
        done = len(state.history)
        if not done:
            return (_own(state),)
        if state.history[-1].num_solved or done > len(fractions):
            return Done(rounds=(done - 1,))
        return (Round(num_samples=state.num_samples, hint=fractions[done - 1]),)

    words = "if no sample is correct, all are sampled again from a prompt that shows more of the solution"
    return Plan(next_rounds=plan, words=words, needs_demonstrations=True, most_shown=max(fractions))


def one_or_the_other(control: str) -> Plan:
    """Return a plan with only the demonstration if the control is 1, and only samples if it is 0 (SASR)."""
    words = "in a step, either only the demonstrations or only samples"
    return _once(lambda state: (DEMONSTRATION if state.controls[control] else _own(state),), words)
