"""Checks what the optimizer did: every trainable tensor moved, and sampled entries followed its formula.

Shapes: S sampled entries of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truestep.audit.measure.findings import Cause, cause
from truestep.guard.flat import is_flat

TENSORS, ENTRIES = 12, 64  # that are sampled
OFF = 0.1  # share of the sampled entries that may differ from the formula
RELATIVE = 2e-3  # of the largest update of the tensor
ROUNDINGS = 8  # of the optimizer's own steps in the parameter's dtype
RATE = 1e-4  # relative
LOST = 0.5  # share of the sampled updates that rounding may lose
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def local(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    part = getattr(value, "to_local", None)
    return value.detach() if part is None else part().detach()


def is_split(parameter: Tensor) -> bool:
    """Return whether every rank has only its own part of this parameter."""
    if hasattr(parameter, "ds_id") or is_flat(parameter):
        return True
    placements = getattr(parameter, "placements", ())
    return any(not p.is_replicate() for p in placements)


@torch.no_grad()
def fingerprint(parameter: Tensor) -> int:
    """Return a sum of the tensor's bits, which is the same for the same bits."""
    value = local(getattr(parameter, "ds_tensor", parameter)).contiguous().flatten()
    if value.numel() == 0:
        return 0
    data = value.view(torch.uint8)
    whole = len(data) // 8 * 8
    if data.data_ptr() % 8 or not whole:
        return int(data.sum(dtype=torch.int64))
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum(dtype=torch.int64))


class Moved:
    """Watches the trainable tensors by their fingerprints."""

    def __init__(self, model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
        self.named = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()
        ]
        self.groups = list(groups)
        self.group_of = {id(p): group for group in self.groups for p in group["params"]}
        self.first = [fingerprint(p) for _, p in self.named]
        self.has_moved = [False] * len(self.named)
        self.has_copies = False  # the optimizer updates copies, which come back to the model after its step
        self.is_first = True
        self.replicated = 0  # a sum over the tensors that every rank has whole

    def after(self) -> list[bool]:
        """Return which tensors are still and should have moved in this step."""
        now = [fingerprint(p) for _, p in self.named]
        self.has_moved = [m or a != b for m, a, b in zip(self.has_moved, self.first, now, strict=True)]
        whole = [value for value, (_, p) in zip(now, self.named, strict=True) if not is_split(p)]
        self.replicated = sum(value * (2 * i + 1) for i, value in enumerate(whole)) % 2**48
        is_early, self.is_first = self.has_copies and self.is_first, False
        if is_early:
            return [False] * len(self.named)
        return [not m and self._should(p) for m, (_, p) in zip(self.has_moved, self.named, strict=True)]

    def _should(self, parameter: Tensor) -> bool:
        if (gradient := parameter.grad) is None:
            return False
        gradient = local(gradient.to_dense() if gradient.is_sparse else gradient)
        slope, value = gradient.float().abs(), local(parameter).float().abs()
        group = self.group_of.get(id(parameter))
        rates = [float(g["lr"]) for g in self.groups] if group is None else [float(group["lr"])]
        rate = max(rates, default=0.0)
        # Below one unit in the last place, nothing moves; update.lost is about those.
        is_adam = group is not None and "betas" in group
        step = rate * slope / (slope + float(group.get("eps") or 1e-8)) if group and is_adam else rate * slope
        return bool((step > EPS[parameter.dtype] * value).any())

    def causes(self, still: Sequence[bool]) -> list[Cause]:
        names = [name for flag, (name, _) in zip(still, self.named, strict=True) if flag]
        if not names:
            return []
        if len(names) == len(self.named):
            return [cause("stale_parameters", "nothing_moved")]
        if len(names) == 1:
            return [cause("stale_parameters", "tensor_does_not_move", name=names[0])]
        return [
            cause(
                "stale_parameters",
                "tensors_do_not_move",
                names=names[:3],
                count=len(names),
                of=len(self.named),
            )
        ]


def rate_causes(declared: Any, groups: Sequence[dict[str, Any]], step: int) -> list[Cause]:
    """Return how the learning rate differs from what was declared, before the step is taken."""
    if declared.rate is None or not groups:
        return []
    rate, asked = float(groups[0]["lr"]), float(declared.rate(step))
    if abs(rate - asked) <= RATE * abs(asked):
        return []
    return [cause("schedule", "rate_not_declared", rate=rate, asked=asked)]


def gradient_norm(moved: Moved) -> float:
    """Return the norm of all gradients, or 0.0 if this rank has only a part of them."""
    gradients = [p.grad for _, p in moved.named if p.grad is not None]
    if not gradients or any(is_split(p) for _, p in moved.named):
        return 0.0
    return float(torch.stack([g.float().norm() for g in gradients]).norm())


@dataclass
class _Sample:
    name: str
    parameter: Tensor
    group: dict[str, Any]
    places: Tensor  # S
    value: Tensor  # S, float64, as all others
    gradient: Tensor
    state: dict[str, Tensor | float]


