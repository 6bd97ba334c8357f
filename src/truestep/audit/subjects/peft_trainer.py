"""PEFT's adapters with transformers' Trainer and TRL's SFTTrainer. Options: those of adapters and hf_trainer;
``trl`` uses TRL."""

from __future__ import annotations

from typing import Any

import adapters
import harness
import hf_trainer
import transformers

SUBJECTS = [
    {
        "name": "PEFT with transformers Trainer", "needs": ["peft", "transformers", "accelerate", "torch"],
        "configurations": [
            {"arch": "llama", "adapter": "lora", "processes": [1, 2], "cases": ["CASES", "RELATED"]},
            {"arch": "llama", "adapter": "dora"},
        ],
    },
    {
        "name": "PEFT with TRL SFTTrainer", "needs": ["peft", "trl", "transformers", "accelerate", "datasets", "torch"],
        "configurations": [{"arch": "llama", "adapter": "lora", "trl": True, "processes": [1, 2]}],
    },
]  # fmt: skip


def run(spec: harness.Spec) -> None:
    def models(spec: harness.Spec) -> tuple[Any, Any]:
        return adapters.with_peft(spec), adapters.reference(spec)

    if spec.options.get("trl"):
        import trl_sft

        recorder = hf_trainer.train(spec, trl_sft.trainer_of(spec), models)
    else:
        settings = hf_trainer.arguments(spec, transformers.TrainingArguments)

        def build(model: Any) -> Any:
            how = {"train_dataset": hf_trainer.Rows(spec), "data_collator": hf_trainer.collate}
            how |= hf_trainer.optimizers(spec, model)
            return transformers.Trainer(model=model, args=transformers.TrainingArguments(**settings), **how)

        recorder = hf_trainer.train(spec, build, models)
    recorder.finish(**harness.versions("peft", "trl", "transformers", "accelerate"))
