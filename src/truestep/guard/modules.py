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

from truestep.guard.flat import Part, is_flat, parts_of

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
    parameter: str = "weight"  # the watched one of the module's parameters
    is_called: bool = True  # the module computes x·Wᵀ, so its calls are enough
    copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def probes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the probes (left, right) on a device, where they stay."""
        if device not in self.copies:
            self.copies[device] = (self.left.to(device), self.right.to(device))
        return self.copies[device]

    @property
    def weight(self) -> Tensor:
        """What the optimizer has: under FSDP1, this may be the flat parameter of several weights."""
        return self.module._parameters[self.parameter] if self.part is None else self.part.owner  # type: ignore[return-value]

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
        # An attribute may be computed, as by a parametrization, which can change the training (spectral norm).
        weight = module._parameters.get("weight") if part is None else part.owner
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
    """Return the watched modules, from the smaller half of the linear modules, at evenly spaced depths. Without
    such a module, other matrices are watched by their gradients alone."""
    parts = parts_of(model)
    found = [Place(n, m, is_transposed=t, part=parts.get(id(m))) for n, m, t in linear_modules(model)]
    found = found or list(matrices(model))
    sizes = [place.shape[0] * place.shape[1] for place in found]
    limit = sorted(sizes)[len(sizes) // 2] if sizes else 0
    small = [place for place, size in zip(found, sizes, strict=True) if size <= limit]
    return [_with_probes(small[i], random, probes) for i in _spread(len(small))]


@dataclass(frozen=True)
class Place:
    """A matrix that can be watched."""

    name: str
    module: nn.Module
    parameter: str = "weight"
    is_transposed: bool = False
    is_called: bool = True
    part: Part | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.part is not None:
            return self.part.shape
        return shape_of(self.module._parameters[self.parameter])  # type: ignore[arg-type]


def matrices(model: nn.Module) -> Iterator[Place]:
    """Yield the trainable matrices, each once, whose gradients appear as a whole in the backward pass."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen or p.dim() != 2 or not p.requires_grad or not p.is_floating_point():
                continue
            is_whole = not hasattr(p, "placements") and not hasattr(p, "ds_id") and not is_flat(p)
            if is_whole and not getattr(module, "sparse", False):
                seen.add(id(p))
                yield Place(f"{module_name}.{name}".strip("."), module, name, is_called=False)


def _spread(count: int) -> Sequence[int]:
    last = max(0, count - NEIGHBORS)
    starts = [round(last * i / max(1, DEPTHS - 1)) for i in range(DEPTHS)]
    return sorted({i for start in starts for i in range(start, min(count, start + NEIGHBORS))})


def _with_probes(place: Place, random: torch.Generator, probes: int) -> Watched:
    rows, columns = place.shape
    num_out, num_in = (columns, rows) if place.is_transposed else (rows, columns)
    left = torch.randn(probes, num_out, generator=random)
    right = torch.randn(probes, num_in, generator=random)
    return Watched(
        place.name,
        place.module,
        place.is_transposed,
        left,
        right,
        place.part,
        place.parameter,
        place.is_called,
    )


def table_of(model: nn.Module, head: nn.Module | None) -> nn.Module | None:
    """Return the embedding of the tokens: the first with as many rows as the head has outputs."""
    size = getattr(head, "out_features", None)
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return next((m for m in tables if m.num_embeddings == size), None)


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
