"""Faults of RL steps, injected into the reference step. An audit must find and name them.

``CLEAN`` has correct steps for other objectives. No part of the audit imports this module; it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from truestep.audit.measure.rl import cases
from truestep.testing.rl_trainer import GRPO, Rows, Window

Method = Callable[..., Any]
ONE = ("whole", "split", "reused", "minibatches")
SPLIT = ("split", "straddling", "reused")


@dataclass(frozen=True)
class RLMutant:
    """A trainer with replaced methods or settings. ``names`` has the codes that name the fault; ``asked`` is the
    objective that was asked for."""

    names: str
    text: str
    replaced: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # of the correct trainer too
    ranks: int = 1
    cases: tuple[str, ...] = ONE

    @property
    def trainer(self) -> type[GRPO]:
        return type("Mutant", (GRPO,), {**self.settings, **self.replaced})


SEQUENCES = {"settings": {"normaliser": "sequences"}, "asked": {"normaliser": "sequences"}}
DR_GRPO = {"settings": {"normaliser": "max_length", "std": False}, "asked": {"normaliser": "max_length", "scale": "none"}}
WITH_KL = {"settings": {"beta": 0.2}, "asked": {"kl": "k3", "beta": 0.2}}
WITH_ENTROPY = {"settings": {"entropy": 0.1}, "asked": {"entropy": 0.1}}
MASKED = {"settings": {"mask_truncated": True}, "asked": {"truncated": "masked"}}
CORRECTED = {
    "settings": {"correct_high": 1.5}, "asked": {"correction": "truncate", "correction_high": 1.5},
    "cases": ("whole", "split", "mismatch"),
}  # fmt: skip
GSPO = {"settings": {"level": "sequence", "normaliser": "sequences"}, "asked": {"level": "sequence", "normaliser": "sequences"}}


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
    return ((groups - groups.median(1, keepdim=True).values) / (groups.std(1, keepdim=True) + self.epsilon)).flatten()


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


M = RLMutant
TWO: dict[str, Any] = {"ranks": 2, "cases": ("split", "straddling", "reused")}
MUTANTS: tuple[RLMutant, ...] = (
    M("denominator", "the mean counts the tokens of masked rows", {"counted": counting_everything}, **MASKED),
    M("padded_width", "the mean counts padding", {"counted": counting_padding}),
    M("padded_width", "a row's mean counts padding", {"counted": counting_padding}, **SEQUENCES),
    M("denominator", "the mean counts the prompts' tokens", {"counted": counting_prompts}),
    M("rows_counted", "rows that are masked are not counted", {"size": counting_untruncated},
      {"truncated": "masked", "normaliser": "sequences"}, {"mask_truncated": True, "normaliser": "sequences"}),
    M("local_normaliser", "a mean over tokens in every micro-batch", {"share": micro_mean}),
    M("local_normaliser", "the sum of the micro-batches' means", {"share": micro_mean_forgotten}),
    M("local_normaliser", "every rank divides by its own tokens", {"share": rank_mean}, **TWO),
    M("local_normaliser", "means of micro-batches on two ranks", {"share": micro_mean}, **TWO),
    M("local_normaliser", "sequences are asked for; token means of micro-batches", {"share": padded_means}, **SEQUENCES),
    M("normaliser", "the mean over the whole rollout batch", {"share": rollout_mean}),
    M("normaliser", "sequence means instead of a token mean", {"normaliser": "sequences"}),
    M("normaliser", "a token mean instead of sequence means", {"normaliser": "tokens"}, **SEQUENCES),
    M("normaliser", "a token mean instead of the constant length", {"normaliser": "tokens"}, **DR_GRPO),
    M("normaliser", "sums of sequences", {"normaliser": "sequence_sums"}),
    M("normaliser", "means of groups", {"share": group_means}),
    M("accumulation_factor", "not divided by the number of micro-batches", {"share": not_divided}),
    M("accumulation_factor", "divided by the number of micro-batches twice", {"share": divided_twice}),
    M("rank_factor scale", "summed over ranks", {"share": summed_over_ranks}, **TWO),
    M("scale", "everything eight times too large", {"share": times_eight}),
    M("advantage_scale", "the standard deviation is left out", {"std": False}),
    M("advantage_scale", "divided by a standard deviation that was not asked for", {"std": True}, **DR_GRPO),
    M("advantage_scale", "the standard deviation divides by n", {"advantages": biased}),
    M("advantage_scale", "the standard deviation of the batch", {"advantages": batch_spread}),
    M("wrong_group", "mean and standard deviation of the batch", {"advantages": whole_batch}),
    M("baseline", "the mean of the batch", {"advantages": batch_mean_only}),
    M("wrong_group", "groups of every fourth sample", {"advantages": strided_groups}),
    M("shifted_advantage", "the advantage of the sample before", {"advantages": later_sample}),
    M("shifted_advantage", "the advantage of the sample after", {"advantages": earlier_sample}),
    M("sign", "the negative advantage", {"advantages": negated}),
    M("baseline", "the mean of the other samples", {"advantages": leave_one_out}),
    M("baseline advantage_scale", "no baseline", {"advantages": no_baseline}, **DR_GRPO),
    M("baseline", "the median", {"advantages": median_baseline}),
    M("local_group", "groups within micro-batches", {"collate": local_groups}, cases=SPLIT),
    M("epsilon", "an epsilon of 1e-6 instead of 1e-4", {"epsilon": 1e-6}),
    M("surrogate", "the ratio is not clipped", {"surrogate": unclipped}),
    M("clip", "clipped on both sides, whatever the sign", {"surrogate": clipped_only}),
    M("clip", "the larger of both", {"surrogate": larger_of_both}),
    M("clip_range", "an upper bound of 0.28", {"clip_high": 0.28}),
    M("clip_range", "a lower bound of 0.1", {"clip_low": 0.1}),
    M("surrogate", "the ratio is a constant", {"surrogate": detached_ratio}),
    M("surrogate old_logprobs", "no ratio", {"surrogate": plain_log}),
    M("old_logprobs surrogate", "the ratio to itself", {"log_ratio": against_itself}),
    M("old_logprobs", "the ratio to the reference", {"log_ratio": against_reference}),
    M("old_logprobs", "the ratio to the sampler", {"log_ratio": against_engine}, cases=("whole", "split", "mismatch")),
    M("old_logprobs", "old log-probabilities are off by one", {"log_ratio": misaligned}),
    M("old_logprobs", "old log-probabilities of the first rollout batch", {"old_logps": never_refreshed}),
    M("ratio_level", "the ratio of the sequence", {"log_ratio": whole_sequence}),
    M("ratio_level", "the ratio of the token", {"level": "token"}, **GSPO),
    M("mask", "the stop token is not trained", {"token_mask": without_stop}),
    M("mask", "the first token is not trained", {"token_mask": without_first}),
    M("prompt_trained", "the prompts are trained", {"token_mask": with_prompts}),
    M("truncated", "masked samples are trained", {"trains": truncated_trained}, **MASKED),
    M("truncated", "truncated samples are masked", {"trains": truncated_masked}),
    M("temperature", "the temperature is ignored", {"logits": without_temperature}),
    M("temperature", "multiplied by the temperature", {"logits": multiplied_by_temperature}),
    M("shift_0", "labels are not shifted", {"logits": unshifted}),
    M("kl_estimate", "the estimate k1", {"kl_loss": kl_k1}, **WITH_KL),
    M("kl_estimate", "the estimate k2", {"kl_loss": kl_k2}, **WITH_KL),
    M("kl_estimate", "the estimate times the ratio", {"kl_loss": kl_with_ratio}, **WITH_KL),
    M("kl_estimate", "the absolute difference", {"kl_loss": kl_absolute}, **WITH_KL),
    M("sign", "the KL term has the wrong sign", {"kl_loss": kl_backwards}, **WITH_KL),
    M("kl_anchor", "the KL divergence from the old policy", {"kl_loss": kl_to_old}, **WITH_KL),
    M("kl_weight", "no KL term", {"beta": 0.0}, **WITH_KL),
    M("kl_weight", "half of the KL term", {"beta": 0.1}, **WITH_KL),
    M("kl_weight", "a KL term that was not asked for", {"beta": 0.2}),
    M("local_kl", "the mean of the KL term is taken by micro-batch", {"kl_share": own_kl}, **WITH_KL),
    M("sign", "the entropy is lowered", {"entropy": -0.1}, **WITH_ENTROPY),
    M("entropy_weight", "no entropy bonus", {"entropy": 0.0}, **WITH_ENTROPY),
    M("entropy_weight", "an entropy bonus that was not asked for", {"entropy": 0.1}),
    M("local_entropy", "the mean of the entropy is taken by micro-batch", {"entropy_share": own_entropy}, **WITH_ENTROPY),
    M("wrong_correction", "the inverse of the correction", {"correction": inverse_correction}, **CORRECTED),
    M("correction", "no correction", {"correction": no_correction}, **CORRECTED),
    M("correction", "a correction by sequence", {"correction": sequence_correction}, **CORRECTED),
    M("correction", "a mask instead of a truncation", {"correction": masked_correction}, **CORRECTED),
    M("correction", "another bound of the correction", {"correct_high": 3.0}, **CORRECTED),
    M("kept", "a micro-batch is dropped", {"combine": kept(lambda k, n: k != 1)}),
    M("kept", "only the first and the last micro-batch count", {"combine": kept(lambda k, n: k in (0, n - 1))}),
    M("kept", "every backward pass overwrites the previous one", {"combine": kept(lambda k, n: k == n - 1)}),
    M("kept", "only the first rank counts", {"combine": first_rank_only}, **TWO),
    M("local_normaliser kept", "a mean of means that loses a micro-batch",
      {"share": micro_mean, "combine": kept(lambda k, n: k != 1)}),
    M("temperature normaliser", "the temperature is ignored, and sequence means",
      {"logits": without_temperature, "normaliser": "sequences"}),
    M("advantage_scale local_normaliser", "a biased deviation and a mean of means",
      {"advantages": biased, "share": micro_mean}),
    M("epsilon clip_range", "another epsilon and another clip", {"epsilon": 1e-6, "clip_high": 0.28}),
)  # fmt: skip

CLEAN: tuple[RLMutant, ...] = tuple(
    RLMutant("", text, {}, **{"ranks": ranks, "cases": SPLIT if ranks == 2 else ONE} | parts)
    for ranks in (1, 2)
    for text, parts in (
        ("GRPO with a token mean", {}),
        ("GRPO", SEQUENCES),
        ("Dr. GRPO", DR_GRPO),
        ("GSPO", GSPO),
        ("KL term", WITH_KL),
        ("entropy bonus", WITH_ENTROPY),
        ("masked truncated samples", MASKED),
        ("correction", {**CORRECTED, "cases": ("split", "mismatch")}),
        ("dual clip", {"settings": {"dual": 3.0}, "asked": {"clip_dual": 3.0}}),
        ("k2", {"settings": {"beta": 0.2, "kl": "k2"}, "asked": {"kl": "k2", "beta": 0.2}}),
    )
)
