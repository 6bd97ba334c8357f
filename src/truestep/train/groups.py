"""Groups → training sequences, and what is reported of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from truestep.flops import Ledger
from truestep.objective.advantage import NOT_OWN, Members
from truestep.objective.methods import Method, shaped_reward
from truestep.records import Group, Kind, Prompt, Rollout, Stop, TrainSequence, Verdict
from truestep.rollout.sample import num_own_tokens
from truestep.train.parallel import Ranks

NUM_SHOWN = 4  # rollouts kept for the report, each step


def members_of(group: Group) -> Members:
    """The group as the checker judged it."""
    return Members(rewards=tuple(s.reward for s in group.scores), kinds=tuple(r.kind for r in group.rollouts))


def is_sampled(rollout: Rollout) -> bool:
    """Whether the current policy has had a part in it."""
    given_whole = 0 < rollout.num_expert_tokens == len(rollout.completion_ids)
    return rollout.kind not in NOT_OWN and not given_whole


def sequences_of(groups: Sequence[Group], method: Method, max_new_tokens: int) -> list[TrainSequence]:
    """Every member that the method's gate keeps and its advantage knows, in order."""
    sequences = []
    for index, group in enumerate(groups):
        members = members_of(group)
        rewards = tuple(
            r if r is None else shaped_reward(method, r, len(rollout.completion_ids), max_new_tokens)
            for r, rollout in zip(members.rewards, group.rollouts, strict=True)
        )
        # The gate judges what the checker said; a length penalty alone makes no group informative.
        decision = method.gate(members)
        advantages = method.advantage(Members(rewards=rewards, kinds=members.kinds))
        for i, rollout in enumerate(group.rollouts):
            advantage = advantages[i]
            if decision.keep[i] and advantage is not None and rollout.completion_ids:
                sequences.append(
                    _sequence(
                        group,
                        rollout,
                        group_number=index,
                        advantage=advantage,
                        weight=decision.weights[i],
                        correct=group.scores[i].verdict is Verdict.CORRECT,
                        reward=rewards[i] or 0.0,
                    )
                )
    return sequences


def _sequence(group: Group, rollout: Rollout, *, group_number: int, **given: Any) -> TrainSequence:
    context, num_expert = rollout.prompt_ids or group.prompt.token_ids, rollout.num_expert_tokens
    completion, behavior = rollout.completion_ids, rollout.behavior_logprobs
    if rollout.expert_is_context:
        context, completion, behavior = (
            context + completion[:num_expert],
            completion[num_expert:],
            behavior[num_expert:],
        )
        num_expert = 0
    return TrainSequence(
        token_ids=context + completion,
        trained=(False,) * len(context) + (True,) * len(completion),
        num_prefix_tokens=len(context),
        group=group_number,
        kind=rollout.kind,
        behavior_logprobs=behavior,
        num_expert_tokens=num_expert,
        **given,
    )


def demonstration_sequence(prompt: Prompt, completion: tuple[int, ...], group: int) -> TrainSequence:
    """A demonstration that belongs to no group of samples: of a stream or a buffer."""
    num = len(prompt.token_ids)
    return TrainSequence(
        token_ids=prompt.token_ids + completion,
        trained=(False,) * num + (True,) * len(completion),
        num_prefix_tokens=num,
        group=group,
        kind=Kind.DEMO,
    )


def group_metrics(groups: Sequence[Group], ranks: Ranks) -> dict[str, float]:
    """Means over what the policy sampled on all ranks. An unscored sample is in no mean of rewards and in its
    own rate; demonstrations and stored samples are in none of these."""
    pairs = [(r, s) for g in groups for r, s in zip(g.rollouts, g.scores, strict=True) if is_sampled(r)]
    flat = [s.reward for _, s in pairs if s.reward is not None]
    shown = [s for g in groups for r, s in zip(g.rollouts, g.scores, strict=True) if r.kind is Kind.DEMO]
    lengths = [len(r.completion_ids) for r, _ in pairs]
    own = [members_of(g) for g in groups]
    names = (
        "samples",
        "scored",
        "reward",
        "reward_squared",
        "groups",
        "mixed",
        "solved",
        "length",
        "truncated",
    )
    sums = ranks.sum(
        [
            len(pairs),
            len(flat),
            sum(flat),
            sum(r * r for r in flat),
            len(groups),
            sum(not m.is_degenerate for m in own),
            sum(any(x == 1.0 for x in m.own) for m in own),
            sum(lengths),
            sum(r.stop is Stop.LENGTH for r, _ in pairs),
            len(shown),
            sum(s.verdict is Verdict.CORRECT for s in shown),
        ]
    )
    *sums, num_shown, num_right = sums
    s = dict(zip(names, sums, strict=True))
    mean = s["reward"] / max(1, s["scored"])
    found = {
        "reward": mean,
        "reward_std": max(0.0, s["reward_squared"] / max(1, s["scored"]) - mean**2) ** 0.5,
        "mixed_groups": s["mixed"] / max(1, s["groups"]),
        "solved_groups": s["solved"] / max(1, s["groups"]),
        "unscored": (s["samples"] - s["scored"]) / max(1, s["samples"]),
        "completions/mean_length": s["length"] / max(1, s["samples"]),
        "completions/truncated": s["truncated"] / max(1, s["samples"]),
    }
    return found | ({"demonstrations/correct": num_right / num_shown} if num_shown else {})


def sample_rows(
    groups: Sequence[Group],
    step: int,
    decode: Callable[[Sequence[int]], str],
    decode_prompt: Callable[[Prompt], str],
) -> list[Mapping[str, Any]]:
    """A few samples for the report: the first of the first groups."""
    rows: list[Mapping[str, Any]] = []
    for group in [g for g in groups if g.rollouts][:NUM_SHOWN]:
        rollout, score = group.rollouts[0], group.scores[0]
        rows.append(
            {
                "step": step + 1,
                "problem_id": group.prompt.problem.id,
                "prompt": decode_prompt(group.prompt),
                "completion": decode(rollout.completion_ids),
                "gold": group.prompt.problem.answer,
                "verdict": score.verdict.value,
                "reason": score.reason,
                "reward": score.reward,
                "stop": rollout.stop.value,
                "num_tokens": len(rollout.completion_ids),
            }
        )
    return rows


def group_ledger(groups: Sequence[Group], minibatches: Sequence[Sequence[TrainSequence]]) -> Ledger:
    """Generated tokens (those of discarded rounds too), and trained ones by who wrote them."""
    sequences = [s for part in minibatches for s in part]
    expert = sum(s.num_trained if s.kind is Kind.DEMO else s.num_expert_tokens for s in sequences)
    return Ledger(
        rollout_tokens=sum(num_own_tokens(g.rollouts) + g.num_discarded_tokens for g in groups),
        rollout_trained_tokens=sum(s.num_trained for s in sequences) - expert,
        demonstration_tokens=expert,
    )
