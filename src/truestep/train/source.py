"""What a step trains on: demonstrations in a shuffled order, or rollouts graded and gated by a method.

Both are pure functions of the step: a resumed run needs no cursor, and an interrupted rollout is redone from its seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from truestep import seeding
from truestep.flops import Ledger
from truestep.objective.advantage import is_degenerate
from truestep.objective.methods import Method, shaped_reward
from truestep.records import Demonstration, Group, Kind, Prompt, Stop, TrainSequence, Verdict
from truestep.rollout.sample import Sampler
from truestep.train.parallel import Ranks

Item = TypeVar("Item")
NUM_SHOWN = 4  # rollouts kept for the report, each step


@dataclass(frozen=True, kw_only=True)
class StepData:
    """The sequences of one step on this rank, cut into the mini-batches of its optimizer updates."""

    minibatches: list[list[TrainSequence]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    ledger: Ledger = field(default_factory=Ledger)


class Source(Protocol):
    """Where a stage's data comes from."""

    updates_per_step: int

    def take(self, step: int) -> StepData: ...


def window(items: Sequence[Item], step: int, size: int, seed: int, limit: int = 0, item: str = "") -> list[Item]:
    """Items ``step·size … (step+1)·size`` of the endless sequence of shuffled epochs; with ``limit`` it ends there.

    A window may span two epochs, so no item is ever skipped or seen more often than its neighbours by more than one.
    """
    stop = (step + 1) * size if limit == 0 else min(limit, (step + 1) * size)
    picked: list[Item] = []
    for epoch in range((step * size) // len(items), (stop - 1) // len(items) + 1):
        order = seeding.permutation(seed, epoch, len(items), item)
        first = max(step * size - epoch * len(items), 0)
        picked += [items[int(i)] for i in order[first : stop - epoch * len(items)]]
    return picked


class DemonstrationSource:
    """Shuffled demonstrations, ``sequences_per_step`` at a time; ``num_sequences`` ends the last epoch exactly."""

    updates_per_step = 1

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        *,
        sequences_per_step: int,
        num_sequences: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.demonstrations, self.ranks, self.seed = demonstrations, ranks, seed
        self.sequences_per_step, self.num_sequences = sequences_per_step, num_sequences

    def take(self, step: int) -> StepData:
        chosen = window(self.demonstrations, step, self.sequences_per_step, self.seed, self.num_sequences)
        sequences = [
            TrainSequence(token_ids=d.token_ids, trained=d.trained, num_prefix_tokens=0, group=i, kind=Kind.DEMO)
            for i, d in enumerate(chosen)
        ]
        mine = sequences[self.ranks.rank :: self.ranks.world_size]
        ledger = Ledger(
            demonstration_tokens=sum(s.num_trained for s in mine),
            prompt_tokens=sum(len(s.token_ids) - s.num_trained for s in mine),
        )
        return StepData(minibatches=[mine], ledger=ledger)


class RolloutSource:
    """Prompts sampled, graded, gated and given advantages by a method's row."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        sampler: Sampler,
        method: Method,
        prompts_per_step: int,
        updates_per_step: int,
        ranks: Ranks,
        decode_prompt: Callable[[Prompt], str],
    ) -> None:
        self.prompts, self.sampler, self.method = prompts, sampler, method
        self.prompts_per_step, self.updates_per_step = prompts_per_step, updates_per_step
        self.ranks, self.decode_prompt = ranks, decode_prompt

    def take(self, step: int) -> StepData:
        size = self.prompts_per_step // self.updates_per_step
        chosen = window(self.prompts, step, self.prompts_per_step, self.sampler.seed)
        numbered = list(zip(chosen, _occurrences([p.problem.id for p in chosen]), strict=True))
        cuts = [numbered[i : i + size] for i in range(0, len(numbered), size)]
        mine = [cut[self.ranks.rank :: self.ranks.world_size] for cut in cuts]
        flat = [pair for cut in mine for pair in cut]
        groups = iter(self.sampler.groups([p for p, _ in flat], step, [count for _, count in flat]))
        cut_groups = [[next(groups) for _ in cut] for cut in mine]
        cut_groups, everything = self._refill(cut_groups, step)
        minibatches = [self._sequences(part) for part in cut_groups]
        return StepData(
            minibatches=minibatches,
            metrics=self._metrics(everything),
            rows=self._rows(everything, step),
            ledger=_ledger(everything, minibatches),
        )

    def _refill(self, cuts: list[list[Group]], step: int) -> tuple[list[list[Group]], list[Group]]:
        """Replace groups that the gate dropped whole by further prompts, for at most ``refill_rounds`` rounds.

        All ranks draw from one order of prompts that none of them has used, so no prompt is drawn twice.
        """
        everything = [g for cut in cuts for g in cut]
        for attempt in range(self.method.refill_rounds):
            kept = [[g for g in cut if any(self.method.gate(_rewards(g)).keep)] for cut in cuts]
            missing = sum(len(cut) for cut in cuts) - sum(len(cut) for cut in kept)
            wanted = self.ranks.gather(missing)
            seen = {name for names in self.ranks.gather([g.prompt.problem.id for g in everything]) for name in names}
            pool = [p for p in self.prompts if p.problem.id not in seen]
            if sum(wanted) == 0 or not pool:
                break
            order = window(pool, 0, min(sum(wanted), len(pool)), self.sampler.seed, item=f"refill/{step}/{attempt}")
            first = sum(wanted[: self.ranks.rank])
            fresh = self.sampler.groups(order[first : first + missing], step)
            everything += fresh
            cuts = [
                [*part, *[fresh.pop() for _ in range(min(len(fresh), len(cut) - len(part)))]]
                for part, cut in zip(kept, cuts, strict=True)
            ]
        return cuts, everything

    def _sequences(self, groups: Sequence[Group]) -> list[TrainSequence]:
        limit = self.sampler.sampling.max_new_tokens
        sequences = []
        for index, group in enumerate(groups):
            rewards = [
                None if s.reward is None else shaped_reward(self.method, s.reward, len(r.completion_ids), limit)
                for r, s in zip(group.rollouts, group.scores, strict=True)
            ]
            # The gate judges what the checker said; a length penalty alone makes no group informative.
            decision, advantages = self.method.gate(_rewards(group)), self.method.advantage(rewards)
            prompt = group.prompt.token_ids
            for i, rollout in enumerate(group.rollouts):
                advantage = advantages[i]
                if not decision.keep[i] or advantage is None or not rollout.completion_ids:
                    continue
                num = len(rollout.completion_ids)
                sequences.append(
                    TrainSequence(
                        token_ids=prompt + rollout.completion_ids,
                        trained=(False,) * len(prompt) + (True,) * num,
                        num_prefix_tokens=len(prompt),
                        group=index,
                        kind=rollout.kind,
                        advantage=advantage,
                        behavior_logprobs=rollout.behavior_logprobs,
                        weight=decision.weights[i],
                        correct=group.scores[i].verdict is Verdict.CORRECT,
                        reward=rewards[i] or 0.0,
                    )
                )
        return sequences

    def _metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Means over the samples of all ranks. An unscored sample is in no mean of rewards and in its own rate."""
        rewards = [_rewards(g) for g in groups]
        flat = [r for group in rewards for r in group if r is not None]
        rollouts = [r for g in groups for r in g.rollouts]
        lengths = [len(r.completion_ids) for r in rollouts]
        names = ("samples", "scored", "reward", "reward_squared", "groups", "mixed", "solved", "length", "truncated")
        sums = self.ranks.sum(
            [
                len(rollouts),
                len(flat),
                sum(flat),
                sum(r * r for r in flat),
                len(groups),
                sum(not is_degenerate(r) for r in rewards),
                sum(any(x == 1.0 for x in r) for r in rewards),
                sum(lengths),
                sum(r.stop is Stop.LENGTH for r in rollouts),
            ]
        )
        s = dict(zip(names, sums, strict=True))
        mean = s["reward"] / max(1, s["scored"])
        return {
            "reward": mean,
            "reward_std": max(0.0, s["reward_squared"] / max(1, s["scored"]) - mean**2) ** 0.5,
            "mixed_groups": s["mixed"] / max(1, s["groups"]),
            "solved_groups": s["solved"] / max(1, s["groups"]),
            "unscored": (s["samples"] - s["scored"]) / max(1, s["samples"]),
            "completions/mean_length": s["length"] / max(1, s["samples"]),
            "completions/truncated": s["truncated"] / max(1, s["samples"]),
        }

    def _rows(self, groups: Sequence[Group], step: int) -> list[dict[str, Any]]:
        """A few samples for the report: the first of the first groups."""
        rows = []
        for group in groups[:NUM_SHOWN]:
            rollout, score = group.rollouts[0], group.scores[0]
            rows.append(
                {
                    "step": step + 1,
                    "problem_id": group.prompt.problem.id,
                    "prompt": self.decode_prompt(group.prompt),
                    "completion": self.sampler.decode(rollout.completion_ids),
                    "gold": group.prompt.problem.answer,
                    "verdict": score.verdict.value,
                    "reason": score.reason,
                    "reward": score.reward,
                    "stop": rollout.stop.value,
                    "num_tokens": len(rollout.completion_ids),
                }
            )
        return rows


def _occurrences(names: Sequence[str]) -> list[int]:
    """How often each name has stood earlier in the list (a batch that spans two epochs can hold a prompt twice)."""
    seen: Counter[str] = Counter()
    counts = []
    for name in names:
        counts.append(seen[name])
        seen[name] += 1
    return counts


def _rewards(group: Group) -> list[float | None]:
    return [score.reward for score in group.scores]


def _ledger(groups: Sequence[Group], minibatches: Sequence[Sequence[TrainSequence]]) -> Ledger:
    return Ledger(
        rollout_tokens=sum(len(r.completion_ids) for g in groups for r in g.rollouts),
        rollout_trained_tokens=sum(s.num_trained for part in minibatches for s in part),
    )
