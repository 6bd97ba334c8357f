"""Gates, which are pure functions. A gate decides which members of a prompt's group are trained on, their
weights, and whether the prompt's demonstration is set aside for later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from truestep.objective.advantage import GroupView
from truestep.records import Origin


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """A gate's decision, with one value per member. A dropped member is not counted in any denominator."""

    keep: tuple[bool, ...]
    weights: tuple[float, ...]
    push_demonstration: bool = False  # into the method's buffer (ReLIFT)


Gate = Callable[[GroupView], GateDecision]


def _kept(keep: tuple[bool, ...], *, push: bool = False) -> GateDecision:
    return GateDecision(keep=keep, weights=(1.0,) * len(keep), push_demonstration=push)


def keep_scored(group: GroupView) -> GateDecision:
    """Keep every scored member and the demonstration, with weight 1, even if all rewards are equal."""
    pairs = zip(group.rewards, group.origins, strict=True)
    return _kept(tuple(r is not None or origin is Origin.EXPERT for r, origin in pairs))


def drop_degenerate(group: GroupView) -> GateDecision:
    """Drop the group if the policy's samples all have the same reward. Otherwise, do the same as
    ``keep_scored``. Source: DAPO (arXiv:2503.14476)."""
    if group.is_degenerate:
        return GateDecision(keep=(False,) * len(group.rewards), weights=(0.0,) * len(group.rewards))
    return keep_scored(group)


def imitate_where_unsolved(most_correct: int) -> Gate:
    """Return a gate that keeps only the demonstration if at most ``most_correct`` of the policy's samples are
    correct, and otherwise only the samples. With −1 it never keeps the demonstration; with the number of
    samples it always keeps only the demonstration. A group without a demonstration keeps its samples.
    Source: arXiv:2509.04419 (HPT), 2506.01096 (SuperRL)."""

    def gate(group: GroupView) -> GateDecision:
        if not group.own_solved:  # no own sample is scored, which does not mean that all are incorrect
            return _kept((False,) * len(group.origins))
        imitate = Origin.EXPERT in group.origins and sum(group.own_solved) <= most_correct
        pairs = zip(keep_scored(group).keep, group.origins, strict=True)
        return _kept(tuple(kept and (origin is Origin.EXPERT) == imitate for kept, origin in pairs))

    return gate


def push_unsolved(group: GroupView) -> GateDecision:
    """Keep all scored members. If some of the policy's samples are scored but none solves the problem, push
    the demonstration into the buffer. Source: ReLIFT (arXiv:2506.07527)."""
    return _kept(keep_scored(group).keep, push=bool(group.own_solved) and not any(group.own_solved))
