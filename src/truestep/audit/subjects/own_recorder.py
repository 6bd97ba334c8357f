"""Watches a user's own function. Here, other than with a framework, the optimizer is known: the gradient that it
uses is read when it steps, and is taken if the parameters moved by it. So any rate and any schedule will do.

A row may go through the model several times in a step (checkpointing, a second pass for a term of the loss): it
counts once, since its gradient tells how often it was used. Shapes: P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

OTHER_LAYOUTS = (
    "unsplit",
    "reordered",
    "padded",
    "repeated",
    "masked_unsplit",
)  # of rows in another case too
NARROW = (torch.bfloat16, torch.float16)
OTHER_OPTIMIZER = "the step does not use the optimizer that it is given"
OTHER_MOMENTUM = "the step uses an optimizer with another momentum than the one that it is given"


@dataclass
class Call:
    """What an optimizer used in one call: name of a parameter → its gradient (None if it has none), the settings
    of its group, and its momentum."""

    gradients: dict[str, Tensor | None]
    groups: dict[str, dict[str, Any]]
    buffers: dict[str, Tensor]  # momentum, after the call


class Casts(TorchFunctionMode):
    """Notes whether a function casts anything to a narrow dtype, which sets its noise."""

    def __init__(self, recorder: OwnRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype in NARROW and self.recorder.narrow is not torch.bfloat16:
            self.recorder.narrow = made.dtype
        return made


class OwnRecorder(harness.Recorder):
    """Use it as a context around the calls of the function, and call ``end_call`` after each."""

    before: Tensor | None
    needles: list[bytes]
    microbatches: list[list[list[int]]]
    autocast: torch.dtype | None

    def __init__(self, spec: harness.Spec, model: nn.Module) -> None:
        super().__init__(spec, model)
        # A row's last token predicts nothing, so a loop may leave it out.
        self.needles = [ids[:-1] for ids in self.needles]
        self.named = dict(sorted(model.named_parameters()))
        self.calls: list[Call] = []
        self.num_calls = 0
        self.gradients: list[tuple[Tensor, bool]] = []  # of each step
        self.frozen: list[set[str]] = []  # in each step
        self.why_not = ""
        self.narrow: torch.dtype | None = None

    def resume(self, model: nn.Module, snapshot: Any = None) -> None:
        super().resume(model, snapshot)
        self.named = dict(sorted(model.named_parameters()))

    def __enter__(self) -> OwnRecorder:
        self._handle = register_optimizer_step_post_hook(self._stepped)
        self._casts = Casts(self)
        self._casts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._casts.__exit__(*error)
        self._handle.remove()
        self._hook.remove()

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        names = {id(p): name for name, p in self.named.items()}
        call = Call({}, {}, {})
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (name := names.get(id(parameter))) is not None:
                    gradient = parameter.grad
                    call.gradients[name] = None if gradient is None else gradient.detach().double().clone()
                    held = optimizer.state.get(parameter, {}).get("momentum_buffer")
                    if held is not None:
                        call.buffers[name] = held.detach().double().clone()
                    call.groups[name] = {k: v for k, v in group.items() if k != "params"}
        if not call.gradients:
            return
        if type(optimizer) is not torch.optim.SGD:
            self.why_not = OTHER_OPTIMIZER + f", but {type(optimizer).__name__}"
        elif self._is_resumed() and any(
            g["momentum"] != self.spec.case["momentum"] for g in call.groups.values()
        ):
            self.why_not = OTHER_MOMENTUM
        self.calls.append(call)
        self.num_calls += 1

    def end_call(self) -> None:
        """Close the step at the end of the function. Forward passes after the optimizer's step that repeat
        its rows belong to nothing."""
        self._close_step()
        if self.steps and self.num_calls:
            last = {row for batch in self.steps[-1][2] for line in batch for row in line}
            self.microbatches = [b for b in self.microbatches if not {r for line in b for r in line} <= last]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look below torch.func's transforms, such as vmap, in which a tensor has no values."""
        ids, wrapped = kwargs.get("input_ids", args[0] if args else None), torch._C._functorch
        while ids is not None and wrapped.is_functorch_wrapped_tensor(ids):
            ids = wrapped.get_unwrapped(ids)
        super()._before(module, (), {"input_ids": ids})

    def _close_step(self) -> None:
        now = self.snapshot()
        moved = self.before is not None and not torch.equal(now, self.before)
        if moved and not self.calls:
            self.why_not = self.why_not or OTHER_OPTIMIZER
        if self.before is not None and self.microbatches and (moved or self.calls):
            self.gradients.append(self._used(self.before, now))
            self.frozen.append({n for n, p in self.named.items() if not p.requires_grad} | self._left_out())
            self.steps.append((self.before, now, self._once(self.microbatches)))
            self.microbatches = []
        self.before, self.calls = now, []

    def _left_out(self) -> set[str]:
        """Return the parameters that no optimizer has. The given one has all of them, so this is a choice."""
        seen = {name for call in self.calls for name in call.gradients}
        return set(self.named) - seen if self.calls else set()

    @staticmethod
    def _once(batches: list[list[list[int]]]) -> list[list[list[int]]]:
        """Return the rows of a step's forward passes, each in the first pass that has it."""
        seen: set[int] = set()
        kept = []
        for batch in batches:
            fresh = [[row for row in line if row not in seen] for line in batch]
            seen |= {row for line in batch for row in line}
            if any(fresh) or not any(batch):
                kept.append([line for line in fresh if line] or fresh)
        return kept

    def _used(self, before: Tensor, after: Tensor) -> tuple[Tensor, bool]:
        """Return the gradient that the step used, and whether it is the optimizer's own: it is if replaying
        the calls moves the parameters from ``before`` to ``after`` [P]. Otherwise, it is the change of the
        parameters divided by the rate."""
        if self.why_not:
            return before - after, False
        sizes = [p.numel() for p in self.named.values()]
        found, exact = [], True
        for name, start, end in zip(self.named, before.split(sizes), after.split(sizes), strict=True):
            calls = [c for c in self.calls if name in c.gradients]
            place, total = start.clone(), torch.zeros_like(start)
            for call in calls:
                place, gradient = self._replay(name, place, call)
                total += gradient
            eps = torch.finfo(self.named[name].dtype).eps
            if float((place - end).norm()) <= 2 * eps * float(start.norm() + (end - start).norm()):
                found.append(total)
                continue
            exact = False
            rates = [call.groups[name]["lr"] for call in calls] or [self.spec.lr]
            found.append((start - end) / (float(rates[-1]) or self.spec.lr))
        return torch.cat(found), exact

    def _replay(self, name: str, place: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Return where torch's SGD moves a parameter, and its gradient."""
        gradient, group = call.gradients[name], call.groups[name]
        if gradient is None:
            return place, torch.zeros_like(place)
        flat = gradient.flatten()
        used = (-flat if group.get("maximize") else flat) + group["weight_decay"] * place
        if momentum := group["momentum"]:
            held = call.buffers[name].flatten()
            used = used + momentum * held if group["nesterov"] else held
        return place - float(group["lr"]) * used, used if self._is_resumed() else flat

    def _is_resumed(self) -> bool:
        """Return whether what the optimizer carries over a checkpoint is judged, too."""
        return bool(self.spec.case["resume_after"])

    def used(self, index: int) -> tuple[Tensor, bool]:
        return self.gradients[index]

    def wants_parts(self, index: int) -> bool:
        return index == 0 and not self._is_compared()

    def _is_compared(self) -> bool:
        """Return whether the rows are in another case too, which tells what is wrong with them."""
        return self.spec.case["name"] in OTHER_LAYOUTS

    def _extras(self, micro: Any) -> dict[str, Tensor]:
        return {} if self._is_compared() else super()._extras(micro)

    def _write_step(self, index: int, *step: Any) -> dict[str, Any]:
        for name, parameter in self.copy.named_parameters():
            parameter.requires_grad_(name not in self.frozen[index])
        return super()._write_step(index, *step)

    def finish(self, **versions: str) -> None:
        self._close_step()
        self.spec.dtype = next(iter(self.named.values())).dtype
        self.autocast = self.autocast or self.narrow
        seen = self._whole()
        if seen and all(row in seen for row, r in enumerate(self.spec.rows) if any(r["trained"][1:])):
            self.unmatched = 0  # other inputs are extra passes of the function
        self.about |= {"calls": self.num_calls}
        super().finish(**versions)