class Formula:
    """Compares sampled entries with the formula of torch's SGD, Adam and AdamW."""

    def __init__(self, model: nn.Module, optimizer: Any, random: torch.Generator) -> None:
        self.optimizer, self.kind = optimizer, _kind(optimizer)
        names = {id(p): name for name, p in model.named_parameters()}
        mine = [(names[id(p)], p, g) for g in optimizer.param_groups for p in g["params"] if id(p) in names]
        stride = max(1, len(mine) // TENSORS)
        self.chosen = [
            (name, p, group, torch.randint(local(p).numel(), (ENTRIES,), generator=random))
            for name, p, group in mine[::stride][:TENSORS]
            if local(p).numel()
        ]
        self.samples: list[_Sample] = []
        self.left: list[tuple[Tensor, Tensor]] = []  # the chosen entries before and after the step before

    @torch.no_grad()
    def before(self) -> list[Cause]:
        """Sample the entries before a step. Return how they differ from those after the step before."""
        now = [_entries(p, places) for _, p, _, places in self.chosen]
        found = _between(now, self.left)
        self.left = [(value, value) for value in now]
        self.samples = []
        self._sample()
        return found

    def forget(self) -> None:
        """Do not compare with the step before: it was not watched."""
        self.left = []

    def _sample(self) -> None:
        # A fused optimizer unscales the gradients itself.
        if not self.kind or getattr(self.optimizer, "grad_scale", None) is not None:
            return
        for name, parameter, group, places in self.chosen:
            if parameter.grad is None or parameter.grad.is_sparse:
                continue
            kept = {key: _entries(v, places) for key, v in self.optimizer.state.get(parameter, {}).items()}
            value, gradient = _entries(parameter, places), _entries(parameter.grad, places)
            self.samples.append(_Sample(name, parameter, dict(group), places, value, gradient, kept))

    @torch.no_grad()
    def causes(self) -> list[Cause]:
        """Return what is wrong with the step since ``before``."""
        now = [_entries(p, places) for _, p, _, places in self.chosen]
        self.left = [(was, after) for (was, _), after in zip(self.left, now, strict=False)]
        off = lost = seen = visible = 0
        ratio, name = 1.0, ""
        for one in self.samples:
            asked = predicted(self.kind, one) - one.value
            done = _entries(one.parameter, one.places) - one.value
            if not bool(asked.abs().max() > 0):
                continue
            eps = EPS[one.parameter.dtype]
            unit = eps * torch.maximum(one.value.abs(), (one.value + done).abs())
            wrong = (done - asked).abs() > max(RELATIVE, ROUNDINGS * eps) * asked.abs().max() + unit
            # A weight decay alone is smaller than rounding in most 16-bit runs.
            seen_update = (asked != 0) & (one.gradient != 0)
            gone = (done == 0) & seen_update
            seen, off = seen + len(asked), off + int(wrong.sum())
            lost, visible = lost + int(gone.sum()), visible + int(seen_update.sum())
            if int(wrong.sum()) > OFF * len(asked) and not name:
                name, ratio = one.name, float(done @ asked / (asked @ asked))
        if seen and off > OFF * seen:
            return [cause("update", "update_formula", optimizer=self.kind, name=name, ratio=ratio)]
        if visible and lost > LOST * visible:
            return [cause("rounding", "small_updates_lost", share=lost / visible)]
        return []


def _between(now: list[Tensor], left: list[tuple[Tensor, Tensor]]) -> list[Cause]:
    """Name a change of the parameters between two steps."""
    if not left or all(torch.equal(value, after) for value, (_, after) in zip(now, left, strict=True)):
        return []
    pairs = list(zip(now, left, strict=True))
    if all(torch.equal(value, before) for value, (before, _) in pairs):
        return [cause("stale_parameters", "back_to_before")]
    if all(torch.equal(value, after.bfloat16().double()) for value, (_, after) in pairs):
        return [cause("rounding", "rounded_parameters")]
    return [cause("stale_parameters", "changed_between_steps")]


def _kind(optimizer: Any) -> str:
    names = {torch.optim.SGD: "SGD", torch.optim.Adam: "Adam", torch.optim.AdamW: "AdamW"}
    return names.get(type(optimizer), "")


def _entries(value: Any, places: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    own = local(value)
    if own.numel() <= 1 and own.dim() == 0:
        return float(own)
    return own.flatten()[places.to(own.device)].double().cpu()


def predicted(kind: str, one: _Sample) -> Tensor:
    """Return the entries [S] after a step of torch's SGD, Adam or AdamW, in float64."""
    group, value, kept = one.group, one.value, one.state
    gradient = -one.gradient if group.get("maximize") else one.gradient
    rate, decay = float(group["lr"]), float(group.get("weight_decay") or 0.0)
    if kind == "SGD":
        gradient = gradient + decay * value
        if momentum := float(group["momentum"]):
            buffer = kept.get("momentum_buffer")
            moved = (
                gradient if buffer is None else momentum * buffer + (1 - float(group["dampening"])) * gradient
            )
            gradient = gradient + momentum * moved if group["nesterov"] else moved
        return value - rate * gradient
    if kind == "AdamW" or group.get("decoupled_weight_decay"):
        value = value * (1 - rate * decay)
    else:
        gradient = gradient + decay * value
    first, second = (float(b) for b in group["betas"])
    step = float(kept.get("step", 0.0)) + 1
    mean = first * kept.get("exp_avg", 0.0) + (1 - first) * gradient
    square = second * kept.get("exp_avg_sq", 0.0) + (1 - second) * gradient**2
    if group.get("amsgrad") and "max_exp_avg_sq" in kept:
        square = square.maximum(torch.as_tensor(kept["max_exp_avg_sq"]))
    size = (square / (1 - second**step)).sqrt() + float(group["eps"])
    return value - rate * (mean / (1 - first**step)) / size


def has_copies(moved: Moved) -> bool:
    """Return whether the optimizer has copies in float32 in place of parameters in 16 bits."""
    mine, given = {id(p) for _, p in moved.named}, [p for group in moved.groups for p in group["params"]]
    lacks = {id(p) for _, p in moved.named if p.element_size() == 2} - {id(p) for p in given}
    return bool(lacks) and any(id(p) not in mine and p.element_size() > 2 for p in given)
