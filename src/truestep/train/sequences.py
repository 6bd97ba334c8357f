"""Turns groups into training sequences, into sample rows for the report, and into counts of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from truestep.flops import Ledger
from truestep.objective.advantage import GroupView
from truestep.objective.gate import GateDecision
from truestep.objective.methods import Method
from truestep.objective.methods.row import Overlong
from truestep.records import Demonstration, Group, Origin, Prompt, Rollout, Score, TrainSequence
from truestep.rollout.sample import Decode, num_sampled_tokens
from truestep.train.metrics import Meter

NUM_SHOWN = 4  # rollouts per step kept for the report


@dataclass(frozen=True, kw_only=True)
class GatedGroup:
    """A group, its view for gates and advantages, and the decision of the method's gate. ``place`` orders the
    groups of a step over all ranks."""

    group: Group
    view: GroupView
    decision: GateDecision
    place: tuple[int, int] = (0, 0)


def gated(group: Group, method: Method, solved_at: float) -> GatedGroup:
    """Apply the gate before the length penalty, because a penalty does not make a group informative."""
    view = GroupView(
        rewards=tuple(s.reward for s in group.scores),
        solved=tuple(s.solved(solved_at) for s in group.scores),
        origins=tuple(r.member for r in group.rollouts),
    )
    return GatedGroup(group=group, view=view, decision=method.gate(view))


def sequences_of(groups: Sequence[GatedGroup], method: Method, limit: int) -> list[TrainSequence]:
    """Return every member that the gate keeps and that has an advantage, in order. ``limit`` is the length
    limit in tokens, for a length penalty."""
    sequences, overlong = [], method.part(Overlong)
    for number, gated_group in enumerate(groups):
        group, view, decision = gated_group.group, gated_group.view, gated_group.decision
        if overlong is not None:
            pairs = zip(
                view.rewards, (len(rollout.completion_ids) for rollout in group.rollouts), strict=True
            )
            shaped = (r if r is None else overlong.shaped(r, length, limit) for r, length in pairs)
            view = replace(view, rewards=tuple(shaped))
        for i, (rollout, advantage) in enumerate(zip(group.rollouts, method.advantage(view), strict=True)):
            if decision.keep[i] and advantage is not None and rollout.completion_ids:
                score = {"solved": view.solved[i] is True, "reward": view.rewards[i] or 0.0}
                part = {"group": number, "advantage": advantage, "weight": decision.weights[i]}
                sequences.append(sampled_sequence(group.prompt, rollout, **part, **score))
    return sequences


def sampled_sequence(prompt: Prompt, rollout: Rollout, **given: Any) -> TrainSequence:
    """Return the rollout with its training prompt as a sequence. The prefix that it shares with others in its
    group ends before its first trained token."""
    context = rollout.prompt_ids or prompt.token_ids
    trained = [i for i, origin in enumerate(rollout.origin) if origin is not Origin.CONTEXT]
    behavior = rollout.behavior_logprobs
    return TrainSequence(
        token_ids=context + rollout.completion_ids,
        origin=(Origin.CONTEXT,) * len(context) + rollout.origin,
        num_prefix_tokens=len(context) + (trained[0] if trained else len(rollout.origin)),
        behavior_logprobs=None if behavior is None else tuple(behavior[i] for i in trained),
        policy_version=tuple(rollout.policy_version[i] for i in trained),
        data=prompt.data,
        **given,
    )


def first_sequences(groups: Sequence[Group], most_tokens: int) -> list[TrainSequence]:
    """Return samples with up to ``most_tokens`` tokens in all, only to be scored: first one of each group, then
    the second ones. At least one sample is returned if there is any."""
    found: list[TrainSequence] = []
    longest, left = max((len(g.rollouts) for g in groups), default=0), most_tokens
    for place in range(longest):
        for number, group in enumerate(groups):
            rollout = group.rollouts[place] if place < len(group.rollouts) else None
            if rollout is None or Origin.POLICY not in rollout.origin:
                continue
            left -= len(rollout.prompt_ids or group.prompt.token_ids) + len(rollout.completion_ids)
            if left < 0 and found:
                return found
            found.append(sampled_sequence(group.prompt, rollout, group=number))
    return found


def of_versions(meter: Meter, minibatches: Sequence[Sequence[TrainSequence]], step: int) -> None:
    """Add how many versions older than ``step`` the weights are that sampled the policy's tokens."""
    for one in (s for part in minibatches for s in part):
        trained = [origin for origin in one.origin if origin is not Origin.CONTEXT]
        versions = one.policy_version
        pairs = zip(
            trained, versions if isinstance(versions, tuple) else [versions] * len(trained), strict=True
        )
        ages = [step - version for origin, version in pairs if origin is Origin.POLICY]
        meter.add("sampling/staleness", float(sum(ages)), float(len(ages)))


def whole_demonstration(d: Demonstration, group: int) -> TrainSequence:
    """Return a demonstration of an SFT set as a sequence. The tokens of its own turns are trained on."""
    return TrainSequence(
        token_ids=d.token_ids, origin=d.origin, num_prefix_tokens=0, group=group, data=d.data
    )


def demonstration_sequence(
    prompt: Prompt, completion: tuple[int, ...], group: int, origin: Origin = Origin.EXPERT
) -> TrainSequence:
    """Return a sequence outside any group of samples: from a stream or a buffer, or only to be scored."""
    num = len(prompt.token_ids)
    return TrainSequence(
        token_ids=prompt.token_ids + completion,
        origin=(Origin.CONTEXT,) * num + (origin,) * len(completion),
        num_prefix_tokens=num,
        group=group,
        data=prompt.data,
    )


def sample_rows(
    groups: Sequence[Group], step: int, decode: Decode, decode_prompt: Callable[[Prompt], str]
) -> list[Mapping[str, Any]]:
    """Return a few samples for the report: the first samples of the first groups."""

    def row(prompt: Prompt, rollout: Rollout, score: Score) -> Mapping[str, Any]:
        return {
            "step": step + 1,
            "problem_id": prompt.problem.id,
            "prompt": decode_prompt(prompt),
            "completion": decode(rollout.completion_ids),
            "gold": prompt.problem.answer,
            "verdict": None if score.verdict is None else score.verdict.value,
            "reason": score.reason,
            "reward": score.reward,
            **({"parts": dict(score.parts)} if score.parts else {}),
            "stop": rollout.stop.value,
            "num_tokens": len(rollout.completion_ids),
        }

    shown = [g for g in groups if g.rollouts][:NUM_SHOWN]
    return [row(g.prompt, g.rollouts[0], g.scores[0]) for g in shown]


def group_ledger(groups: Sequence[Group], minibatches: Sequence[Sequence[TrainSequence]]) -> Ledger:
    """Count the generated tokens (including those of discarded rounds), and the trained tokens by origin."""
    sequences = [s for part in minibatches for s in part]
    expert = sum(s.origin.count(Origin.EXPERT) for s in sequences)
    return Ledger(
        rollout_tokens=sum(num_sampled_tokens(g.rollouts) + g.num_discarded_tokens for g in groups),
        rollout_trained_tokens=sum(s.num_trained for s in sequences) - expert,
        demonstration_tokens=expert,
    )
