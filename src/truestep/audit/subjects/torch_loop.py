"""The control, a plain torch loop as in every tutorial. The loss is summed, and divided once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness
from torch import nn

Watch = Callable[..., None]  # (model, snapshot=None): for harness.Recorder, before the model is wrapped
Window = list[list[int]]

SUBJECTS = [{"name": "torch loop", "needs": ["torch"], "cases": ["CASES", "RELATED"]}]  # fmt: skip


def train(
    spec: harness.Spec,
    build: Callable[[Watch], nn.Module],
    backward: Callable[[nn.Module, Window], float | None],
) -> harness.Recorder:
    """Pass every window to ``backward``, then clip, step and advance the schedule; resume at most once."""
    found: list[harness.Recorder] = []

    def watch(model: nn.Module, snapshot: Any = None) -> None:
        if found:
            found[0].resume(model, snapshot)
        else:
            found.append(harness.Recorder(spec, model, snapshot))

    checkpoint: dict[str, Any] = {}  # of this rank, in memory: how torch writes files is not audited
    parts = spec.parts()
    for number, windows in enumerate(parts):
        model = build(watch)
        optimizer = spec.optimizer(model.parameters())
        state = {"model": model, "optimizer": optimizer, "scheduler": spec.scheduler(optimizer)}
        if number:
            for name, saved in checkpoint.items():
                state[name].load_state_dict(saved)
        model.train()
        for window in windows:
            loss = backward(model, window)
            if spec.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
            optimizer.step()
            state["scheduler"].step()
            optimizer.zero_grad()
            if loss is not None:
                found[0].logged["loss"].append(loss)
        if number + 1 < len(parts):
            checkpoint = copy.deepcopy({name: one.state_dict() for name, one in state.items()})
    return found[0]


def run(spec: harness.Spec) -> None:
    def build(watch: Watch) -> nn.Module:
        model = harness.tiny_model(spec).to(spec.dtype)
        watch(model)
        return model

    def backward(model: nn.Module, window: Window) -> float:
        total = spec.count(window)
        logged = 0.0
        for batch in window:
            loss = harness.summed_loss(spec, model, batch) / total
            loss.backward()
            logged += float(loss.detach())
        return logged

    train(spec, build, backward).finish()
