"""Advantages from the rewards of a group. Pure functions of floats; an unscored sample (None) has no advantage.

Shapes: G samples of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rewards = Sequence[float | None]
STD_EPSILON = 1e-6


def _scored(rewards: Rewards) -> list[float]:
    return [r for r in rewards if r is not None]


def group_mean(rewards: Rewards) -> list[float | None]:
    """A_i = R_i − mean(R). Source: Dr. GRPO (arXiv:2503.20783); the paper's RL (arXiv:2604.23747, app. A)."""
    scored = _scored(rewards)
    mean = sum(scored) / len(scored) if scored else 0.0
    return [None if r is None else r - mean for r in rewards]


def group_mean_std(rewards: Rewards) -> list[float | None]:
    """A_i = (R_i − mean(R)) / (std(R) + 1e-6), unbiased std. Source: GRPO (arXiv:2402.03300), as verl computes it."""
    scored = _scored(rewards)
    if len(scored) < 2:
        return [None if r is None else 0.0 for r in rewards]
    mean = sum(scored) / len(scored)
    std = math.sqrt(sum((r - mean) ** 2 for r in scored) / (len(scored) - 1))
    return [None if r is None else (r - mean) / (std + STD_EPSILON) for r in rewards]


def is_degenerate(rewards: Rewards) -> bool:
    """True where all scored rewards are equal: the group says nothing about which sample was better."""
    return len(set(_scored(rewards))) < 2


ADVANTAGES: dict[str, Callable[[Rewards], list[float | None]]] = {
    "group_mean": group_mean,
    "group_mean_std": group_mean_std,
}
