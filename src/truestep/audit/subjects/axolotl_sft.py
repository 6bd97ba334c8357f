"""axolotl's own AxolotlTrainer, with its own training arguments. The rows come from hf_trainer, as do the options."""

from __future__ import annotations

from typing import Any

import harness
import hf_trainer

SUBJECTS = [{
    "name": "axolotl SFT", "needs": ["axolotl", "transformers", "accelerate", "torch"], "brings": ["trl"],
    "configurations": [{"arch": "llama", "cases": ["CASES", "RELATED"]}],
}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from datasets import Dataset

    settings = hf_trainer.arguments(spec, AxolotlTrainingArguments)

    def build(model: Any) -> Any:
        data = {
            "train_dataset": Dataset.from_list([*hf_trainer.Rows(spec)]),
            "data_collator": hf_trainer.collate,
        }
        how = {**data, **hf_trainer.optimizers(spec, model)}
        return AxolotlTrainer(model=model, args=AxolotlTrainingArguments(**settings), **how)

    recorder = hf_trainer.train(spec, build)
    recorder.finish(**harness.versions("axolotl", "transformers", "accelerate"))
