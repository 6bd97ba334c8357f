"""Gates: what a group's rewards decide about its members. Pure functions.

A gate sees the members of one prompt's group (their kinds, and their rewards: None where unscored) and
answers which of them are trained, with which weight, and whether the prompt's demonstration is set aside for
later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from truestep.objective.advantage import Members
from truestep.records import Kind


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """``keep`` and ``weights`` are aligned with the group's members; a dropped member counts in no
    denominator."""

    keep: tuple[bool, ...]
    weights: tuple[float, ...]
    push_demonstration: bool = False  # into the method's buffer (ReLIFT)


Gate = Callable[[Members], GateDecision]


def _kept(keep: tuple[bool, ...], *, push: bool = False) -> GateDecision:
    return GateDecision(keep=keep, weights=(1.0,) * len(keep), push_demonstration=push)


def keep_scored(members: Members) -> GateDecision:
    """Every scored member, weight 1; a demonstration needs no verdict. All-equal groups count in the
    denominator."""
    pairs = zip(members.rewards, members.kinds, strict=True)
    return _kept(tuple(r is not None or kind is Kind.DEMO for r, kind in pairs))


def drop_degenerate(members: Members) -> GateDecision:
    """Nothing of a group whose rewards are all equal. Source: dynamic sampling, DAPO (arXiv:2503.14476)."""
    if members.is_degenerate:
        return GateDecision(keep=(False,) * len(members.rewards), weights=(0.0,) * len(members.rewards))
    return keep_scored(members)


def imitate_where_unsolved(most_correct: int) -> Gate:
    """At most ``most_correct`` right own samples: the demonstration alone; more: the own samples alone.

    −1 never imitates, the number of samples always does. Source: HPT (arXiv:2509.04419); SuperRL
    (arXiv:2506.01096).
    """

    def gate(members: Members) -> GateDecision:
        if not members.own:  # nobody could say what is right: a failure is no wrong answer
            return _kept((False,) * len(members.kinds))
        imitate = sum(r == 1.0 for r in members.own) <= most_correct
        return _kept(
            tuple(
                keep and (kind is Kind.DEMO) == imitate
                for keep, kind in zip(keep_scored(members).keep, members.kinds, strict=True)
            )
        )

    return gate


def push_unsolved(members: Members) -> GateDecision:
    """All scored members are trained; where every one of them is wrong, the demonstration waits in the
    buffer.

    Wrong means reward 0. Source: ReLIFT (arXiv:2506.07527).
    """
    return _kept(keep_scored(members).keep, push=bool(members.own) and not any(members.own))
