"""verl's own advantage estimators, policy losses, KL penalty and ``agg_loss``, audited as functions.

The loop around them is like ``ppo_loss`` and the engines of verl: counts of the whole update are passed, gradients
are averaged over ranks, and responses are padded to the length limit. verl's workers need a cluster of GPUs.
"""

from __future__ import annotations

from typing import Any

import harness
import numpy as np
import rl_harness
import rl_recorder
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

SUBJECTS = [{
    "name": "verl policy losses (function level)", "needs": ["verl", "torch"], "cases": ["RL"],
    "configurations": [
        {"arch": "llama", "loss_mode": "vanilla", "processes": [1, 2]},
        {"arch": "llama", "loss_mode": "vanilla", "loss_agg_mode": "seq-mean-token-mean"},
        {"arch": "llama", "loss_mode": "vanilla", "loss_agg_mode": "seq-mean-token-sum"},
        {"arch": "llama", "loss_mode": "vanilla", "loss_agg_mode": "seq-mean-token-sum-norm", "norm_adv_by_std_in_grpo": False},
        {"arch": "llama", "loss_mode": "vanilla", "adv_estimator": "rloo"},
        {"arch": "llama", "loss_mode": "vanilla", "kl_loss_type": "low_var_kl", "kl_loss_coef": 0.1, "entropy_coeff": 0.05},
        {"arch": "llama", "loss_mode": "vanilla", "kl_loss_type": "k3+", "kl_loss_coef": 0.1},
        {"arch": "llama", "loss_mode": "gspo", "loss_agg_mode": "seq-mean-token-mean"},
        {"arch": "llama", "loss_mode": "sapo"},
        {"arch": "llama", "loss_mode": "cispo"},
        {"arch": "llama", "loss_mode": "gpg"},
        {"arch": "llama", "loss_mode": "geo_mean"},
    ],
}]  # fmt: skip
NORMALISERS = {"token-mean": "tokens", "seq-mean-token-mean": "sequences", "seq-mean-token-sum": "sequence_sums",
               "seq-mean-token-sum-norm": "max_length"}  # fmt: skip
SURROGATES = {
    "vanilla": "clip",
    "gspo": "clip",
    "sapo": "sapo",
    "cispo": "cispo",
    "gpg": "reinforce",
    "geo_mean": "clip",
}
KINDS = {"low_var_kl": "k3", "k3+": "k2"}  # the gradient of "+" is that of k2


def config_of(spec: harness.Spec) -> ActorConfig:
    options = spec.options
    mode = options.get("loss_agg_mode", "token-mean")
    own = {"loss_agg_mode": "seq-mean-token-mean" if options["loss_mode"] in ("sapo", "geo_mean") else mode}
    own |= {"ppo_mini_batch_size": 12, "ppo_micro_batch_size_per_gpu": 1, "strategy": "fsdp", "rollout_n": 1}
    return ActorConfig(**own)


def asked(spec: harness.Spec, config: ActorConfig) -> dict[str, Any]:
    options = spec.options
    found: dict[str, Any] = {
        "normaliser": NORMALISERS[config.loss_agg_mode], "epsilon": 1e-6,
        "scale": "group_std" if options.get("norm_adv_by_std_in_grpo", True) else "none",
        "surrogate": SURROGATES[options["loss_mode"]], "clip_low": config.clip_ratio_low or config.clip_ratio,
        "clip_high": config.clip_ratio_high or config.clip_ratio, "entropy": options.get("entropy_coeff", 0.0),
        "level": "sequence" if options["loss_mode"] in ("gspo", "geo_mean") else "token",
    }  # fmt: skip
    if options["loss_mode"] == "vanilla":
        found["clip_dual"] = 3.0
    if options.get("adv_estimator") == "rloo":
        found |= {"baseline": "leave_one_out", "scale": "none"}
    if kind := options.get("kl_loss_type"):
        found |= {"kl": KINDS[kind], "beta": options["kl_loss_coef"]}
    if options["loss_mode"] == "sapo":
        found["tau"] = [config.tau_pos, config.tau_neg]
    found["entropy_normaliser"] = (
        found["normaliser"] if found["normaliser"] in ("tokens", "sequences") else "tokens"
    )
    return found


