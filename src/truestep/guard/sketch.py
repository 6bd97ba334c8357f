"""Hooks on the watched modules: what each forward and backward pass gives their weights, as a few numbers.

A hook reads and never returns a tensor, and uses no random state. It keeps projections of [T, K] numbers; of the
activations, it only keeps a last hidden state, which a fused loss needs as well. The hooks of modules vanish where
torch.compile traces them, so that its graph stays as it is; there, and where a function uses a weight without its
module, the gradient of the weight itself is projected. Shapes: T positions of a micro-batch, K probes of a module,
V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from truestep.guard.flat import parts_of
from truestep.guard.hidden import last_hidden, watch_hidden
from truestep.guard.modules import Watched, head_of, table_of
from truestep.guard.survive import Survive
from truestep.guard.tokens import Batch, TokenHooks, Tokens
from truestep.guard.update import local

CHUNK = 4096  # positions that are copied to float32 at a time


@dataclass
class MicroBatch:
    """One run of the model with gradients, up to the next one; in a compiled model, one backward pass."""

    batch: Batch
    is_called: bool = True  # the call of the model was seen
    reached: dict[int, set[int]] = field(default_factory=dict)  # of all of a step: module → backward passes
    ran: set[int] = field(default_factory=set)  # modules whose call was seen
    parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # module, backward pass → K in float64
    dtypes: set[torch.dtype] = field(default_factory=set)  # of the watched modules' outputs
    told: dict[int, Tokens] = field(default_factory=dict)  # backward pass → tokens
    has_logits: bool = False
    is_split: bool = False  # its logits come in several parts
    is_second: bool = False  # a gradient of its gradient may follow

    def add(self, index: int, given: Tensor) -> None:
        key = index, torch._C._current_graph_task_id()
        self.parts[key] = self.parts[key] + given if key in self.parts else given

    def _kept(self) -> Iterator[tuple[int, int]]:
        """Yield what went into gradients of weights. A pass to something else, such as the embeddings of an
        adversarial input, ran through the modules but gave their weights nothing."""
        return (key for key in self.parts if not (seen := self.reached.get(key[0])) or key[1] in seen)

    @property
    def columns(self) -> dict[int, Tensor]:
        """Return what each module's weight was given, K in float64."""
        sums: dict[int, Tensor] = {}
        for key in self._kept():
            sums[key[0]] = sums[key[0]] + self.parts[key] if key[0] in sums else self.parts[key]
        return sums

    @property
    def passes(self) -> set[int]:
        """Return the backward passes that reached it."""
        return {backward for _, backward in self._kept()}

    @property
    def tokens(self) -> Tokens | None:
        """Return the tokens of the first pass that reached weights."""
        useful = set().union(*self.reached.values())
        return next(
            (t for backward, t in self.told.items() if backward in useful),
            next(iter(self.told.values()), None),
        )


class Inert:
    """What a copy of a watched model has in place of the guard: the hooks return at once."""

    is_on, depth = False, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing


def _nothing(*given: Any, **named: Any) -> None:
    pass


