"""Faults of RL steps, injected into the reference step. An audit must find and name them.

``CLEAN`` has correct steps for other objectives. No part of the audit imports this module; it needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from truestep.testing import rl_mutant_parts as p
from truestep.testing.rl_trainer import GRPO

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


SEQUENCES: dict[str, Any] = {"settings": {"normaliser": "sequences"}, "asked": {"normaliser": "sequences"}}
DR_GRPO: dict[str, Any] = {
    "settings": {"normaliser": "max_length", "std": False}, "asked": {"normaliser": "max_length", "scale": "none"},
}  # fmt: skip
WITH_KL: dict[str, Any] = {"settings": {"beta": 0.2}, "asked": {"kl": "k3", "beta": 0.2}}
WITH_ENTROPY: dict[str, Any] = {"settings": {"entropy": 0.1}, "asked": {"entropy": 0.1}}
MASKED: dict[str, Any] = {"settings": {"mask_truncated": True}, "asked": {"truncated": "masked"}}
CORRECTED: dict[str, Any] = {
    "settings": {"correct_high": 1.5}, "asked": {"correction": "truncate", "correction_high": 1.5},
    "cases": ("whole", "split", "mismatch"),
}  # fmt: skip
GSPO: dict[str, Any] = {
    key: {"level": "sequence", "normaliser": "sequences"} for key in ("settings", "asked")
}


M = RLMutant
TWO: dict[str, Any] = {"ranks": 2, "cases": ("split", "straddling", "reused")}
MUTANTS: tuple[RLMutant, ...] = (
    M("denominator", "the mean counts the tokens of masked rows", {"counted": p.counting_everything}, **MASKED),
    M("padded_width", "the mean counts padding", {"counted": p.counting_padding}),
    M("padded_width", "a row's mean counts padding", {"counted": p.counting_padding}, **SEQUENCES),
    M("denominator", "the mean counts the prompts' tokens", {"counted": p.counting_prompts}),
    M("rows_counted", "rows that are masked are not counted", {"size": p.counting_untruncated},
      {"truncated": "masked", "normaliser": "sequences"}, {"mask_truncated": True, "normaliser": "sequences"}),
    M("local_normaliser", "a mean over tokens in every micro-batch", {"share": p.micro_mean}),
    M("local_normaliser", "the sum of the micro-batches' means", {"share": p.micro_mean_forgotten}),
    M("local_normaliser", "every rank divides by its own tokens", {"share": p.rank_mean}, **TWO),
    M("local_normaliser", "means of micro-batches on two ranks", {"share": p.micro_mean}, **TWO),
    M("local_normaliser", "sequences are asked for; token means of micro-batches", {"share": p.padded_means}, **SEQUENCES),
    M("normaliser", "the mean over the whole rollout batch", {"share": p.rollout_mean}),
    M("normaliser", "sequence means instead of a token mean", {"normaliser": "sequences"}),
    M("normaliser", "a token mean instead of sequence means", {"normaliser": "tokens"}, **SEQUENCES),
    M("normaliser", "a token mean instead of the constant length", {"normaliser": "tokens"}, **DR_GRPO),
    M("normaliser", "sums of sequences", {"normaliser": "sequence_sums"}),
    M("normaliser", "means of groups", {"share": p.group_means}),
    M("accumulation_factor", "not divided by the number of micro-batches", {"share": p.not_divided}),
    M("accumulation_factor", "divided by the number of micro-batches twice", {"share": p.divided_twice}),
    M("rank_factor scale", "summed over ranks", {"share": p.summed_over_ranks}, **TWO),
    M("scale", "everything eight times too large", {"share": p.times_eight}),
    M("advantage_scale", "the standard deviation is left out", {"std": False}),
    M("advantage_scale", "divided by a standard deviation that was not asked for", {"std": True}, **DR_GRPO),
    M("advantage_scale", "the standard deviation divides by n", {"advantages": p.biased}),
    M("advantage_scale", "the standard deviation of the batch", {"advantages": p.batch_spread}),
    M("wrong_group", "mean and standard deviation of the batch", {"advantages": p.whole_batch}),
    M("baseline", "the mean of the batch", {"advantages": p.batch_mean_only}),
    M("wrong_group", "groups of every fourth sample", {"advantages": p.strided_groups}),
    M("shifted_advantage", "the advantage of the sample before", {"advantages": p.later_sample}),
    M("shifted_advantage", "the advantage of the sample after", {"advantages": p.earlier_sample}),
    M("sign", "the negative advantage", {"advantages": p.negated}),
    M("baseline", "the mean of the other samples", {"advantages": p.leave_one_out}),
    M("baseline advantage_scale", "no baseline", {"advantages": p.no_baseline}, **DR_GRPO),
    M("baseline", "the median", {"advantages": p.median_baseline}),
    M("local_group", "groups within micro-batches", {"collate": p.local_groups}, cases=SPLIT),
    M("epsilon", "an epsilon of 1e-6 instead of 1e-4", {"epsilon": 1e-6}),
    M("surrogate", "the ratio is not clipped", {"surrogate": p.unclipped}),
    M("clip", "clipped on both sides, whatever the sign", {"surrogate": p.clipped_only}),
    M("clip", "the larger of both", {"surrogate": p.larger_of_both}),
    M("clip_range", "an upper bound of 0.28", {"clip_high": 0.28}),
    M("clip_range", "a lower bound of 0.1", {"clip_low": 0.1}),
    M("surrogate", "the ratio is a constant", {"surrogate": p.detached_ratio}),
    M("surrogate old_logprobs", "no ratio", {"surrogate": p.plain_log}),
    M("old_logprobs surrogate", "the ratio to itself", {"log_ratio": p.against_itself}),
    M("old_logprobs", "the ratio to the reference", {"log_ratio": p.against_reference}),
    M("old_logprobs", "the ratio to the sampler", {"log_ratio": p.against_engine}, cases=("whole", "split", "mismatch")),
    M("old_logprobs", "old log-probabilities are off by one", {"log_ratio": p.misaligned}),
    M("old_logprobs", "old log-probabilities of the first rollout batch", {"old_logps": p.never_refreshed}),
    M("ratio_level", "the ratio of the sequence", {"log_ratio": p.whole_sequence}),
    M("ratio_level", "the ratio of the token", {"level": "token"}, **GSPO),
    M("mask", "the stop token is not trained", {"token_mask": p.without_stop}),
    M("mask", "the first token is not trained", {"token_mask": p.without_first}),
    M("prompt_trained", "the prompts are trained", {"token_mask": p.with_prompts}),
    M("truncated", "masked samples are trained", {"trains": p.truncated_trained}, **MASKED),
    M("truncated", "truncated samples are masked", {"trains": p.truncated_masked}),
    M("temperature", "the temperature is ignored", {"logits": p.without_temperature}),
    M("temperature", "multiplied by the temperature", {"logits": p.multiplied_by_temperature}),
    M("shift_0", "labels are not shifted", {"logits": p.unshifted}),
    M("kl_estimate", "the estimate k1", {"kl_loss": p.kl_k1}, **WITH_KL),
    M("kl_estimate", "the estimate k2", {"kl_loss": p.kl_k2}, **WITH_KL),
    M("kl_estimate", "the estimate times the ratio", {"kl_loss": p.kl_with_ratio}, **WITH_KL),
    M("kl_estimate", "the absolute difference", {"kl_loss": p.kl_absolute}, **WITH_KL),
    M("sign", "the KL term has the wrong sign", {"kl_loss": p.kl_backwards}, **WITH_KL),
    M("kl_anchor", "the KL divergence from the old policy", {"kl_loss": p.kl_to_old}, **WITH_KL),
    M("kl_weight", "no KL term", {"beta": 0.0}, **WITH_KL),
    M("kl_weight", "half of the KL term", {"beta": 0.1}, **WITH_KL),
    M("kl_weight", "a KL term that was not asked for", {"beta": 0.2}),
    M("local_kl", "the mean of the KL term is taken by micro-batch", {"kl_share": p.own_kl}, **WITH_KL),
    M("sign", "the entropy is lowered", {"entropy": -0.1}, **WITH_ENTROPY),
    M("entropy_weight", "no entropy bonus", {"entropy": 0.0}, **WITH_ENTROPY),
    M("entropy_weight", "an entropy bonus that was not asked for", {"entropy": 0.1}),
    M("local_entropy", "the mean of the entropy is taken by micro-batch", {"entropy_share": p.own_entropy}, **WITH_ENTROPY),
    M("wrong_correction", "the inverse of the correction", {"correction": p.inverse_correction}, **CORRECTED),
    M("correction", "no correction", {"correction": p.no_correction}, **CORRECTED),
    M("correction", "a correction by sequence", {"correction": p.sequence_correction}, **CORRECTED),
    M("correction", "a mask instead of a truncation", {"correction": p.masked_correction}, **CORRECTED),
    M("correction", "another bound of the correction", {"correct_high": 3.0}, **CORRECTED),
    M("kept", "a micro-batch is dropped", {"combine": p.kept(lambda k, n: k != 1)}),
    M("kept", "only the first and the last micro-batch count", {"combine": p.kept(lambda k, n: k in (0, n - 1))}),
    M("kept", "every backward pass overwrites the previous one", {"combine": p.kept(lambda k, n: k == n - 1)}),
    M("kept", "only the first rank counts", {"combine": p.first_rank_only}, **TWO),
    M("local_normaliser kept", "a mean of means that loses a micro-batch",
      {"share": p.micro_mean, "combine": p.kept(lambda k, n: k != 1)}),
    M("temperature normaliser", "the temperature is ignored, and sequence means",
      {"logits": p.without_temperature, "normaliser": "sequences"}),
    M("advantage_scale local_normaliser", "a biased deviation and a mean of means",
      {"advantages": p.biased, "share": p.micro_mean}),
    M("epsilon clip_range", "another epsilon and another clip", {"epsilon": 1e-6, "clip_high": 0.28}),
)  # fmt: skip


def clean(ranks: int, parts: dict[str, Any]) -> dict[str, Any]:
    return {"ranks": ranks, "cases": SPLIT if ranks == 2 else ONE} | parts


CLEAN: tuple[RLMutant, ...] = tuple(
    RLMutant("", text, {}, **clean(ranks, parts))
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
