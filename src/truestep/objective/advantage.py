"""Pure functions that turn the rewards of a group's G members into advantages (None if unscored)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress

from truestep.records import Origin, RecordError

STD_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """A group as gates and advantages see it. Each field has one value per member: its reward, whether it
    solves the problem (both None if it is unscored), and its origin (policy, stored or expert)."""

    rewards: tuple[float | None, ...]
    solved: tuple[bool | None, ...]
    origins: tuple[Origin, ...]

    def __post_init__(self) -> None:
        if not len(self.rewards) == len(self.solved) == len(self.origins):
            raise RecordError("rewards, solved and origins differ in length")

    @property
    def scored(self) -> list[float]:
        """The rewards of all scored members."""
        return [r for r in self.rewards if r is not None]

    @property
    def is_own(self) -> list[bool]:
        """Whether the policy sampled the member in this rollout batch."""
        return [origin is Origin.POLICY for origin in self.origins]

    @property
    def own(self) -> list[float]:
        """The rewards of the scored members that the policy sampled."""
        return [r for r in compress(self.rewards, self.is_own) if r is not None]

    @property
    def own_solved(self) -> list[bool]:
        """``solved`` of the scored members that the policy sampled."""
        return [s for s in compress(self.solved, self.is_own) if s is not None]

    @property
    def is_degenerate(self) -> bool:
        """Whether the policy's samples all have the same reward, so that none is better than another."""
        return len(set(self.own)) < 2


Advantage = Callable[[GroupView], list[float | None]]


def group_mean(group: GroupView) -> list[float | None]:
    """Return A_i = R_i − mean(R) over all members, including a demonstration if the plan added one.

    Source: arXiv:2503.20783 (Dr. GRPO), 2604.23747, app. A (the paper's RL), 2504.14945 (LUFFY)."""
    mean = sum(group.scored) / max(1, len(group.scored))
    return [None if r is None else r - mean for r in group.rewards]


def group_mean_std(group: GroupView) -> list[float | None]:
    """Return A_i = (R_i − mean(R)) / (std(R) + 1e-6) with the unbiased std, or 0 in a group of one.

    Source: GRPO (arXiv:2402.03300), as verl computes it."""
    centred = group_mean(group)
    squares = [a**2 for a in centred if a is not None]
    if len(squares) < 2:
        return [None if r is None else 0.0 for r in group.rewards]
    spread = math.sqrt(sum(squares) / (len(squares) - 1)) + STD_EPSILON
    return [None if a is None else a / spread for a in centred]


def _of_own(advantage: Advantage) -> Advantage:
    """Restrict an advantage to the policy's samples. Others are not in the baseline and get advantage 0."""

    def own(group: GroupView) -> list[float | None]:
        mine = {name: tuple(compress(column, group.is_own)) for name, column in vars(group).items()}
        found = iter(advantage(GroupView(**mine)))
        return [next(found) if is_own else 0.0 for is_own in group.is_own]

    return own


own_mean = _of_own(group_mean)
own_mean_std = _of_own(group_mean_std)


def leave_one_out(group: GroupView) -> list[float | None]:
    """Return A_i = R_i − mean of the others = K/(K−1)·(R_i − mean(R)). Source: RLOO (arXiv:2402.14740)."""
    num = len(group.scored)
    if num < 2:
        return [None if r is None else 0.0 for r in group.rewards]
    return [None if a is None else a * num / (num - 1) for a in group_mean(group)]


def raw_reward(group: GroupView) -> list[float | None]:
    """Return A_i = R_i, the return of REINFORCE without a baseline."""
    return list(group.rewards)
