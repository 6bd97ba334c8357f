"""Gates: what a group's rewards decide about its members. Pure functions.

A gate sees the rewards of the samples of one prompt (None where a sample is unscored) and answers which of them are
trained, with which weight, and whether the prompt's demonstration joins or is set aside for later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from truestep.objective.advantage import Rewards, is_degenerate


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """``keep`` and ``weights`` are aligned with the group's samples; a dropped sample counts in no denominator."""

    keep: tuple[bool, ...]
    weights: tuple[float, ...]
    add_demonstration: bool = False
    push_demonstration: bool = False  # into the method's buffer (ReLIFT)


Gate = Callable[[Rewards], GateDecision]


def keep_scored(rewards: Rewards) -> GateDecision:
    """Every scored sample, weight 1. The tokens of all-equal groups count in the denominator."""
    return GateDecision(keep=tuple(r is not None for r in rewards), weights=(1.0,) * len(rewards))


def drop_degenerate(rewards: Rewards) -> GateDecision:
    """Nothing of a group whose rewards are all equal. Source: dynamic sampling, DAPO (arXiv:2503.14476)."""
    if is_degenerate(rewards):
        return GateDecision(keep=(False,) * len(rewards), weights=(0.0,) * len(rewards))
    return keep_scored(rewards)
