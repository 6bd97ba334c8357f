"""ms-swift's own Seq2SeqTrainer, with its own arguments, template class and collator. Options: those of hf_trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import chats
import harness
import hf_trainer

SUBJECTS = [{
    "name": "ms-swift SFT", "needs": ["ms-swift", "transformers", "accelerate", "torch"],
    "configurations": [{"arch": "llama", "processes": [1, 2], "cases": ["CASES", "RELATED"]}],
}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    from swift.template import Template, TemplateMeta
    from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    settings = hf_trainer.arguments(spec, Seq2SeqTrainingArguments) | {"check_model": False}

    def build(model: Any) -> Any:
        tokenizer = chats.tokenizer(spec.vocabulary, chats.ENDED)
        nothing = dict.fromkeys(("model_dir", "quant_method", "quant_bits", "model_arch"))
        info = {
            **nothing,
            "config": model.config,
            "task_type": "causal_lm",
            "max_model_len": 256,
            "is_moe_model": False,
        }
        meta = {
            **nothing,
            "is_multimodal": False,
            "model_type": "llama",
            "is_reward": False,
            "template": "words",
        }
        about = {"model_info": SimpleNamespace(**info), "model_meta": SimpleNamespace(**meta)}
        for owner in (tokenizer, model):
            vars(owner).update(about)
        template = Template(tokenizer, TemplateMeta("words", [], ["{{QUERY}}"], None), max_length=256)
        template.set_mode("train")
        data = hf_trainer.Rows(spec)
        how = hf_trainer.optimizers(spec, model)
        args = Seq2SeqTrainingArguments(**settings)
        return Seq2SeqTrainer(model=model, args=args, template=template, train_dataset=data, **how)

    recorder = hf_trainer.train(spec, build)
    recorder.finish(**harness.versions("ms-swift", "transformers", "accelerate"))