def advantages(spec: harness.Spec) -> torch.Tensor:
    """Return the advantages [R] of verl's estimator."""
    rows = spec.case["rows"]
    rewards = torch.tensor([[row["reward"]] for row in rows])
    index = np.array([str(row["group"]) for row in rows])
    name, more = spec.options.get("adv_estimator", "grpo"), {}
    if name == "grpo":
        more["norm_adv_by_std_in_grpo"] = spec.options.get("norm_adv_by_std_in_grpo", True)
    estimate = core_algos.get_adv_estimator_fn(name)
    how = {"token_level_rewards": rewards.clone(), "response_mask": torch.ones_like(rewards), "index": index}
    return estimate(**how, **more)[0][:, 0]


def responses(spec: harness.Spec, model: Any, batch: list[int]) -> dict[str, torch.Tensor]:
    """Return log-probabilities, entropies and the mask of the responses, padded to the length limit [B, T]."""
    found: dict[str, list[torch.Tensor]] = {"log_prob": [], "entropy": [], "mask": []}
    rows = [spec.case["rows"][number] for number in batch]
    ids = harness.padded([row["ids"] for row in rows], 0)
    out = model(input_ids=ids)
    logits = (out if isinstance(out, torch.Tensor) else out.logits) / spec.case["temperature"]
    every = torch.log_softmax(logits, -1)
    for place, row in enumerate(rows):
        start, end = row["trained"].index(1), len(row["ids"])
        at = every[place, start - 1 : end - 1]
        pad = (0, spec.case["max_tokens"] - (end - start))
        chosen = at.gather(-1, ids[place, start:end, None])[:, 0]
        parts = {"log_prob": chosen, "entropy": -(at.exp() * at).sum(-1), "mask": torch.ones(end - start)}
        for key, value in parts.items():
            found[key].append(torch.nn.functional.pad(value, pad))
    return {key: torch.stack(values) for key, values in found.items()}


def run_case(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    model, reference = rl_harness.policy_and_reference(spec)
    recorder, config = rl_recorder.RLRecorder(spec, model, reference), config_of(spec)
    recorder.asked = asked(spec, config)
    optimizer, rows, gain = spec.optimizer(model.parameters()), spec.case["rows"], advantages(spec)
    loss_of = core_algos.get_policy_loss_fn(spec.options["loss_mode"])
    size = len(rows) // spec.case["parts"]
    model.train()
    for _ in range(spec.case["rollouts"]):
        with torch.no_grad():
            old = {i: responses(spec, model, [i])["log_prob"] for i in range(len(rows))}
            anchor = {i: responses(spec, reference, [i])["log_prob"] for i in range(len(rows))}
        for number in range(spec.case["parts"] * spec.case["passes"]):
            first = number % spec.case["parts"] * size
            window = list(range(first, first + size))
            counts = {
                "batch_num_tokens": sum(sum(rows[i]["trained"]) for i in window),
                "global_batch_size": len(window),
            }
            config.global_batch_info.update(dp_size=spec.world_size, loss_scale_factor=None, **counts)
            mine = window[spec.rank * size // spec.world_size : (spec.rank + 1) * size // spec.world_size]
            for start in range(0, len(mine), spec.rows_per_microbatch):
                batch = mine[start : start + spec.rows_per_microbatch]
                part = responses(spec, model, batch)
                mask = part["mask"].bool()
                given = {"old_log_prob": torch.cat([old[i] for i in batch]), "log_prob": part["log_prob"]}
                given |= {"advantages": gain[batch][:, None].expand(mask.shape), "response_mask": mask}
                loss = loss_of(**given, loss_agg_mode=config.loss_agg_mode, config=config)[0]
                how = {"loss_mask": mask, "loss_agg_mode": config.loss_agg_mode, **config.global_batch_info}
                if weight := spec.options.get("entropy_coeff"):
                    loss = loss - weight * core_algos.agg_loss(loss_mat=part["entropy"], **how)
                if kind := spec.options.get("kl_loss_type"):
                    base = torch.cat([anchor[i] for i in batch])
                    kl = core_algos.kl_penalty(part["log_prob"], base, kind)
                    loss = loss + spec.options["kl_loss_coef"] * core_algos.agg_loss(loss_mat=kl, **how)
                loss.backward()
            harness.average_gradients(spec, model)
            optimizer.step()
            optimizer.zero_grad()
    recorder.finish(**harness.versions("verl"))


run = rl_harness.by_case(run_case)
