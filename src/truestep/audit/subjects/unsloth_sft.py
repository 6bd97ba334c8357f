"""TRL's SFTTrainer after ``import unsloth``, which replaces parts of it. Unsloth needs a GPU to be imported."""

from __future__ import annotations

import unsloth  # noqa: F401  # isort: skip  # before what it changes

import harness
import trl_sft

SUBJECTS = [{
    "name": "Unsloth SFT", "needs": ["unsloth", "transformers", "accelerate", "datasets", "torch"], "brings": ["trl"],
    "configurations": [{"arch": "llama"}],
}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    trl_sft.run(spec)
