"""The loop in accelerate's documentation, with the summed loss divided by the window's tokens.

The loop calls ``accumulate`` and ``backward``. Accelerate itself divides by the accumulation steps and DDP
averages over ranks, so the documentation multiplies by both. The scheduler ticks once per process in every
step, as the documentation says, and is made for that many ticks. Options: arch, optimizer; ``naive`` passes
the mean of each micro-batch to accelerate (a mean of means, as in the first example of the documentation).
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from accelerate import Accelerator
from hf_trainer import fresh_state

SUBJECTS = [{
    "name": "accelerate", "needs": ["accelerate", "torch"], "processes": [1, 2], "cases": ["ENGINE", "RELATED"],
    "without": {"window": "a loop feeds the engine, which never sees the end of an epoch"},
}]  # fmt: skip


def prepared(spec: harness.Spec, model: torch.nn.Module) -> tuple[Any, Any, Any, Any]:
    """Return the accelerator, the model, the optimizer and the scheduler."""
    fresh_state()
    accelerator = Accelerator(gradient_accumulation_steps=spec.accumulation, cpu=True)
    optimizer = spec.optimizer(model.parameters())
    scheduler = spec.scheduler(optimizer, ticks=spec.world_size)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train(spec: harness.Spec, parts: tuple[Any, Any, Any, Any], windows: list[list[list[int]]]) -> None:
    accelerator, wrapped, optimizer, scheduler = parts
    wrapped.train()
    for window in windows:
        counts = [spec.count([batch]) for batch in window]
        total = accelerator.reduce(torch.tensor(sum(counts)), "sum").item()
        for index, batch in enumerate(window):
            with accelerator.accumulate(wrapped):
                loss = harness.summed_loss(spec, wrapped, batch)
                if spec.options.get("naive"):
                    accelerator.backward(loss / max(1.0, counts[index]))
                else:
                    accelerator.backward(loss * spec.world_size * spec.accumulation / total)
                if accelerator.sync_gradients and spec.max_grad_norm:
                    accelerator.clip_grad_norm_(wrapped.parameters(), spec.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def run(spec: harness.Spec) -> None:
    model = harness.tiny_model(spec)
    recorder = harness.Recorder(spec, model)
    first, *later = spec.parts()
    parts = prepared(spec, model)
    train(spec, parts, first)
    for windows in later:
        place = str(spec.folder / "state")
        parts[0].save_state(place)
        parts[0].wait_for_everyone()
        model = harness.tiny_model(spec)
        recorder.resume(model)
        parts = prepared(spec, model)
        parts[0].load_state(place)
        train(spec, parts, windows)
    recorder.finish(**harness.versions("accelerate"))
