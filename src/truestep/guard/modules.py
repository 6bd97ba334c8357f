"""Chooses the linear modules that the guard watches, and draws the random probes for them.

For the gradient G [out, in] of a linear module's weight, uᵀGv = Σ_t (δ_t·u)(x_t·v), where x_t is the module's
input and δ_t the gradient of its output at position t. The right side needs no gradient of a parameter, so it
is known for every backward pass separately, under every kind of sharding. Shapes: K probes of a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from truestep.guard.flat import Part, parts_of

PROBES = 32  # per module
DEPTHS, NEIGHBORS = (
    3,
    2,
)  # watched modules: neighbors at several depths, because buckets and shards are contiguous
ROWS = 2048  # of a matrix that are copied to float64 at a time


@dataclass(frozen=True)
class Watched:
    """A linear module, and its probes [K, out] and [K, in] in float32 on the CPU."""

    name: str
    module: nn.Module
    is_transposed: bool  # the weight is [in, out], as in GPT-2's Conv1D
    left: Tensor
    right: Tensor
    part: Part | None = None  # under FSDP1
    copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def probes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the probes (left, right) on a device, where they stay."""
        if device not in self.copies:
            self.copies[device] = (self.left.to(device), self.right.to(device))
        return self.copies[device]

    @property
    def weight(self) -> Tensor:
        """What the optimizer has: under FSDP1, this may be the flat parameter of several weights."""
        return self.module.weight if self.part is None else self.part.owner  # type: ignore[return-value]

    def project(self, matrix: Tensor) -> Tensor:
        """Return uᵀ·matrix·v [K] in float64 for a matrix in the weight's own layout."""
        first, second = (p.double() for p in self.probes(matrix.device))
        first, second = (second, first) if self.is_transposed else (first, second)
        total = torch.zeros(len(first), dtype=torch.float64, device=matrix.device)
        for start in range(0, matrix.shape[0], ROWS):
            part = matrix[start : start + ROWS].to(torch.float64)
            total += ((first[:, start : start + ROWS] @ part) * second).sum(1)
        return total.cpu()


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """Return the whole shape of a weight. ZeRO stage 3 leaves an empty tensor in its place."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (name, module, is_transposed) of the trainable linear modules, except the output head and modules
    that share their weight."""
    parts = parts_of(model)
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    head = head_of(model)
    for name, module in model.named_modules():
        is_conv = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        part = parts.get(id(module))
        weight = getattr(module, "weight", None) if part is None else part.owner
        is_plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if module is head or not (is_plain or is_conv) or not isinstance(weight, Tensor):
            continue
        if weight.requires_grad and weight.is_floating_point() and (part or uses[id(weight)] == 1):
            yield name, module, is_conv


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the module that computes the logits: the one that the model names, or the last linear module if
    it is the only one with that many outputs."""
    named = getattr(model, "get_output_embeddings", None)
    if callable(named):
        try:
            if isinstance(found := named(), nn.Module):
                return found
        except (AttributeError, NotImplementedError):
            pass
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return next((m for m in last if m.out_features in tables), None)


def choose(model: nn.Module, random: torch.Generator, probes: int = PROBES) -> list[Watched]:
    """Return the watched modules, from the smaller half of the linear modules, at evenly spaced depths."""
    found, parts = list(linear_modules(model)), parts_of(model)
    sizes = {name: int(torch.Size(_shape(module, parts)).numel()) for name, module, _ in found}
    limit = sorted(sizes.values())[len(sizes) // 2] if sizes else 0
    small = [entry for entry in found if sizes[entry[0]] <= limit]
    return [_with_probes(*small[i], parts, random, probes) for i in _spread(len(small))]


def _spread(count: int) -> Sequence[int]:
    last = max(0, count - NEIGHBORS)
    starts = [round(last * i / max(1, DEPTHS - 1)) for i in range(DEPTHS)]
    return sorted({i for start in starts for i in range(start, min(count, start + NEIGHBORS))})


def _shape(module: nn.Module, parts: dict[int, Part]) -> tuple[int, ...]:
    part = parts.get(id(module))
    return shape_of(module.weight) if part is None else part.shape  # type: ignore[arg-type]


def _with_probes(
    name: str, module: nn.Module, is_transposed: bool, parts: dict[int, Part], random: torch.Generator,
    probes: int,
) -> Watched:  # fmt: skip
    rows, columns = _shape(module, parts)
    num_out, num_in = (columns, rows) if is_transposed else (rows, columns)
    left = torch.randn(probes, num_out, generator=random)
    right = torch.randn(probes, num_in, generator=random)
    return Watched(name, module, is_transposed, left, right, parts.get(id(module)))


def stop_ids_of(model: nn.Module) -> tuple[int, ...]:
    """Return the tokens that end an answer, from the model's own settings."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def rounds_products() -> bool:
    """Return whether float32 products are rounded to a shorter format."""
    return bool(torch.get_float32_matmul_precision() != "highest")
