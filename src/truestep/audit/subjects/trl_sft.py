"""TRL's SFTTrainer on token ids with a mask of the assistant's tokens. Rows are plain, packed or a chat.

Options: those of hf_trainer; ``packing``; ``assistant_only`` passes messages, and TRL makes the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import chats
import harness
import hf_trainer
import trl
from datasets import Dataset

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)

SUBJECTS = [
    {
        "name": "TRL SFTTrainer", "needs": ["trl", "transformers", "accelerate", "datasets", "torch"],
        "configurations": [
            {"arch": "llama", "processes": [1, 2], "cases": ["CASES", "RELATED"]},
            {"arch": "llama", "packing": True, "cases": ["ragged", "unsplit"],
             "without": {"masked, window, whole": "packed rows are not one row for each micro-batch"}},
            {"arch": "llama", "assistant_only": True, "cases": ["chat"],
             "without": {"ragged, unsplit, masked, window, whole": "the mask is made from the turns of a chat"}},
        ],
    },
    {
        "name": "TRL SFTTrainer + DeepSpeed",
        "needs": ["trl", "deepspeed", "transformers", "accelerate", "datasets", "torch"],
        "configurations": [
            {"zero_stage": 2, "offload": True, "assistant_only": True, "arch": "llama", "cases": ["chat"],
             "without": {"ragged, unsplit, masked, window, whole": "the mask is made from the turns of a chat"}},
        ],
    },
]  # fmt: skip


def dataset(spec: harness.Spec) -> Any:
    if spec.options.get("assistant_only"):
        return Dataset.from_list([{"messages": chats.messages(r)} for r in spec.rows])
    masks = [{"input_ids": r["ids"], "completion_mask": r["trained"]} for r in spec.rows]
    return Dataset.from_list([{**mask, "labels": spec.labels(i)} for i, mask in enumerate(masks)])


def trainer_of(spec: harness.Spec) -> Callable[[Any], Any]:
    """Return a function that makes the SFTTrainer of a model."""
    wanted = {
        "packing": bool(spec.options.get("packing")),
        "assistant_only_loss": bool(spec.options.get("assistant_only")),
        "completion_only_loss": None if spec.options.get("assistant_only") else True,
        "max_length": 64 if spec.options.get("packing") else 256,  # so that there are several packed rows
        "max_seq_length": 256,
        "loss_type": spec.options.get("loss_type"),
    }
    accepted = inspect.signature(trl.SFTConfig.__init__).parameters
    if wanted["loss_type"] and "loss_type" not in accepted:
        raise SystemExit("SystemExit: this release has no option loss_type")
    own = {k: v for k, v in wanted.items() if k in accepted and v is not None}
    settings = hf_trainer.arguments(spec, trl.SFTConfig) | own | {"remove_unused_columns": True}

    def build(model: Any) -> Any:
        how = {
            "processing_class": chats.tokenizer(spec.vocabulary, TEMPLATE),
            **hf_trainer.optimizers(spec, model),
        }
        data = dataset(spec)
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(**settings), train_dataset=data, **how)

    return build


def run(spec: harness.Spec) -> None:
    recorder = hf_trainer.train(spec, trainer_of(spec))
    recorder.finish(**harness.versions("trl", "transformers", "accelerate", "deepspeed"))
