"""LLaMA-Factory's own CustomSeq2SeqTrainer for SFT, with its own arguments; rows as hf_trainer gives them.

Only torchaudio is replaced by an empty module: it reads sound files, and there are none. Options: those of
hf_trainer.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import hf_trainer
import kit


def without_sound() -> None:
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = module


def run(spec: kit.Spec) -> None:
    without_sound()
    from llamafactory.hparams import FinetuningArguments, TrainingArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    settings = hf_trainer.arguments(spec, TrainingArguments)

    def build(model: Any) -> Any:
        return CustomSeq2SeqTrainer(
            finetuning_args=FinetuningArguments(),
            processor=None,
            tokenizer=None,
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=hf_trainer.Rows(spec),
            data_collator=hf_trainer.collate,
            **hf_trainer.optimizers(spec, model),
        )

    recorder = hf_trainer.train(spec, build)
    recorder.finish(**kit.versions("llamafactory", "transformers", "accelerate", "deepspeed"))


if __name__ == "__main__":
    kit.main(run)
