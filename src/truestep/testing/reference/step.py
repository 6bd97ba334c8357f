"""The textbook optimizer step over name → float64 tensor: one clip, one update, no hidden state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truestep.settings import OptimizerSettings
from truestep.testing.reference.loss import gradient

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """The running means of g and g², and how many steps they have seen."""

    step: int
    first: Tensors
    second: Tensors


@dataclass(frozen=True)
class StepResult:
    """One step: what it saw before clipping, and the parameters after it."""

    loss: float
    grad_norm: float
    learning_rate: float
    gradient: Tensors
    parameters: Tensors


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str = "constant",
    warmup_fraction: float = 0.0,
    min_lr_ratio: float = 0.1,
) -> float:
    """The learning rate of step 0 … total_steps − 1.

    Equation: W = round(warmup_fraction · T). s < W: peak·(s+1)/W. Then constant: peak; or cosine: floor +
    (peak−floor)·½(1+cos(π(s−W)/(T−W))), floor = min_lr_ratio·peak. So step W−1 and step W have the peak, and
    the floor would be reached at step T, one after the last.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is not one of 0..{total_steps - 1}")
    warmup_steps = round(warmup_fraction * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule != "cosine":
        raise ValueError(f"unknown schedule {schedule!r}: constant or cosine")
    floor = min_lr_ratio * peak
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_by_global_norm(gradients: Tensors, max_norm: float) -> tuple[dict[str, Tensor], float]:
    """Clipped gradients, and their norm before: one norm over all tensors. ``max_norm`` 0 is no clip.

    Equation: g · min(1, max_norm / (‖g‖ + 1e-6)).
    """
    norm = math.sqrt(sum((g * g).sum().item() for g in gradients.values()))
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    return {name: g * factor for name, g in gradients.items()}, norm


def sgd(parameters: Tensors, gradients: Tensors, lr: float) -> dict[str, Tensor]:
    """Equation: θ − lr·g."""
    return {name: theta - lr * gradients[name] for name, theta in parameters.items()}


def adamw(
    parameters: Tensors, gradients: Tensors, state: AdamState | None, lr: float, settings: OptimizerSettings
) -> tuple[dict[str, Tensor], AdamState]:
    """AdamW on every tensor alike; ``state`` None is the state before the first step.

    Equation: m ← β1·m + (1−β1)g, v ← β2·v + (1−β2)g², θ ← θ − lr·wd·θ − lr·m̂/(√v̂+ε), ^ = /(1−β^t) each.
    Source: arXiv 1711.05101, algorithm 2.
    """
    zeros = {name: torch.zeros_like(theta) for name, theta in parameters.items()}
    before = state or AdamState(step=0, first=zeros, second=zeros)
    (beta1, beta2), t = settings.betas, before.step + 1
    moved, first, second = {}, {}, {}
    for name, theta in parameters.items():
        g = gradients[name]
        m = beta1 * before.first[name] + (1 - beta1) * g
        v = beta2 * before.second[name] + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        update = lr * m_hat / (torch.sqrt(v_hat) + settings.eps)
        moved[name] = theta - lr * settings.weight_decay * theta - update
        first[name], second[name] = m, v
    return moved, AdamState(step=t, first=first, second=second)


def reference_step(
    parameters: Tensors, gradients: Tensors, state: AdamState | None, lr: float, settings: OptimizerSettings
) -> tuple[dict[str, Tensor], AdamState | None, float]:
    """Clip, then update: the new parameters, the new state (None for sgd), and the norm before clipping."""
    clipped, norm = clip_by_global_norm(gradients, settings.max_grad_norm)
    if settings.kind == "sgd":
        return sgd(parameters, clipped, lr), None, norm
    moved, after = adamw(parameters, clipped, state, lr, settings)
    return moved, after, norm


def reference_steps(
    model: nn.Module,
    losses: Sequence[Callable[[nn.Module], Tensor]],
    settings: OptimizerSettings,
    total_steps: int,
) -> list[StepResult]:
    """Consecutive steps 0, 1, … of a stage of ``total_steps``, on a copy of the model: a loss function a step.

    A loss function is called with the copy at that step, e.g. ``lambda m: reference_loss(m, sequences)``.
    """
    model = copy.deepcopy(model)
    state: AdamState | None = None
    results = []
    for step, loss_of in enumerate(losses):
        loss = loss_of(model)
        gradients = gradient(model, loss)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        how = (settings.lr, settings.schedule, settings.warmup_fraction, settings.min_lr_ratio)
        lr = learning_rate(step, total_steps, *how)
        moved, state, norm = reference_step(parameters, gradients, state, lr, settings)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(moved[name])
        results.append(StepResult(loss.item(), norm, lr, gradients, moved))
    return results
