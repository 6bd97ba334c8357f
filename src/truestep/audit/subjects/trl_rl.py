"""TRL's GRPOTrainer on fixed completions and rewards.

Only the completions are given: by the trainer's own argument ``rollout_func`` if this release has it (option
``rollouts = "function"``), otherwise by the model's own public method ``generate``, which a subclass of the model
overrides. Everything after that is TRL's. The objective that it is asked for is read from its resolved GRPOConfig.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # a note about rollout_func

import chats
import harness
import hf_trainer
import rl_harness
import rl_recorder
import torch
import trl
from datasets import Dataset

SUBJECTS = [{
    "name": "TRL GRPOTrainer", "needs": ["trl", "transformers", "accelerate", "datasets", "torch"],
    "cases": ["RL"],
    "configurations": [
        {"arch": "llama", "processes": [1, 2]},
        {"arch": "llama", "beta": 0.1},
        {"arch": "llama", "loss_type": "grpo"},
        {"arch": "llama", "loss_type": "dr_grpo", "scale_rewards": "none"},
        {"arch": "llama", "loss_type": "bnpo", "documented": "loss_type = bnpo"},
        {"arch": "llama", "mask_truncated_completions": True},
        {"arch": "llama", "importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"arch": "llama", "loss_type": "cispo", "epsilon_high": 1.3},
        {"arch": "llama", "loss_type": "sapo"},
        {"arch": "llama", "entropy_coef": 0.05},
    ],
}]  # fmt: skip
NORMALISERS = {"grpo": "sequences", "sapo": "sequences", "bnpo": "tokens", "dapo": "tokens", "cispo": "tokens",
               "dr_grpo": "max_length", "luspo": "sequence_sums"}  # fmt: skip
SCALES = {"True": "group_std", "group": "group_std", "batch": "batch_std", "False": "none", "none": "none"}


def asked(args: Any, anchor: str) -> dict[str, Any]:
    """Return the objective that the configuration describes, in the words of TRL's documentation."""
    kind = getattr(args, "loss_type", "grpo")
    low = float(getattr(args, "epsilon", 0.2))
    high = getattr(args, "epsilon_high", None)
    found: dict[str, Any] = {
        "normaliser": NORMALISERS[kind],
        "scale": SCALES[str(getattr(args, "scale_rewards", True))],
        "clip_low": low,
        "clip_high": low if high is None else float(high),
        "clip_dual": float(getattr(args, "delta", None) or 0.0),
        "level": getattr(args, "importance_sampling_level", "token"),
        "truncated": "masked" if getattr(args, "mask_truncated_completions", False) else "trained",
        "entropy": float(getattr(args, "entropy_coef", 0.0) or 0.0),
    }
    if kind == "cispo":  # epsilon_high is the largest ratio itself, and there is no smallest one
        found |= {"surrogate": "cispo", "clip_low": 1.0, "clip_high": found["clip_high"] - 1}
    if kind == "sapo":
        found |= {"surrogate": "sapo", "tau": [args.sapo_temperature_pos, args.sapo_temperature_neg]}
    if args.beta:
        corrected = getattr(args, "use_bias_correction_kl", False)
        found |= {"kl": "k3_ratio" if corrected else "k3", "beta": args.beta, "anchor": anchor}
    return found


