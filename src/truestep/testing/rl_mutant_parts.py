"""The parts of the RL step that ``rl_mutants`` replaces. Each is a method of ``rl_trainer.GRPO``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from truestep.audit.measure.rl import cases
from truestep.testing.rl_trainer import GRPO, Rows, Window

Method = Callable[..., Any]


# ------------------------------------------------------------------------------------------------- denominators


def counting_everything(self: GRPO, rows: Rows) -> Tensor:
    return rows.mask.sum(1)


def counting_padding(self: GRPO, rows: Rows) -> Tensor:
    longest = max(len(self.case.rows[i].completion) for i in rows.numbers)
    return torch.full((len(rows.numbers),), float(longest))


def counting_prompts(self: GRPO, rows: Rows) -> Tensor:
    return rows.trained.sum(1) + torch.tensor([float(len(self.case.rows[i].prompt)) for i in rows.numbers])


def counting_untruncated(self: GRPO, rows: Rows) -> float:
    return float((rows.trained.sum(1) > 0).sum())


def micro_mean(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 1 / self.total(rows, [rows]) / len(window.every)


def micro_mean_forgotten(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 1 / self.total(rows, [rows]) / self.num_ranks


def rank_mean(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 1 / self.total(rows, window.micro[rank]) / self.num_ranks


def rollout_mean(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return self.case.parts / self.total(rows, window.rollout)


def padded_means(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 1 / (self.counted(rows).sum() * torch.ones(len(rows.numbers), 1)) / len(window.every)


def not_divided(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return len(window.micro[rank]) / self.total(rows, window.every)


def divided_twice(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 1 / self.total(rows, window.every) / len(window.micro[rank])


def summed_over_ranks(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return self.num_ranks / self.total(rows, window.every)


def times_eight(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 8 / self.total(rows, window.every)


def group_means(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    groups = [row.group for row in self.case.rows]
    counts: dict[int, float] = {}
    for part in window.every:
        for number, count in zip(part.numbers, part.trained.sum(1).tolist(), strict=True):
            counts[groups[number]] = counts.get(groups[number], 0.0) + count
    return torch.tensor([[1 / (counts[groups[i]] * len(counts))] for i in rows.numbers])


def own_entropy(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return torch.ones(len(rows.numbers), 1) / rows.trained.sum() / len(window.every)


def own_kl(self: GRPO, rows: Rows, window: Window, rank: int) -> Tensor:
    return 1 / self.total(rows, [rows]) / len(window.every)


# ------------------------------------------------------------------------------------------------- advantages


def _spread(self: GRPO) -> tuple[Tensor, Tensor]:
    groups = self.rewards().view(-1, cases.GROUP)
    return groups - groups.mean(1, keepdim=True), groups


def biased(self: GRPO) -> Tensor:
    centered, groups = _spread(self)
    return (centered / (groups.std(1, keepdim=True, correction=0) + self.epsilon)).flatten()


def batch_spread(self: GRPO) -> Tensor:
    return (_spread(self)[0] / (self.rewards().std() + self.epsilon)).flatten()


def whole_batch(self: GRPO) -> Tensor:
    rewards = self.rewards()
    return (rewards - rewards.mean()) / (rewards.std() + self.epsilon)


def batch_mean_only(self: GRPO) -> Tensor:
    groups = self.rewards().view(-1, cases.GROUP)
    return ((groups - groups.mean()) / (groups.std(1, keepdim=True) + self.epsilon)).flatten()


def strided_groups(self: GRPO) -> Tensor:
    groups = self.rewards().view(cases.GROUP, -1)
    return ((groups - groups.mean(0)) / (groups.std(0) + self.epsilon)).flatten()


def later_sample(self: GRPO) -> Tensor:
    return GRPO.advantages(self).roll(1)


def earlier_sample(self: GRPO) -> Tensor:
    return GRPO.advantages(self).roll(-1)


def negated(self: GRPO) -> Tensor:
    return -GRPO.advantages(self)


def leave_one_out(self: GRPO) -> Tensor:
    groups = self.rewards().view(-1, cases.GROUP)
    others = (groups.sum(1, keepdim=True) - groups) / (cases.GROUP - 1)
    spread = groups.std(1, keepdim=True) + self.epsilon
    return ((groups - others) / spread).flatten()


def no_baseline(self: GRPO) -> Tensor:
    return self.rewards()


def median_baseline(self: GRPO) -> Tensor:
    groups = self.rewards().view(-1, cases.GROUP)
    return (
        (groups - groups.median(1, keepdim=True).values) / (groups.std(1, keepdim=True) + self.epsilon)
    ).flatten()


def local_groups(self: GRPO, numbers: Sequence[int]) -> Rows:
    """Take the mean and the spread over the part of a group that is in the same micro-batch."""
    made, rewards = GRPO.collate(self, numbers), self.rewards()
    for place, number in enumerate(numbers):
        group = self.case.rows[number].group
        here = rewards[[i for i in numbers if self.case.rows[i].group == group]]
        spread = here.std() if len(here) > 1 else torch.tensor(0.0)
        made.advantage[place] = (rewards[number] - here.mean()) / (spread + self.epsilon)
    return made


# ------------------------------------------------------------------------------------------------- ratio and clip


def unclipped(self: GRPO, ratio: Tensor, logp: Tensor, rows: Rows) -> Tensor:
    return -ratio * rows.advantage


def clipped_only(self: GRPO, ratio: Tensor, logp: Tensor, rows: Rows) -> Tensor:
    return -ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * rows.advantage


def larger_of_both(self: GRPO, ratio: Tensor, logp: Tensor, rows: Rows) -> Tensor:
    clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
    return -torch.maximum(ratio * rows.advantage, clipped * rows.advantage)


def detached_ratio(self: GRPO, ratio: Tensor, logp: Tensor, rows: Rows) -> Tensor:
    return -ratio.detach().clamp(1 - self.clip_low, 1 + self.clip_high) * rows.advantage * logp


def plain_log(self: GRPO, ratio: Tensor, logp: Tensor, rows: Rows) -> Tensor:
    return -rows.advantage * logp


def against_itself(self: GRPO, logp: Tensor, rows: Rows) -> Tensor:
    return logp - logp.detach()


def against_reference(self: GRPO, logp: Tensor, rows: Rows) -> Tensor:
    return logp - rows.reference


def against_engine(self: GRPO, logp: Tensor, rows: Rows) -> Tensor:
    return logp - rows.engine


def misaligned(self: GRPO, logp: Tensor, rows: Rows) -> Tensor:
    start = rows.mask.argmax(1)
    past = rows.old.roll(1, 1)
    past[torch.arange(len(start)), start] = 0.0
    return logp - past


def never_refreshed(self: GRPO, rows: Rows, rollout: int) -> Tensor:
    kept = self.__dict__.setdefault("kept", {})
    key = tuple(rows.numbers)
    if rollout == 0:
        kept[key] = self.logps(self.replicas[0], rows)[0]
    return kept[key]


def whole_sequence(self: GRPO, logp: Tensor, rows: Rows) -> Tensor:
    gap = logp - rows.old
    return ((gap * rows.trained).sum(1) / rows.trained.sum(1).clamp(min=1))[:, None].expand_as(gap)


# ------------------------------------------------------------------------------------------------- masks, labels


def without_stop(self: GRPO, rows: Rows) -> Tensor:
    ends = rows.ids[:, 1:] == cases.STOP
    return rows.trained * ~ends


def without_first(self: GRPO, rows: Rows) -> Tensor:
    first = rows.trained.cumsum(1) == 1
    return rows.trained * ~first


def with_prompts(self: GRPO, rows: Rows) -> Tensor:
    lengths = [len(self.case.rows[i].ids) - 1 for i in rows.numbers]
    return (torch.arange(rows.ids.shape[1] - 1)[None] < torch.tensor(lengths)[:, None]).float()


def truncated_trained(self: GRPO, row: int) -> bool:
    return True


def truncated_masked(self: GRPO, row: int) -> bool:
    return not self.case.rows[row].truncated


def without_temperature(self: GRPO, model: Any, rows: Rows) -> Tensor:
    return model(input_ids=rows.ids)[:, :-1]


def multiplied_by_temperature(self: GRPO, model: Any, rows: Rows) -> Tensor:
    return model(input_ids=rows.ids)[:, :-1] * self.temperature


def unshifted(self: GRPO, model: Any, rows: Rows) -> Tensor:
    return model(input_ids=rows.ids)[:, 1:] / self.temperature


# ------------------------------------------------------------------------------------------------- other terms


def kl_k1(self: GRPO, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
    return logp - rows.reference


def kl_k2(self: GRPO, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
    return (logp - rows.reference) ** 2 / 2


def kl_with_ratio(self: GRPO, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
    return GRPO.kl_loss(self, logp, rows, ratio) * ratio


def kl_backwards(self: GRPO, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
    return -GRPO.kl_loss(self, logp, rows, ratio)


def kl_to_old(self: GRPO, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
    d = logp - rows.old
    return torch.exp(-d) + d - 1


def kl_absolute(self: GRPO, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
    return (logp - rows.reference).abs()


def inverse_correction(self: GRPO, rows: Rows) -> Tensor:
    return (rows.engine - rows.old).exp().clamp(max=self.correct_high)


def no_correction(self: GRPO, rows: Rows) -> float:
    return 1.0


def sequence_correction(self: GRPO, rows: Rows) -> Tensor:
    gap = ((rows.old - rows.engine) * rows.trained).sum(1, keepdim=True)
    return gap.exp().clamp(max=self.correct_high)


def masked_correction(self: GRPO, rows: Rows) -> Tensor:
    rho = (rows.old - rows.engine).exp()
    return rho * (rho <= self.correct_high)


# ------------------------------------------------------------------------------------------------- lost data


def kept(which: Callable[[int, int], bool]) -> Method:
    """Return a ``combine`` that only adds up the micro-batches k of n for which ``which(k, n)``."""

    def combine(self: GRPO, gradients: list[list[list[Tensor]]]) -> list[Tensor]:
        chosen = [[g for k, g in enumerate(rank) if which(k, len(rank))] for rank in gradients]
        return GRPO.combine(self, chosen)

    return combine


def first_rank_only(self: GRPO, gradients: list[list[list[Tensor]]]) -> list[Tensor]:
    return GRPO.combine(self, gradients[:1])
