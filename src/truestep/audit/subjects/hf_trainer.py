"""transformers' Trainer, plain or with DeepSpeed, with a padding collator and one ``train()`` per case.

Options: arch, optimizer; ``average_tokens_across_devices``; ``zero_stage`` (with ``offload``) selects
DeepSpeed through the Trainer's own ``deepspeed`` argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import harness
import torch
import transformers

SUBJECTS = [
    {
        "name": "transformers Trainer", "needs": ["transformers", "accelerate", "torch"],
        "configurations": [
            {"arch": "llama", "processes": [1, 2], "cases": ["CASES", "RELATED"]},
            {"arch": "gpt2"},
            {"arch": "llama", "optimizer": "adamw"},
            {"arch": "llama", "average_tokens_across_devices": False, "processes": 2,
             "documented": "average_tokens_across_devices = false"},
        ],
    },
    {
        "name": "transformers Trainer + DeepSpeed", "needs": ["transformers", "deepspeed", "accelerate", "torch"],
        "configurations": [{"zero_stage": 2, "offload": True, "arch": "llama"}],
    },
]  # fmt: skip


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: harness.padded([r[key] for r in rows], filler) for key, filler in fillers.items()}


class Rows(torch.utils.data.Dataset):
    """The case's rows in the form that the Trainer takes; no other library is needed."""

    def __init__(self, spec: harness.Spec) -> None:
        self.spec = spec

    def __len__(self) -> int:
        return len(self.spec.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.spec.rows[index]["ids"]  # raises IndexError after the last row
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self.spec.labels(index)}


def arguments(spec: harness.Spec, known: Any) -> dict[str, Any]:
    """Return the arguments that this release accepts, for any trainer of this family."""
    stage = spec.options.get("zero_stage")
    wanted: dict[str, Any] = {
        "output_dir": str(spec.folder / "out"),
        "per_device_train_batch_size": spec.rows_per_microbatch,
        "gradient_accumulation_steps": spec.accumulation,
        "num_train_epochs": spec.epochs,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "linear" if spec.decays else "constant",
        "warmup_steps": 0,
        "optim": "sgd" if spec.options.get("optimizer", "sgd") == "sgd" else "adamw_torch",
        "weight_decay": spec.options.get("weight_decay", 0.0),
        # None leaves it to the framework.
        "max_grad_norm": spec.max_grad_norm if spec.options.get("max_grad_norm", 0) is not None else None,
        "label_smoothing_factor": spec.options.get("label_smoothing_factor"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 3,
        "use_cpu": True,
        "bf16": spec.dtype is torch.bfloat16,
        "gradient_checkpointing": False,
        "average_tokens_across_devices": spec.options.get("average_tokens_across_devices"),
        "ddp_backend": "gloo" if spec.world_size > 1 else None,
        "deepspeed": None if stage is None else harness.deepspeed_settings(spec, stage, "auto", "auto"),
    }
    if wanted["deepspeed"] and wanted["max_grad_norm"] is None:
        wanted["deepspeed"]["gradient_clipping"] = "auto"
    accepted = inspect.signature(known.__init__).parameters
    unknown = [k for k in spec.options if k in wanted and k not in accepted]
    if unknown:
        raise SystemExit(f"SystemExit: this release has no option {unknown[0]}")
    return {k: v for k, v in wanted.items() if k in accepted and v is not None}


def fresh_state() -> None:
    """Reset Accelerate's state, which otherwise lasts for the whole process, before a new case."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def stop_at(step: int) -> transformers.TrainerCallback:
    """Return a callback that saves and ends the training after a step, as a job's time limit does."""

    def on_step_end(args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            control.should_save = control.should_training_stop = True

    callback = transformers.TrainerCallback()
    callback.on_step_end = on_step_end
    return callback


def optimizers(spec: harness.Spec, model: torch.nn.Module) -> dict[str, Any]:
    """Return SGD with momentum, for which the Trainer has no argument. The Trainer makes the scheduler."""
    return {"optimizers": (spec.optimizer(model.parameters()), None)} if spec.case["resume_after"] else {}


def plain(spec: harness.Spec) -> tuple[torch.nn.Module, torch.nn.Module]:
    model = harness.tiny_model(spec)
    return model, model


def train(
    spec: harness.Spec,
    build: Callable[[torch.nn.Module], Any],
    models: Callable[[harness.Spec], tuple[torch.nn.Module, torch.nn.Module]] = plain,
    added: Callable[[torch.nn.Module, list[int]], torch.Tensor] | None = None,
) -> harness.Recorder:
    """Call ``train()`` on the trainer that ``build`` makes, once, or up to a checkpoint and again from it.
    ``models`` returns the trained model and the reference; ``added`` is ``Recorder.added``."""
    fresh_state()
    if spec.options.get("zero_stage") is not None:
        harness.deepspeed_without_compiler()
    model, reference = models(spec)
    recorder = harness.Recorder(spec, reference)
    recorder.added = added
    if reference is not model:
        recorder.resume(model)
    trainer, at = build(model), spec.case["resume_after"]
    if at:
        trainer.add_callback(stop_at(at))
        trainer.train()
        if spec.world_size > 1:
            torch.distributed.barrier()
        fresh_state()
        model, _ = models(spec)
        recorder.resume(model)
        trainer = build(model)
        trainer.train(resume_from_checkpoint=str(spec.folder / "out" / f"checkpoint-{at}"))
    else:
        trainer.train()
    recorder.logged["loss"] += [float(told["loss"]) for told in trainer.state.log_history if "loss" in told]
    return recorder


def run(spec: harness.Spec) -> None:
    settings = arguments(spec, transformers.TrainingArguments)

    def build(model: torch.nn.Module) -> Any:
        how = {"train_dataset": Rows(spec), "data_collator": collate, **optimizers(spec, model)}
        return transformers.Trainer(model=model, args=transformers.TrainingArguments(**settings), **how)

    recorder = train(spec, build)
    recorder.finish(transformers=transformers.__version__, **harness.versions("accelerate", "deepspeed"))
