"""TRL's GRPOTrainer with its own sampling by ``generate`` of transformers, from the trained model itself.

A subclass of the model notes what ``generate`` returns, and asks it for the scores of its tokens too. Options: arch;
``tied``; ``adapter`` (lora, by PEFT); ``evidence`` is tokens if the scores are not asked for; ``fault`` replaces
``generate`` by a sampler with wrong weights (delivery_faults).
"""

from __future__ import annotations

import inspect
import os
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import adapters
import chats
import delivery_faults
import delivery_recorder
import harness
import hf_trainer
import torch
import transformers
import trl
from datasets import Dataset

SUBJECTS = [
    {
        "name": "TRL weight delivery", "needs": ["trl", "transformers", "accelerate", "datasets", "torch"],
        "cases": ["delivery"],
        "configurations": [
            {"arch": "llama", "optimizer": "adamw"},
            {"arch": "llama", "tied": True, "optimizer": "adamw"},
            {"arch": "llama", "evidence": "tokens", "optimizer": "adamw"},
        ],
    },
    {
        "name": "PEFT with TRL weight delivery",
        "needs": ["peft", "trl", "transformers", "accelerate", "datasets", "torch"], "cases": ["delivery"],
        "configurations": [{"arch": "llama", "adapter": "lora", "optimizer": "adamw"}],
    },
]  # fmt: skip


def settings(spec: harness.Spec) -> dict[str, Any]:
    """Return the arguments that this release accepts."""
    wanted = hf_trainer.arguments(spec, trl.GRPOConfig) | {
        "max_steps": spec.steps,
        "num_generations": spec.case["samples"],
        "max_completion_length": spec.case["new_tokens"],
        "max_prompt_length": None,
        "temperature": spec.case["temperature"],
        "shuffle_dataset": False,
        "beta": 0.0,
    }
    accepted = inspect.signature(trl.GRPOConfig.__init__).parameters
    return {k: v for k, v in wanted.items() if k in accepted}


def with_notes(model: Any, recorder: delivery_recorder.Delivery, broken: Any) -> None:
    """Make the model an instance of a subclass whose ``generate`` notes the samples of every round, or, with a fault,
    returns those of another model."""
    case, own = recorder.spec.case, type(model)
    length, blind = len(recorder.spec.rows[0]["ids"]), recorder.spec.options.get("evidence") == "tokens"

    def generate(self: Any, *args: Any, **others: Any) -> Any:
        if broken is None:
            asked = {**others, "return_dict_in_generate": True, "output_scores": True}
            found = own.generate(self, *args, **(others if blind else asked))
            ids, scores = (found, ()) if blind else (found.sequences, found.scores)
        else:
            ids = args[0] if args else others.get("inputs", others.get("input_ids"))
            broken.deliver(recorder.states)
            ids, scores = broken.sample(ids, case["new_tokens"], case["temperature"], case["stop"])
        after = ids[:, length:]
        logps = [s.log_softmax(-1).gather(1, after[:, i, None])[:, 0] for i, s in enumerate(scores)]
        reported = [None] * len(after) if blind else torch.stack(logps, 1).tolist()
        recorder.sampled(list(zip(ids[:, :length].tolist(), after.tolist(), reported, strict=True)))
        return ids

    model.__class__ = type(own.__name__, (own,), {"generate": generate})


def callback_of(
    recorder: delivery_recorder.Delivery, model: Any, scale: float
) -> transformers.TrainerCallback:
    """Return a callback that notes the weights before every step; a step begins with its samples."""

    def on_step_begin(args: Any, state: Any, control: Any, **more: Any) -> None:
        recorder.weights(delivery_recorder.state_of(model.state_dict(), scale))

    callback = transformers.TrainerCallback()
    callback.on_step_begin = on_step_begin
    return callback


def run(spec: harness.Spec) -> None:
    hf_trainer.fresh_state()
    model, plain = delivery_recorder.tiny_models(spec)
    inner, scale = model, 0.0
    if spec.options.get("adapter"):
        model = adapters.with_peft(spec, model)
        inner, scale = model.get_base_model(), adapters.ALPHA / adapters.RANK
    recorder = delivery_recorder.Delivery(spec, plain)
    fault = spec.options.get("fault")
    with_notes(inner, recorder, delivery_faults.Wrong(fault, plain) if fault else None)
    tokenizer = chats.tokenizer(spec.vocabulary, chats.ENDED)
    tokenizer.chat_template, tokenizer.padding_side = None, "left"
    place = str(spec.folder / "model")
    tokenizer.save_pretrained(place)
    plain.save_pretrained(place)
    inner.config._name_or_path = inner.name_or_path = place  # a tokenizer is loaded from here
    draw = torch.Generator().manual_seed(3)

    def reward(completions: list[Any], **others: Any) -> list[float]:
        return torch.randn(len(completions), generator=draw).tolist()

    prompts = [{"prompt": chats.words(row["ids"])} for row in spec.rows]
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=trl.GRPOConfig(**settings(spec)), processing_class=tokenizer,
        train_dataset=Dataset.from_list(prompts), callbacks=[callback_of(recorder, model, scale)],
    )  # fmt: skip
    trainer.train()
    recorder.finish(**harness.versions("peft" if scale else "trl", "trl", "transformers", "accelerate"))
