"""OpenRLHF's own SFTTrainer.fit, loss, Actor and strategy, on a DeepSpeed engine.

Only one import is replaced by an empty module: flash-attn, which needs a GPU compiler and is not called here.
The engine is made with torch's SGD, because DeepSpeed's own optimizers need that compiler too.
"""

from __future__ import annotations

import os
import sys
import types
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import, which picks the accelerator

import deepspeed
import harness
import torch

harness.deepspeed_without_compiler()
NEVER = 10**9

SUBJECTS = [{
    "name": "OpenRLHF SFTTrainer", "needs": ["openrlhf", "transformers", "torch"], "brings": ["deepspeed"],
    "cases": ["ENGINE", "clipped", "scheduled"],
    "without": {
        "resumed": "its checkpoints are made by its command, which needs a GPU",
        "window": "a loop feeds the engine, which never sees the end of an epoch",
    },
    "configurations": [
        {"offload": False, "arch": "llama", "processes": [1, 2]},
        {"offload": True, "arch": "llama"},
    ],
}]  # fmt: skip


def without_flash_attention() -> None:
    padding = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
    names = {"flash_attn": (), "flash_attn.bert_padding": padding, "flash_attn.utils": ()}
    names["flash_attn.utils.distributed"] = ("all_gather",)
    for name, parts in names.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(dict.fromkeys(parts))
        sys.modules[name] = module


def arguments(spec: harness.Spec) -> SimpleNamespace:
    """Return what the trainer and the strategy read, under the newer nested names and the older flat ones."""
    batch_size = spec.rows_per_microbatch * spec.accumulation * spec.world_size
    return SimpleNamespace(
        model=SimpleNamespace(aux_loss_coef=0.0),
        ds=SimpleNamespace(packing_samples=False, param_dtype="fp32"),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=NEVER),
        eval=SimpleNamespace(steps=NEVER),
        ckpt=SimpleNamespace(save_steps=NEVER),
        train=SimpleNamespace(batch_size=batch_size, dynamic_batch_enable=False),
        local_rank=-1,
        aux_loss_coef=0.0,
        packing_samples=False,
        train_batch_size=batch_size,
        **dict.fromkeys(("use_wandb", "use_tensorboard")),
        **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), NEVER),
    )


def strategy_of(spec: harness.Spec) -> Any:
    """Return a DeepspeedStrategy in the state after ``setup_distributed``, on a mesh of CPUs."""
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    args = arguments(spec)
    sizes = {"micro_train_batch_size": spec.rows_per_microbatch, "train_batch_size": args.train_batch_size}
    made = DeepspeedStrategy(zero_stage=spec.options.get("stage", 2), args=args, **sizes)
    made.world_size = spec.world_size
    names, shape = ("dp", "sp", "tp"), (spec.world_size, 1, 1)
    made.ds_device_mesh = torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    made.accumulated_gradient = spec.accumulation
    return made


def rows_of(spec: harness.Spec) -> list[dict[str, list[int]]]:
    """Return rows whose mask is 1 at t if token t + 1 is trained, as OpenRLHF marks predicting tokens."""
    return [{"ids": r["ids"], "mask": [*r["trained"][1:], 0]} for r in spec.rows]


def collate(rows: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, masks = [r["ids"] for r in rows], [r["mask"] for r in rows]
    tokens, real, trained = (harness.padded(v, 0)[:, None] for v in (ids, [[1] * len(v) for v in ids], masks))
    return tokens, real, trained.float()  # B 1 T


def engine_of(spec: harness.Spec, model: torch.nn.Module) -> tuple[Any, Any]:
    plain, stage = spec.optimizer(harness.parameters_of(model)), spec.options.get("stage", 2)
    config = harness.deepspeed_settings(spec, stage, spec.rows_per_microbatch, spec.accumulation)
    how = {"optimizer": plain, "lr_scheduler": spec.scheduler(plain), "config": config}
    engine, optimizer, *_ = deepspeed.initialize(model=model, **how)
    return engine, optimizer


def run(spec: harness.Spec) -> None:
    without_flash_attention()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    from openrlhf.models import Actor
    from openrlhf.trainer.sft_trainer import SFTTrainer

    strategy = strategy_of(spec)
    model = harness.tiny_model(spec)
    recorder = harness.Recorder(spec, model)
    engine, optimizer = engine_of(spec, model)
    actor = Actor(engine)
    actor.packing_samples = False
    loader = strategy.setup_dataloader(
        rows_of(spec), spec.rows_per_microbatch, pin_memory=False, shuffle=False, collate_fn=collate
    )
    schedule = SimpleNamespace(get_last_lr=lambda: [spec.lr])
    trainer = SFTTrainer(actor, strategy, optimizer, loader, None, schedule, max_epochs=spec.epochs)
    # Up to DeepSpeed 0.18, an all-gather writes into a view, which torch forbids while gradients are tracked.
    engine.step = torch.no_grad()(engine.step)
    trainer.fit(strategy.args)
    recorder.finish(**harness.versions("openrlhf", "deepspeed", "transformers"))
    engine.destroy()
