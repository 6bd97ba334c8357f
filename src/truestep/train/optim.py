"""The optimizer, with float32 masters, gradient sums in at least float32, and clipping by a global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from truestep.model.select import chosen
from truestep.settings import OptimizerSettings
from truestep.train.layout import COMPUTE_DTYPE
from truestep.train.parallel import Ranks, local
from truestep.train.policy import Policy

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class MasterOptimizer:
    """AdamW or SGD on master copies of the parameters.

    A float32 or float64 parameter is its own master and its ``.grad`` accumulates in its own dtype. So do the float32
    shards of a model that computes in bfloat16. Another bfloat16 parameter has a float32 master and a float32 gradient
    that every backward pass is added to, so that neither small updates nor small gradients are lost to rounding. A
    frozen parameter (without ``requires_grad``) has no master, gradient or moments. An optimizer created with ``beside``
    shares the masters and gradient sums of that other optimizer of the same module, but has separate moments.

    With ``offload``, masters and moments are in host memory. Gradients are summed where the parameters are, and their
    sum is copied to the host once per step, so that no micro-batch can be lost on the way.
    Held by: tests/numerics/test_optim.py, tests/numerics/test_offload.py"""

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        *,
        beside: MasterOptimizer | None = None,
        offload: bool = False,
    ) -> None:
        self.settings = settings
        self.compute_dtype: torch.dtype | None = getattr(module, COMPUTE_DTYPE, None)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        self._wide_grads: dict[str, Tensor] = {}
        if beside is not None:
            self.masters, self._wide_grads = beside.masters, beside._wide_grads
        else:
            for name, parameter in self.parameters.items():
                is_low = parameter.dtype in _LOW_PRECISION
                if is_low:
                    parameter.register_post_accumulate_grad_hook(partial(self._accumulate, name))
                if is_low or offload:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    where = "cpu" if offload else None
                    self.masters[name] = parameter.detach().to(where, wide, copy=True)
                else:
                    self.masters[name] = parameter
        s, masters = settings, list(self.masters.values())
        self._inner: torch.optim.Optimizer
        if s.kind == "sgd":
            self._inner = torch.optim.SGD(masters, lr=s.lr)
        else:
            groups = [{"params": part, **decay} for part, decay in self._decay_groups(module) if part]
            self._inner = torch.optim.AdamW(groups, s.lr, s.betas, s.eps, s.weight_decay, fused=True)

    def _decay_groups(self, module: nn.Module) -> list[tuple[list[Tensor], dict[str, float]]]:
        """Return the masters with weight decay, then those without."""
        model = (
            module.model if isinstance(module, Policy) else module
        )  # patterns are of the model's own names
        free = {id(p) for p in chosen(model, self.settings.no_decay, "optimizer.no_decay").values()}
        is_free = {name: id(p) in free for name, p in self.parameters.items()}
        decayed = [master for name, master in self.masters.items() if not is_free[name]]
        return [(decayed, {}), ([m for n, m in self.masters.items() if is_free[n]], {"weight_decay": 0.0})]

    def _accumulate(self, name: str, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        if grad is not None and name in self._wide_grads:
            self._wide_grads[name] += grad
        elif grad is not None:
            self._wide_grads[name] = grad.to(torch.float32)

    def zero_grad(self) -> None:
        self._wide_grads.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Return the accumulated gradient of every parameter, or zeros if it received none on this rank."""
        found = {}
        for name, parameter in self.parameters.items():
            grad = self._wide_grads.get(name) if parameter.dtype in _LOW_PRECISION else parameter.grad
            wide = torch.promote_types(parameter.dtype, torch.float32)
            found[name] = torch.zeros_like(parameter, dtype=wide) if grad is None else grad
        return found

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Update the masters with these gradients, then copy them to the parameters."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        for name, master in self.masters.items():
            master.grad = gradients[name].to(master.device)
        self._inner.step()
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            master.grad = None
            if master is not parameter:
                parameter.copy_(master)
        self.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return masters and moments by parameter ("master/…", "exp_avg/…", "exp_avg_sq/…", "step/…"), sharded
        like the parameters."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            if master.dtype != (
                self.compute_dtype or self.parameters[name].dtype
            ):  # otherwise they are equal
                tensors[f"master/{name}"] = master
            for key, value in self._inner.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    def num_bytes(self) -> int:
        """Return the size of this rank's masters and moments."""
        held = [
            *self.masters.values(),
            *[v for moments in self._moments().values() for v in moments.values()],
        ]
        return sum(local(tensor).nbytes for tensor in held)

    @torch.no_grad()
    def copy_state(self) -> Callable[[], None]:
        """Copy masters and moments to the CPU's memory. Return a function that puts them back."""
        masters = {name: _copied(master) for name, master in self.masters.items()}
        moments = {name: {k: _copied(v) for k, v in m.items()} for name, m in self._moments().items()}

        @torch.no_grad()
        def put_back() -> None:
            for name, master in self.masters.items():
                local(master).copy_(masters[name])
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)
            for name, now in self._moments().items():
                if name not in moments:  # the first update was undone
                    del self._inner.state[self.masters[name]]
                for key, value in moments.get(name, {}).items():
                    local(now[key]).copy_(value)
            self.zero_grad()

        return put_back

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments by parameter and key, of the parameters that have some."""
        held = {name: self._inner.state.get(master, {}) for name, master in self.masters.items()}
        tensors = {n: {k: v for k, v in m.items() if isinstance(v, Tensor)} for n, m in held.items()}
        return {name: moments for name, moments in tensors.items() if moments}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load masters and moments. ``tensors`` has this rank's rows of each of them."""
        for name, master in self.masters.items():
            if f"master/{name}" in tensors:
                local(master).copy_(tensors[f"master/{name}"])
            elif master is not self.parameters[name]:
                master.copy_(self.parameters[name])
            moments: dict[str, Tensor] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := tensors.get(f"{key}/{name}")) is None:
                    continue
                like = torch.zeros_like(saved, device=local(master).device) if key == "step" else master
                moments[key] = torch.zeros_like(like, dtype=saved.dtype)
                local(moments[key]).copy_(saved)
            self._inner.state[master] = moments


def _copied(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).to("cpu", copy=True)


def global_norm(gradients: Iterable[Tensor], ranks: Ranks, *, sharded: bool) -> float:
    """Return √Σ‖g‖² over all parameters (and all ranks, if they are sharded), accumulated in float64. The
    result is NaN or infinite if any entry is. Units: those of the gradient."""
    squares = 0.0
    for grad in gradients:
        wide = torch.promote_types(grad.dtype, torch.float32)
        squares += float(torch.linalg.vector_norm(local(grad), dtype=wide).double()) ** 2
    if sharded:
        squares = ranks.sum([squares])[0]
    return float(squares**0.5)


@torch.no_grad()
def clip_(gradients: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_ does, or not at all if
    ``max_norm`` is 0."""
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0 and factor < 1:
        for grad in gradients:
            grad.mul_(factor)
