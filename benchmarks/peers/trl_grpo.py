"""TRL's GRPOTrainer with transformers generation, and the prompts, samples and length of truestep's RL
step."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from measure import StepClock, report, specification, text_parity
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class _Clock(TrainerCallback):
    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.restart()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.end_step()


def main() -> None:
    spec = specification()
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, trust_remote_code=False)
    texts = [tokenizer.decode(p["ids"]) for p in spec["prompts_in_order"]]
    changed = sum(
        ids != p["ids"]
        for ids, p in zip(tokenizer(text=texts)["input_ids"], spec["prompts_in_order"], strict=True)
    )
    if changed:
        raise SystemExit(f"{changed} of {len(texts)} prompts have different tokens if decoded and encoded")
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [text_parity(text) for text in completions]

    num_samples = spec["prompts_per_step"] * spec["samples_per_prompt"]
    batch = min(8, num_samples)  # TRL's default per-device batch
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=spec["dtype"] == "bfloat16",
            fp16=False,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=num_samples // batch,
            num_generations=spec["samples_per_prompt"],
            max_completion_length=spec["max_new_tokens"],
            generation_kwargs={"min_new_tokens": spec["max_new_tokens"]},  # always sample to the limit
            max_steps=spec["warmup"] + spec["steps"],
            beta=0.0,
            num_iterations=1,
            loss_type="dapo",
            scale_rewards="none",
            epsilon=0.2,
            epsilon_high=0.28,
            temperature=1.0,
            shuffle_dataset=False,
            gradient_checkpointing=spec["gradient_checkpointing"],
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[_Clock(clock)],
        )
        trainer.train()
    steps = len(clock.marks) - 1
    clock.tokens = [sum(lengths) // steps] * len(clock.tokens)
    extra = {"shortest": min(lengths), "longest": max(lengths), "samples_per_step": len(lengths) / steps}
    report({**clock.figures(spec["warmup"]), **extra}, "trl", "torch", "transformers", "accelerate")


if __name__ == "__main__":
    main()
