"""The sentences about RL steps, as in ``words.SENTENCES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Form = str | Callable[[Mapping[str, Any]], str]

NORMALISERS = {
    "tokens": "the mean over tokens", "sequences": "the mean over sequences of their token means",
    "sequence_sums": "the mean over sequences of their sums", "max_length": "sums divided by sequences times the length "
    "limit", "longest": "sums divided by sequences times the longest completion",
    "groups": "the mean over groups of their token means",
}  # fmt: skip
SCOPES = {
    "step": "the normaliser is counted over the whole step",
    "micro_batch": "the normaliser is counted in every micro-batch (a mean of means)",
    "micro_batch_sum": "the normaliser is counted in every micro-batch, and the means are summed",
    "rank": "every rank divides by its own normaliser",
    "rollout": "the normaliser is that of an average update of the rollout batch, not of this update",
    "rollout_sum": "every update is divided by the normaliser of the whole rollout batch, so more updates per rollout "
    "batch make every update smaller",
}  # fmt: skip
COUNTED = {
    "trained": "only trained tokens are counted", "all": "the normaliser also counts tokens that are masked",
    "padded": "the normaliser also counts padding", "longest": "every micro-batch is divided by its longest completion",
    "with_prompts": "the normaliser also counts the prompts' tokens",
    "with_prompt_targets": "the normaliser also counts the prompts' tokens",
    "untruncated_rows": "the normaliser does not count masked samples",
    "rewarded_rows": "the normaliser does not count samples with an advantage of 0",
}  # fmt: skip
BASELINES = {
    "group_mean": "the group's mean", "leave_one_out": "the mean of the other samples", "batch_mean": "the batch's mean",
    "group_median": "the group's median", "group_min": "the group's smallest reward", "none": "0",
}  # fmt: skip
SPREADS = {
    "group_std": "the group's standard deviation",
    "batch_std": "the batch's standard deviation",
    "none": "nothing",
}
GROUPS = {
    "group": "the samples of a prompt", "strided": "samples of different prompts (every n-th one)",
    "shifted": "groups that begin one sample late", "micro_batch": "the part of a group in one micro-batch",
    "rank": "all samples of a rank", "batch": "all samples of the batch",
}  # fmt: skip
SURROGATES = {
    "clip": "the clipped ratio", "clip_both": "a ratio that is clipped on both sides, whatever the advantage's sign",
    "clip_wrong": "the larger of the clipped and the unclipped loss in place of the smaller", "cispo": "CISPO",
    "importance": "the ratio without a clip", "reinforce": "REINFORCE without a ratio", "sapo": "SAPO",
}  # fmt: skip
OLD = {
    "old": "the policy that sampled", "policy": "the current policy itself (the ratio is always 1)",
    "stale": "an older policy", "engine": "the sampler", "reference": "the frozen reference", "initial": "the first policy",
    "previous_token": "the log-probability of the token before", "next_token": "the log-probability of the token after",
}  # fmt: skip
CORRECTIONS = {
    "none": "nothing", "truncate": "the truncated ratio", "mask": "the masked ratio", "inverse": "the inverse ratio",
    "sequence_truncate": "the truncated ratio of the sequence", "sequence_mask": "the masked ratio of the sequence",
    "ratio": "the ratio without a bound",
}  # fmt: skip


def _pair(names: Mapping[str, str], lead: str) -> Form:
    return lambda v: f"{lead} {names[v['found']]}; asked: {names[v['asked']]}"


def _ends(v: Mapping[str, Any]) -> str:
    return "trained" if v["found"] else "not trained"


RL_SENTENCES: dict[str, Form] = {
    "rl_normaliser": _pair(NORMALISERS, "the loss is"),
    "rl_scope": lambda v: SCOPES[v["found"]],
    "rl_kl_scope": lambda v: f"of the KL term, {SCOPES[v['found']]}",
    "rl_entropy_scope": lambda v: f"of the entropy bonus, {SCOPES[v['found']]}",
    "rl_entropy_normaliser": "the entropy bonus is a mean over sequences of their token means",
    "rl_counted": lambda v: COUNTED[v["found"]],
    "rl_advantage_scale": _pair(SPREADS, "advantages are divided by"),
    "rl_baseline": _pair(BASELINES, "the baseline is"),
    "rl_ddof": lambda v: f"the standard deviation divides by {'n − 1' if v['found'] else 'n'}",
    "rl_epsilon": "the epsilon beside the standard deviation is {found:.3g}; asked: {asked:.3g}",
    "rl_grouping": lambda v: f"advantages are taken over {GROUPS[v['found']]}",
    "rl_roll": "every sample has the advantage of another one ({found:+d} places)",
    "rl_sign": "the advantages have the wrong sign",
    "rl_loss_sign": "the loss has the wrong sign",
    "rl_surrogate": _pair(SURROGATES, "the policy term is"),
    "rl_level": "the ratio is that of the {found}; asked: that of the {asked}",
    "rl_old": _pair(OLD, "the ratio is taken to"),
    "rl_clip_range": lambda v: f"ratios are clipped to [{1 - v['low']:.4g}, {1 + v['high']:.4g}]; asked: "
    f"[{1 - v['asked_low']:.4g}, {1 + v['asked_high']:.4g}]",
    "rl_clip_dual": "with a negative advantage, ratios above {found:.3g} are clipped; asked: {asked:.3g} (0: no clip)",
    "rl_correction": _pair(CORRECTIONS, "for the gap between sampler and trainer, tokens are multiplied by"),
    "rl_correction_high": "the bound of the correction is {found:.3g}; asked: {asked:.3g}",
    "rl_truncated": "truncated samples are {found}",
    "rl_stop": lambda v: f"the stop token is {_ends(v)}",
    "rl_first": lambda v: f"the first token of every completion is {_ends(v)}",
    "rl_kl": "the KL estimate is {found}; asked: {asked}",
    "rl_kl_cap": "the KL estimate of a token is capped at {found:.3g}, beyond which it has no gradient",
    "rl_anchor": lambda v: f"the KL divergence is taken from {OLD[v['found']]}; asked: {OLD[v['asked']]}",
    "rl_policy_weight": "the policy term is multiplied by {scale:.4g}",
    "rl_kl_sign": "the KL term has the wrong sign",
    "rl_kl_missing": "there is no KL term; its weight should be {asked:.3g}",
    "rl_kl_added": lambda v: f"there is a KL term ({v['estimate']}, weight {v['found']:.3g}) that was not asked for",
    "rl_kl_weight": "the weight of the KL term is {found:.3g}; asked: {asked:.3g}",
    "rl_entropy_sign": "the entropy bonus has the wrong sign",
    "rl_entropy_missing": "there is no entropy bonus; its weight should be {asked:.3g}",
    "rl_entropy_added": "there is an entropy bonus (weight {found:.3g}) that was not asked for",
    "rl_entropy_weight": "the weight of the entropy bonus is {found:.3g}; asked: {asked:.3g}",
    "rl_split_factor": lambda v: "the update is multiplied by a factor that depends on how the batch is split: "
    f"{', '.join(f'{f:.3g}' for f in v['factors'])}",
    "rl_temperature": "log-probabilities are taken at temperature {found:.3g}; the samples' temperature is {asked:.3g}",
    "rl_shift": lambda v: "log-probabilities are those of other tokens (labels are "
    f"{'not shifted' if v['found'] == 0 else 'shifted twice'})",
    "rl_unexplained": "no coefficients of the tokens explain {share:.1%} of the gradient",
    "rl_prompt": "prompt tokens are trained on ({share:.1%} of the gradient)",
    "rl_unknown": "no known objective has these coefficients",
    "rl_unknown_split": "no known objective has these coefficients, which depend on how the batch is split",
    "rl_reference": lambda v: f"the coefficients differ from the reference's ({', '.join(v['methods'])})",
    "rl_steps": "{found} updates were seen; expected {asked}",
    "rl_rows": "data is lost: {rows} samples were trained on fewer times than configured ({passes})",
}  # fmt: skip