class Sketch:
    """The hooks of one model. ``failed`` is called with an error of a hook, which never reaches the training."""

    def __init__(
        self, models: Sequence[nn.Module], watched: Sequence[Watched], failed: Callable[[Exception], None]
    ) -> None:
        """``models`` is the model, and what it is wrapped in, the outermost first."""
        self.watched, self.survive = list(watched), Survive(failed)
        self.micro_batches: list[MicroBatch] = []
        self.reached: dict[
            int, set[int]
        ] = {}  # of this step: module → backward passes that gave it a gradient
        self.is_on = False
        self.depth = 0
        self.tokens = TokenHooks(self.survive)
        self.handles: list[Any] = []
        self.hidden: Tensor | None = None  # during a forward pass of the model
        self.was_skipped = False  # the optimizer did not step when it should have
        model = models[-1]
        for module in [*models[:-1], *_around(model, [w.module for w in watched])]:
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.is_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.head = head_of(model)
        if (table := table_of(model, self.head)) is not None and not self.is_pair:
            self.handles.append(table.register_forward_pre_hook(self._table))
        if self.head is not None:
            self.handles.append(self.head.register_forward_hook(self._head))
        self.whole_head = None if id(self.head) in parts_of(model) else self.head
        for index, one in enumerate(self.watched):
            if one.is_called:
                self.handles.append(
                    one.module.register_forward_hook(partial(self._forward, index), with_kwargs=True)
                )
            # ZeRO stage 3 and FSDP1 make the gradient of a weight that is not there.
            if not hasattr(one.weight, "ds_id") and one.part is None:
                self.handles.append(one.weight.register_hook(partial(self._weight, index)))

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """A copied or saved model, such as a moving average of the weights, has no guard."""
        return Inert, ()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.micro_batches.clear()
        self.is_on = False

    def take(self) -> list[MicroBatch]:
        """Return the micro-batches of the step, and begin the next one."""
        micro, self.micro_batches, self.reached, self.depth = self.micro_batches, [], {}, 0
        return micro

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.depth += 1
        if not self.is_on or self.depth > 1 or not torch.is_grad_enabled():
            return
        with self.survive:
            self._drop_skipped()
            self.micro_batches.append(
                MicroBatch(Batch.of(args, kwargs, is_pair=self.is_pair), reached=self.reached)
            )

    def _table(self, module: nn.Module, args: Any) -> None:
        """Read the tokens from the embedding, if the model was called with something else, such as a whole batch."""
        if torch.compiler.is_compiling() or not self.is_on or self.depth == 0 or not self.micro_batches:
            return
        with self.survive:
            micro = self.micro_batches[-1]
            if micro.batch.ids is None:
                micro.batch = replace(Batch.of(args, {}), is_inner=True)
            elif micro.batch.is_inner:
                micro.is_split = True  # the model is run several times within one call

    def _drop_skipped(self) -> None:
        """Forget the micro-batches of a step that was skipped, if their gradients were thrown away."""
        if self.was_skipped:
            slopes = [one.weight.grad for one in self.watched]
            if all(slope is None or not bool(local(slope).any()) for slope in slopes):
                self.micro_batches.clear()
            self.was_skipped = False

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.depth -= 1
        if not self.is_on or not torch.is_grad_enabled() or not self.micro_batches:
            return
        with self.survive:
            self.hidden = hidden = last_hidden(output, self.hidden)
            if self.depth > 0:
                return
            micro, self.hidden = self.micro_batches[-1], None
            self.tokens.model_ran(micro, output)
            if hidden is not None and not micro.has_logits:
                watch_hidden(micro, hidden, self.whole_head, self.tokens.stop_ids, self.survive)

    def _head(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self.is_on or not self.micro_batches or not torch.is_grad_enabled():
            return
        with self.survive:
            self.tokens.head_ran(self.micro_batches[-1], output, self.depth > 0)

    def _forward(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self.is_on or not self.micro_batches or not torch.is_grad_enabled():
            return
        with self.survive:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return
            micro = self.micro_batches[-1]
            micro.ran.add(index)
            given = args[0] if args else kwargs["input"]
            # Under autocast, the module multiplies its input in the output's precision.
            right = projected(given.detach(), self.watched[index].probes(output.device)[1], output.dtype)
            output.register_hook(partial(self._backward, index, micro, right, output.dtype))

    def _backward(
        self, index: int, micro: MicroBatch, right: Tensor, dtype: torch.dtype, delta: Tensor | None
    ) -> None:
        if delta is None:
            return
        with self.survive:
            left = projected(delta, self.watched[index].probes(delta.device)[0], dtype)
            micro.add(index, (left * right).sum(0, dtype=torch.float64))
            micro.dtypes.add(dtype)
            # In a hook, this is ``create_graph``.
            micro.is_second |= torch.is_grad_enabled()

    def _weight(self, index: int, gradient: Tensor) -> None:
        """Note that a backward pass reached a weight. Take its gradient if its module's call was not seen."""
        if not self.is_on:
            return
        self.reached.setdefault(index, set()).add(torch._C._current_graph_task_id())
        if any(index in micro.ran for micro in self.micro_batches):
            return
        with self.survive:
            if not self.micro_batches or (
                index in self.micro_batches[-1].columns and not self.micro_batches[-1].is_called
            ):
                self._drop_skipped()
                self.micro_batches.append(MicroBatch(Batch(), is_called=False, reached=self.reached))
            self.micro_batches[-1].add(index, self.watched[index].project(gradient.detach()))


@torch.no_grad()
def projected(values: Tensor, probes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` [..., d] times the probes [K, d], as [T, K] in float32."""
    flat, basis = values.reshape(-1, values.shape[-1]), probes.T
    with torch.autocast(values.device.type, enabled=False):
        parts = [part.to(dtype).float() @ basis for part in flat.split(CHUNK)]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _around(model: nn.Module, watched: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the model and those modules in it that contain all watched modules. Trainers call different ones
    of them; the outermost one that is called is a micro-batch."""
    if len(watched) < 2:
        return [model]
    inside = [
        m for m in model.modules() if m is not model and not isinstance(m, nn.ModuleList | nn.ModuleDict)
    ]
    return [
        model,
        *(m for m in inside if {*map(id, watched)} <= {*map(id, m.modules())} and m not in watched),
    ]
