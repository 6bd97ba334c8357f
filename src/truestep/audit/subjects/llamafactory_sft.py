"""LLaMA-Factory's own CustomSeq2SeqTrainer for SFT, with its own arguments. The rows come from hf_trainer.

Only torchaudio is replaced by an empty module, since no sound files are used. Options: those of hf_trainer.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import harness
import hf_trainer

SUBJECTS = [{
    "name": "LLaMA-Factory", "needs": ["llamafactory", "transformers", "accelerate", "torch"], "brings": ["trl"],
    "configurations": [
        {"arch": "llama", "processes": [1, 2], "cases": ["CASES", "RELATED"]},
        {"arch": "gpt2"},
    ],
}]  # fmt: skip


def without_sound() -> None:
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = module


def run(spec: harness.Spec) -> None:
    without_sound()
    from llamafactory.hparams import FinetuningArguments, TrainingArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    settings = hf_trainer.arguments(spec, TrainingArguments)

    def build(model: Any) -> Any:
        own = {"finetuning_args": FinetuningArguments(), "processor": None, "tokenizer": None}
        data = {"train_dataset": hf_trainer.Rows(spec), "data_collator": hf_trainer.collate}
        how = {**own, **data, **hf_trainer.optimizers(spec, model)}
        return CustomSeq2SeqTrainer(model=model, args=TrainingArguments(**settings), **how)

    recorder = hf_trainer.train(spec, build)
    recorder.finish(**harness.versions("llamafactory", "transformers", "accelerate", "deepspeed"))
