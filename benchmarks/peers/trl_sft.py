"""TRL's SFTTrainer on the shared rows, with the same token ids and order, and labels only on the completion.

With ``trainer = "transformers"``, the plain Trainer is used, with the model's own loss over whole logits. On
a CPU, TRL falls back to a layer that also scores prompts and padding, because the fast kernels of its fused
output layer are in Triton.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from measure import StepClock, report, specification
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer


class _Clock(TrainerCallback):
    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.restart()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.end_step()


class _Count:
    """Counts real tokens as they pass."""

    clock: StepClock

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.clock.count(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


class _Trl(_Count, SFTTrainer):
    pass


class _Plain(_Count, Trainer):
    pass


def main() -> None:
    spec = specification()
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, trust_remote_code=False)
    rows = [
        {"input_ids": r["ids"], "labels": [-100] * r["num_prompt"] + r["ids"][r["num_prompt"] :]}
        for r in spec["rows"]
    ]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        general = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": spec["dtype"] == "bfloat16",
            "fp16": False,
            "per_device_train_batch_size": spec["batch_size"],
            "gradient_accumulation_steps": spec["accumulation"],
            "max_steps": spec["warmup"] + spec["steps"],
            "gradient_checkpointing": spec["gradient_checkpointing"],
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        shared = {
            "model": model,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "callbacks": [_Clock(clock)],
        }
        if spec["trainer"] == "trl":
            settings: Any = SFTConfig(**general, max_length=spec["max_length"], packing=spec["packing"])
            trainer: Any = _Trl(**shared, args=settings)
        else:
            settings = TrainingArguments(**general)
            trainer = _Plain(**shared, args=settings, data_collator=DataCollatorForSeq2Seq(tokenizer))
        trainer.clock = clock
        trainer.train()
    extra = {"optimizer": str(settings.optim), "attention": model.config._attn_implementation}
    report({**clock.figures(spec["warmup"]), **extra}, "trl", "torch", "transformers", "accelerate")


if __name__ == "__main__":
    main()
