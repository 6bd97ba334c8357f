"""Tiny models with PEFT's adapters, and the same models written separately, as the reference.

Options: arch; ``adapter`` is lora, rslora or dora. PEFT's adapters start at random values, so that the gradients of
A and B are not zero. Shapes: O outputs, I inputs, r rank.
"""

from __future__ import annotations

import math

import harness
import torch
from torch import Tensor, nn

RANK, ALPHA = 3, 7
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def targets(spec: harness.Spec) -> list[str]:
    return TARGETS.get(spec.options["arch"], ["inner", "head"])


def with_peft(spec: harness.Spec, model: nn.Module | None = None) -> nn.Module:
    """Return the model (by default a tiny one) with PEFT's adapters, which are the only parameters that are trained."""
    import peft

    model, kind = model or harness.tiny_model(spec), spec.options["adapter"]
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets(spec), init_lora_weights=False,
        use_rslora=kind == "rslora", use_dora=kind == "dora",
    )  # fmt: skip
    return peft.get_peft_model(model, config)


class Adapted(nn.Module):
    """x ↦ W'x + b. For LoRA and rsLoRA, W' = W + s·BA. DoRA gives the rows of this sum the lengths m; as in its
    paper, the gradient does not pass through the division by their own lengths."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.layer, self.scale = layer, ALPHA / (math.sqrt(RANK) if kind == "rslora" else RANK)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, outputs, bias=False)})
        if kind == "dora":
            length = nn.Module()
            length.weight = nn.Parameter(torch.ones(outputs))
            self.lora_magnitude_vector = nn.ModuleDict({"default": length})

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.get_parameter("lora_A.default.weight"), self.get_parameter("lora_B.default.weight")
        weight = self.layer.weight + self.scale * high @ low  # O I
        if hasattr(self, "lora_magnitude_vector"):
            lengths = self.get_parameter("lora_magnitude_vector.default.weight")
            weight = (lengths / weight.norm(dim=1).detach())[:, None] * weight
        return nn.functional.linear(x, weight, self.layer.bias)


def reference(spec: harness.Spec) -> nn.Module:
    """Return the same model without PEFT. Its trained parameters have PEFT's names, without their prefix."""
    model = harness.tiny_model(spec).requires_grad_(False)
    for name, layer in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in targets(spec):
            setattr(model.get_submodule(parent), own, Adapted(layer, spec.options["adapter"]))
    return model
