"""Reads the gradient that the optimizer used, as projections on the probes of the watched modules.

Where no gradient can be read (flat partitions, an offloaded optimizer), it is solved from what the optimizer
keeps: g = (m′ − β₁m) / (1 − β₁) from Adam's first moment, g = (b′ − μb) / (1 − damping) from SGD's buffer, or
g = (θ − θ′) / lr from plain SGD's update. A projection is linear, so it is enough to project before and after.
Shapes: K probes of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from truestep.guard.modules import Watched
from truestep.guard.ranks import on_all_ranks

ROUNDING = 2.0**-24  # relative, of a float32
Targets = dict[int, Tensor]  # module → uᵀGv [K] in float64 of the gradient that was used


class Reader(Protocol):
    source: str  # where the gradient was read, for the log
    noise: float  # relative error of the targets that rounding has made

    def before(self) -> None: ...  # called before the optimizer's step, while gradients exist
    def after(self) -> Targets: ...  # called after it


def has_gradient(parameter: Tensor) -> bool:
    """Return whether this rank has a gradient of the parameter that is not zero."""
    gradient = parameter.grad
    return gradient is not None and bool((getattr(gradient, "to_local", lambda: gradient)() != 0).any())


def whole(value: Tensor) -> Tensor:
    """Return the whole tensor, gathered over ranks if it is sharded."""
    gather = getattr(value.detach(), "full_tensor", None)
    return value.detach() if gather is None else gather()


def unwrapped(optimizer: Any) -> list[Any]:
    """Return the optimizer and what it wraps, the outermost first."""
    chain = [optimizer]
    while not isinstance(chain[-1], torch.optim.Optimizer) or _is_wrapper(chain[-1]):
        inner = getattr(chain[-1], "optimizer", None)
        if inner is None or inner in chain:
            break
        chain.append(inner)
    return chain


def _is_wrapper(optimizer: Any) -> bool:
    """Accelerate's and DeepSpeed's wrappers are torch optimizers whose step hooks are never called."""
    return getattr(optimizer, "optimizer", None) is not None


def is_deepspeed(one: Any) -> bool:
    return any(c.__module__.split(".")[0] == "deepspeed" for c in type(one).__mro__)


def unwrapped_models(model: Any) -> list[nn.Module]:
    """Return the model's wrappers, the outermost first, and then the model."""
    chain = [model]
    while True:
        last = chain[-1]
        is_wrapper = is_deepspeed(last) or isinstance(last, torch.nn.parallel.DistributedDataParallel)
        inner = last.module if is_wrapper else last._modules.get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return chain
        chain.append(inner)


class States:
    """The states of several optimizers as one mapping."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.optimizers = optimizers

    def get(self, parameter: Any, default: Any = None) -> Any:
        return next((o.state[parameter] for o in self.optimizers if parameter in o.state), default)


class FromGradients:
    """Reads ``.grad`` before the step of torch optimizers, or else solves it from their state."""

    source, noise = "gradients", 0.0

    def __init__(
        self, watched: Sequence[Watched], groups: Iterable[dict[str, Any]], state: Any, reads_all: bool = True
    ) -> None:
        """Without ``reads_all``, only the weights that the optimizer has are read."""
        self.watched, self.reads_all = list(watched), reads_all
        self.group_of = {id(p): group for group in groups for p in group["params"]}
        self.state = state
        self.targets: Targets = {}
        self.moments: Targets = {}

    def before(self) -> None:
        self.targets, self.moments = {}, {}
        for index, one in enumerate(self.watched):
            if not self.reads_all and id(one.weight) not in self.group_of:
                continue
            grad = one.weight.grad
            if one.part is not None:  # a rank without a part of this weight takes part in the sum
                self.targets[index] = one.part.sum(one.project(one.part.spread(grad)))
            elif grad is not None:
                self.targets[index] = one.project(whole(grad))
            else:
                self.moments[index] = self._moment(one)

    def _moment(self, one: Watched) -> Tensor:
        kept = self.state.get(one.weight, {})
        found = kept.get("exp_avg")
        return torch.zeros(len(one.left), dtype=torch.float64) if found is None else one.project(whole(found))

    def after(self) -> Targets:
        for index, was in self.moments.items():
            one = self.watched[index]
            betas = self.group_of.get(id(one.weight), {}).get("betas")
            if betas is not None and "exp_avg" in self.state.get(one.weight, {}):
                now = self._moment(one)
                if torch.equal(now, was):
                    continue  # the optimizer left it out, as it does without a gradient
                self.source = "the first moment"
                self.targets[index] = (now - betas[0] * was) / (1 - betas[0])
        return self.targets


class FromDeepSpeed:
    """Solves the gradient from the state, or from the update, of a DeepSpeed ZeRO optimizer.

    All of it is read by DeepSpeed's own functions, which take part in collectives on every rank."""

    def __init__(self, watched: Sequence[Watched], optimizer: Any, group: Any) -> None:
        """``optimizer`` is the torch optimizer within; ``group`` has all ranks, or is None."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self.watched, self.groups = list(watched), optimizer.param_groups
        self.state, self.ranks = optimizer.state, group
        self.read_state, self.read_value = safe_get_full_optimizer_state, safe_get_full_fp32_param
        group = self.groups[0]
        self.key = "exp_avg" if "betas" in group else "momentum_buffer" if group.get("momentum") else ""
        self.source = {"exp_avg": "the first moment", "momentum_buffer": "the momentum", "": "the update"}[
            self.key
        ]
        self.was: Targets = {}
        self.noise = 0.0

    def before(self) -> None:
        nothing = {i: torch.zeros(len(one.left), dtype=torch.float64) for i, one in enumerate(self.watched)}
        self.was = self._read() or (nothing if self.key else {})
        group = self.groups[0]
        self.rate = float(group["lr"])
        if self.key == "exp_avg":
            self.kept, self.new = float(group["betas"][0]), 1 - float(group["betas"][0])
        elif self.key:
            self.kept, self.new = float(group["momentum"]), 1 - float(group.get("dampening", 0.0))
            if not any(bool(v.any()) for v in self.was.values()):
                self.new = 1.0  # the first gradient enters the buffer whole
        else:
            # The update of plain SGD is −lr·g.
            self.kept, self.new = 1.0, -self.rate

    def after(self) -> Targets:
        if self.new == 0:
            return {}
        now = self._read()
        found = {i: (v - self.kept * self.was[i]) / self.new for i, v in now.items() if i in self.was}
        if not self.key and found:
            # Each parameter is rounded to half a unit in the last place.
            step = abs(self.new) * torch.stack([v.norm() for v in found.values()]).clamp(min=1e-300)
            self.noise = float((ROUNDING * torch.stack([now[i].norm() for i in found]) / step).max())
        return found

    def _read(self) -> Targets:
        if not self._can_read():
            return {}
        values = [self._value(one.weight) for one in self.watched]
        return {i: self.watched[i].project(v) for i, v in enumerate(values) if v is not None}

    def _can_read(self) -> bool:
        """Return whether all ranks have what is read. Before the first step they do not, and a rank that found
        nothing of its own would leave the others waiting."""
        own = not self.key or any(self.key in kept for kept in self.state.values())
        return on_all_ranks(own, self.ranks)

    def _value(self, weight: Tensor) -> Tensor | None:
        return self.read_state(weight, self.key) if self.key else self.read_value(weight)
