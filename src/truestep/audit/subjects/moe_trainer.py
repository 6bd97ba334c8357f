"""transformers' Trainer on a tiny mixture of experts that adds a load-balancing loss of its router (Mixtral).

The model adds the coefficient times this loss to the loss of every micro-batch. A step should have its mean over
micro-batches and ranks, as with one micro-batch. Options: those of hf_trainer; ``coefficient``.
"""

from __future__ import annotations

from typing import Any

import harness
import hf_trainer
import torch
import transformers

SUBJECTS = [{
    "name": "transformers Trainer, mixture of experts", "needs": ["transformers", "accelerate", "torch"],
    "configurations": [{"coefficient": 1.0, "processes": [1, 2], "cases": ["ragged", "unsplit"]}],
}]  # fmt: skip


def models(spec: harness.Spec) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=spec.vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=spec.options["coefficient"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.MixtralForCausalLM(config)
    return model, model


def run(spec: harness.Spec) -> None:
    settings = hf_trainer.arguments(spec, transformers.TrainingArguments)

    def build(model: torch.nn.Module) -> Any:
        how = {"train_dataset": hf_trainer.Rows(spec), "data_collator": hf_trainer.collate}
        return transformers.Trainer(model=model, args=transformers.TrainingArguments(**settings), **how)

    def added(model: torch.nn.Module, rows: list[int]) -> torch.Tensor:
        ids = [spec.rows[row]["ids"] for row in rows]
        mask = harness.padded([[1] * len(line) for line in ids], 0)
        loss = model(input_ids=harness.padded(ids, 0), attention_mask=mask).aux_loss
        return spec.options["coefficient"] * loss

    recorder = hf_trainer.train(spec, build, models, added)
    recorder.finish(transformers=transformers.__version__, **harness.versions("accelerate"))