class Completions:
    """Hands out the completions of every prompt in turn."""

    def __init__(self, spec: harness.Spec, recorder: rl_recorder.RLRecorder) -> None:
        self.rows, self.recorder = spec.case["rows"], recorder
        self.given: dict[tuple[int, ...], int] = {}
        self.prompts: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(self.rows):
            self.prompts.setdefault(tuple(rl_harness.prompt(row)), []).append(number)
        ends = (0, 2)
        self.by_text = {
            chats.words([t for t in rl_harness.completion(row) if t not in ends]): row["reward"]
            for row in self.rows
        }

    def next_row(self, prompt: list[int]) -> int:
        key = tuple(t for t in prompt if t)
        number = self.given[key] = self.given.get(key, -1) + 1
        return self.prompts[key][number % len(self.prompts[key])]

    def rollout(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """This is TRL's ``rollout_func``."""
        chosen = [self.next_row([int(word[1:]) for word in text.split()]) for text in prompts]
        lines = self.recorder.rollout()
        parts = {"prompt_ids": rl_harness.prompt, "completion_ids": rl_harness.completion}
        found = {key: [part(self.rows[i]) for i in chosen] for key, part in parts.items()}
        return {**found, "logprobs": [lines[i] for i in chosen]}

    def generate(self, inputs: Any) -> Any:
        """Return prompts and completions [B, T], padded on the right, as ``generate`` of transformers does."""
        chosen = [self.next_row(line) for line in inputs.tolist()]
        after = harness.padded([rl_harness.completion(self.rows[i]) for i in chosen], 0)
        return torch.cat([inputs, after.to(inputs.device)], 1)

    def reward(self, completions: list[str], **others: Any) -> list[float]:
        return [self.by_text[text.strip()] for text in completions]


def with_generate(model: Any, completions: Completions) -> None:
    """Make the model an instance of a subclass whose ``generate`` returns the given completions."""

    def generate(self: Any, input_ids: Any = None, **others: Any) -> Any:
        return completions.generate(others["inputs"] if input_ids is None else input_ids)

    model.__class__ = type(type(model).__name__, (type(model),), {"generate": generate})


def settings(spec: harness.Spec) -> dict[str, Any]:
    """Return the arguments that this release accepts. Raises NotImplementedError if it lacks one that is needed."""
    case, accepted = spec.case, inspect.signature(trl.GRPOConfig.__init__).parameters
    wanted = hf_trainer.arguments(spec, trl.GRPOConfig) | {
        "max_steps": spec.steps,
        "num_generations": len([row for row in case["rows"] if row["group"] == 0]),
        "max_completion_length": case["max_tokens"],
        "max_prompt_length": 64,
        "temperature": case["temperature"],
        "shuffle_dataset": False,
        "remove_unused_columns": False,
    }
    if case["passes"] > 1:
        wanted["num_iterations"] = case["passes"]
    if case["parts"] > 1:
        wanted["steps_per_generation"] = spec.accumulation * case["parts"]
    own = {k: v for k, v in spec.options.items() if k not in ("arch", "rollouts", "dtype", "processes")}
    if "scale_rewards" in own and "scale_rewards" in accepted and accepted["scale_rewards"].default is True:
        own["scale_rewards"] = own["scale_rewards"] != "none"  # older releases have a switch
    needed = [*own, *(k for k in ("num_iterations", "steps_per_generation") if k in wanted)]
    if missing := [key for key in needed if key not in accepted]:
        raise NotImplementedError(f"this release has no option {missing[0]}")
    return {k: v for k, v in (wanted | own).items() if k in accepted}


def run_case(spec: harness.Spec) -> None:
    hf_trainer.fresh_state()
    how = settings(spec)
    policy, reference = rl_harness.policy_and_reference(spec)
    place = str(spec.folder / "reference")
    reference.save_pretrained(place)
    tokenizer = chats.tokenizer(spec.vocabulary, chats.ENDED)
    tokenizer.chat_template, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(place)
    policy.config._name_or_path = policy.name_or_path = place  # the reference is loaded from here
    recorder = rl_recorder.RLRecorder(spec, policy, reference)
    completions = Completions(spec, recorder)
    public = "rollout_func" in inspect.signature(trl.GRPOTrainer.__init__).parameters
    extra: dict[str, Any] = {}
    if public and spec.options.get("rollouts") != "generate":
        extra["rollout_func"] = completions.rollout
    else:
        with_generate(policy, completions)
    prompts = [{"prompt": chats.words(list(key))} for key in completions.prompts]
    trainer = trl.GRPOTrainer(
        model=policy, reward_funcs=completions.reward, args=trl.GRPOConfig(**how), processing_class=tokenizer,
        train_dataset=Dataset.from_list(prompts), **extra,
    )  # fmt: skip
    anchor = "reference"
    if (frozen := getattr(trainer, "ref_model", None)) is not None:
        first = [next(iter(model.parameters())) for model in (frozen, policy)]
        anchor = "initial" if torch.equal(first[0], first[1]) else "reference"
    recorder.asked = asked(trainer.args, anchor)
    trainer.train()
    recorder.logged["loss"] += [float(told["loss"]) for told in trainer.state.log_history if "loss" in told]
    recorder.finish(**harness.versions("trl", "transformers", "accelerate"))


run = rl_harness.by_case(run_case)
