"""Advantages from the rewards of a group. Pure functions of floats; an unscored member (None) has no
advantage.

Shapes: G members of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from truestep.records import Kind, RecordError

NOT_OWN = (Kind.DEMO, Kind.REPLAY)  # members that the current policy has not sampled
STD_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Members:
    """A group as gates and advantages see it: a reward (None: unscored) and a kind for each member."""

    rewards: tuple[float | None, ...]
    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.kinds):
            raise RecordError("one kind per reward")

    @property
    def scored(self) -> list[float]:
        return [r for r in self.rewards if r is not None]

    @property
    def own(self) -> list[float]:
        """Rewards of the scored members that the current policy sampled."""
        return [
            r
            for r, kind in zip(self.rewards, self.kinds, strict=True)
            if r is not None and kind not in NOT_OWN
        ]

    @property
    def is_degenerate(self) -> bool:
        """True where all own rewards are equal: they say nothing about which sample was better."""
        return len(set(self.own)) < 2


Advantage = Callable[[Members], list[float | None]]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _spread(values: list[float]) -> float:
    """Unbiased standard deviation plus 1e-6."""
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) + STD_EPSILON


def group_mean(members: Members) -> list[float | None]:
    """A_i = R_i − mean(R) over all members, a demonstration among them where the plan has put one.

    Source: Dr. GRPO (arXiv:2503.20783); the paper's RL (arXiv:2604.23747, app. A); LUFFY (arXiv:2504.14945).
    """
    mean = _mean(members.scored)
    return [None if r is None else r - mean for r in members.rewards]


def group_mean_std(members: Members) -> list[float | None]:
    """A_i = (R_i − mean(R)) / (std(R) + 1e-6), unbiased std; 0 in a group of one. Source: GRPO
    (arXiv:2402.03300), as verl computes it."""
    scored = members.scored
    if len(scored) < 2:
        return [None if r is None else 0.0 for r in members.rewards]
    mean, spread = _mean(scored), _spread(scored)
    return [None if r is None else (r - mean) / spread for r in members.rewards]


def _of_own(advantage: Advantage) -> Advantage:
    """The baseline over own members only; the others have no part in it, and advantage 0."""

    def own(members: Members) -> list[float | None]:
        mine = [kind not in NOT_OWN for kind in members.kinds]
        rewards = tuple(r for r, is_own in zip(members.rewards, mine, strict=True) if is_own)
        found = iter(advantage(Members(rewards=rewards, kinds=(Kind.ON,) * len(rewards))))
        return [next(found) if is_own else 0.0 for is_own in mine]

    return own


own_mean = _of_own(group_mean)
own_mean_std = _of_own(group_mean_std)


def leave_one_out(members: Members) -> list[float | None]:
    """A_i = R_i − mean of the others = K/(K−1)·(R_i − mean(R)). Source: RLOO (arXiv:2402.14740)."""
    num = len(members.scored)
    if num < 2:
        return [None if r is None else 0.0 for r in members.rewards]
    return [None if a is None else a * num / (num - 1) for a in group_mean(members)]


def raw_reward(members: Members) -> list[float | None]:
    """A_i = R_i: the return of REINFORCE, before anything is subtracted."""
    return list(members.rewards)
