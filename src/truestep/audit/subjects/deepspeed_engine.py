"""DeepSpeed's engine with a user's choice of ZeRO stage, offload, accumulation and manual boundary.

The loss is what a careful user writes. It is the sum over the trained tokens, divided once by their number in
the step, and multiplied by what DeepSpeed divides by (accumulation steps, ranks). A correct engine gives each
token weight 1.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import, which picks the accelerator

import deepspeed
import harness
import torch
from torch import Tensor

harness.deepspeed_without_compiler()

SUBJECTS = [{
    "name": "DeepSpeed", "needs": ["deepspeed", "torch"], "cases": ["ENGINE", "RELATED"],
    "without": {"window": "a loop feeds the engine, which never sees the end of an epoch"},
    "configurations": [
        {"stage": 2, "offload": True, "processes": [1, 2]},
        {"stage": 2, "offload": True, "manual": True},
        {"stage": 2, "offload": False},
        {"stage": 1, "offload": True},
        {"stage": 3, "offload": True},
    ],
}]  # fmt: skip


def whole(parameter: Any, ranks: int) -> Tensor:
    """Return a whole parameter in ZeRO stage 3, put together from the shards of all ranks."""
    mine: Tensor = parameter.ds_tensor.detach()
    shards = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(shards, mine)
    return torch.cat(shards)[: parameter.ds_numel]


def run(spec: harness.Spec) -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = harness.tiny_model(spec).to(spec.dtype)
    recorder = harness.Recorder(spec, model, snapshot(spec, harness.parameters_of(model)))
    engine = engine_of(spec, model)
    first, *later = spec.parts()
    train(spec, engine, recorder, first)
    for windows in later:
        engine.save_checkpoint(str(spec.folder / "state"))
        engine.destroy()
        model = harness.tiny_model(spec).to(spec.dtype)
        recorder.resume(model, snapshot(spec, harness.parameters_of(model)))
        engine = engine_of(spec, model)
        engine.load_checkpoint(str(spec.folder / "state"))
        train(spec, engine, recorder, windows)
    recorder.finish(deepspeed=deepspeed.__version__)
    engine.destroy()


def snapshot(spec: harness.Spec, own: list[Tensor]) -> Any:
    """Return a snapshot function for stage 3, where each rank has only a shard, or None for other stages.
    Gathering with DeepSpeed would disturb DeepSpeed's own tracking."""
    if spec.options.get("stage", 2) != 3:
        return None
    return lambda: harness.flat([whole(p, spec.world_size) for p in own])


def engine_of(spec: harness.Spec, model: torch.nn.Module) -> Any:
    optimizer = spec.optimizer(harness.parameters_of(model))
    scheduler = {"lr_scheduler": spec.scheduler(optimizer)} if spec.decays else {}
    # If the boundary is set by hand, the engine is configured without accumulation.
    accumulation = 1 if spec.options.get("manual", False) else spec.accumulation
    stage = spec.options.get("stage", 2)
    config = harness.deepspeed_settings(spec, stage, spec.rows_per_microbatch, accumulation)
    if stage == 3:  # otherwise parameters this small are never partitioned
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **scheduler)[0]


def train(
    spec: harness.Spec, engine: Any, recorder: harness.Recorder, windows: list[list[list[int]]]
) -> None:
    manual = spec.options.get("manual", False)
    engine.train()
    for window in windows:
        total = harness.everywhere(spec.count(window))
        divided_by = spec.world_size * (1 if manual else spec.accumulation)
        logged = 0.0
        for index, batch in enumerate(window):
            if manual:
                engine.set_gradient_accumulation_boundary(index == len(window) - 1)
            loss = harness.summed_loss(spec, engine, batch) / total
            engine.backward(loss * divided_by)
            # Up to 0.18, an all-gather writes into a view, which torch forbids while gradients are tracked.
            if not manual or index == len(window) - 1:
                with torch.no_grad():
                    engine.step()
            logged += float(loss.detach())
        recorder.logged["loss"].append(harness.everywhere(logged))
