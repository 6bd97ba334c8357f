"""The guard of one run: when it looks, and what it does with what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from truestep.audit.measure.findings import Cause, Verdict, cause
from truestep.guard import ranks as rank_exchange
from truestep.guard.engine import EngineCheck, EngineSeen
from truestep.guard.engine_http import Engine, Server
from truestep.guard.header import describe
from truestep.guard.judge import NO_BACKWARD, SEVERAL, UNTRAINED, Judged, judge, same_rows
from truestep.guard.modules import choose, rounds_products, stop_ids_of
from truestep.guard.options import Declared, check
from truestep.guard.ranks import MicroSeen, RankSeen, on_all_ranks
from truestep.guard.sketch import MicroBatch, Sketch
from truestep.guard.survive import Survive
from truestep.guard.tell import Act, Record, Teller
from truestep.guard.update import Formula, Moved, gradient_norm, has_copies, rate_causes
from truestep.guard.used import (
    FromDeepSpeed,
    FromGradients,
    Reader,
    States,
    has_gradient,
    is_deepspeed,
    unwrapped,
    unwrapped_models,
)
from truestep.redaction import redact

FIRST = 3  # steps that are always watched
WAITED = 20  # a gradient scaler may skip a few
SEED = 20260423


class Guard:
    """Watches the optimizer steps of one model.

    ``model`` is the module that is trained, wrapped or not, or a DeepSpeed engine. ``optimizer`` is a torch
    optimizer, a list of them, or a framework's wrapper around one. The first three steps are watched, then
    every ``every``-th. ``on_fault`` is "warn", "stop" (raises ``GuardFault``) or a function of the record.
    ``log`` is a JSON Lines file for the records of all watched steps. ``engine`` is what samples in RL, a server's
    address or a callable: watched steps then check that it has the trainer's weights (see ``guard.engine``).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        every: int = 20,
        on_fault: Act = "warn",
        log: str | Path | None = None,
        declared: Declared | None = None,
        group: Any = None,
        engine: str | Engine | None = None,
    ) -> None:
        declared = declared or Declared()
        check(every, on_fault, declared)
        self.every, self.declared, self.group = every, declared, group
        self.teller = Teller(log, on_fault, group)
        self.step_number = 0  # of the steps that the guard has seen
        self.unread: Record | None = None
        self.failure = ""  # why the guard is off
        self.broken = ""  # why it goes off, on all ranks together, at the end of this step
        self.sketch: Sketch | None = None
        self.handles: list[Any] = []
        self.stepped: set[int] = set()  # optimizers that had their part in this step
        self.waited = 0  # calls of ``step`` before the first step
        self.has_begun = False  # there was a gradient before the guard
        self.told = 0  # the number of steps at the last call of ``step``
        self.pending: list[Cause] = []  # found outside of a step, such as by a scheduler
        self.is_closed = False
        self.engine_check: EngineCheck | None = None
        self.engine_seen = EngineSeen()
        sampler = Server(engine) if isinstance(engine, str) else engine
        self._safely(lambda: self._attach(model, optimizer, sampler))
        self._agree()
        if not self.failure:
            self.teller.mark("run", lambda: describe(self))

    @property
    def records(self) -> list[Record]:
        """The records of all watched steps."""
        return self.teller.records

    # attach and remove

    def _agree(self) -> None:
        """Go off if another rank could not begin: it would never take part in an exchange. Leave out the first
        step if some rank has a gradient already."""
        with Survive(self._ended):
            group = self.group or rank_exchange.world()
            if not on_all_ranks(not self.failure, group) and not self.failure:
                self._off("another process could not begin")
            if not on_all_ranks(not self.has_begun, group) and self.sketch is not None:
                self.sketch.is_on = False  # a gradient from before would be part of the first step

    def _attach(self, model: nn.Module, optimizer: Any, sampler: Engine | None) -> None:
        self.engine: Any = model if is_deepspeed(model) else None
        optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if optimizer is None:
            raise ValueError("no optimizer was given")
        models = unwrapped_models(model)
        self.model = models[-1]
        self.group = self.group or rank_exchange.world()
        random = torch.Generator().manual_seed(SEED)
        self.watched = choose(self.model, random)
        if not self.watched:
            raise ValueError("the model has no trainable matrix that can be watched")
        chains = [
            unwrapped(one) for one in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])
        ]
        self.optimizers = [chain[-1] for chain in chains]
        self.is_deepspeed = any(is_deepspeed(one) for chain in chains for one in chain)
        groups = [group for one in self.optimizers for group in one.param_groups]
        self.sketch = Sketch(models, self.watched, self._failed)
        self.sketch.tokens.stop_ids = stop_ids_of(self.model)
        self.moved = Moved(self.model, groups)
        if sampler is not None:
            self.engine_check = EngineCheck(
                sampler, self.model, lag=self.declared.engine_lag, group=self.group)  # fmt: skip
        self.formulas = [] if self.is_deepspeed else [Formula(self.model, o, random) for o in self.optimizers]
        self.modules = np.repeat(np.arange(len(self.watched)), [len(w.left) for w in self.watched])
        self.previous = np.full(len(self.modules), np.nan)
        self.norm, self.short_steps, self.same_steps, self.given_up_steps = 0.0, 0, 0, 0
        self.has_begun = any(has_gradient(one.weight) for one in self.watched)
        self.sketch.is_on = self._is_due(1)
        self.reader: Reader
        if self.is_deepspeed:
            self.reader = FromDeepSpeed(self.watched, self.optimizers[0], self.group)
            self.wrapper = next(one for one in chains[0] if is_deepspeed(one))
            if self.sketch.is_on:
                self.reader.before()
            self.taken = self._steps_taken()
        else:
            self.moved.has_copies = has_copies(self.moved)
            if self.moved.has_copies:
                self.teller.once("the optimizer has copies in float32, so their gradients are not read")
            states, reads_all = States(self.optimizers), not self.moved.has_copies
            self.reader = FromGradients(self.watched, groups, states, reads_all)
            for one in self.optimizers:
                self.handles.append(one.register_step_pre_hook(self._before))
                self.handles.append(one.register_step_post_hook(self._after))

    def remove(self) -> None:
        """Take the guard out; the training goes on as without it."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.sketch is not None:
            self.sketch.remove()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.close(finished=kind is None)

    def close(self, *, finished: bool = True) -> None:
        """Judge a step that is not judged yet, remove all hooks, and tell trackers a summary."""
        is_running = self.sketch is not None and not self.failure and finished
        # Without an engine, every call of ``step`` is one of DeepSpeed's steps.
        if is_running and (self.engine is not None or not self.is_deepspeed):
            self.step()
        self.remove()
        if not self.is_closed:
            self.is_closed = True
            self.teller.end(self.step_number, self.failure, finished)
        self.teller.log.close()

    # one step

    def step(self) -> Record | None:
        """Call this after an optimizer step, also if a gradient scaler skipped it. It returns the step's record,
        or None if it was not watched."""
        if self.sketch is not None and not self.failure:
            self._safely(self._deepspeed_step if self.is_deepspeed else self._torch_step)
        record, self.unread = self.unread, None
        return record

    def _is_due(self, step: int) -> bool:
        return step <= FIRST or (step - FIRST) % self.every == 0

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.sketch is None or torch.compiler.is_compiling():
            return
        micro = self.sketch.micro_batches
        if id(optimizer) in self.stepped and not self.failure:  # another had no part in the step before
            self._safely(self._finish)
        if self.stepped:
            return
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:  # args[0] is the optimizer
            self._not_watched("a step with a closure computes its gradient by itself, so it is not watched")
            return
        self._safely(lambda: self._ask_engine(micro))  # also if a hook failed on this rank: the others wait
        with Survive(self._failed):
            self._read_before()

    def _not_watched(self, why: str) -> None:
        """Leave this step out."""
        assert self.sketch is not None
        self.sketch.is_on = False
        self.sketch.micro_batches.clear()
        if why:
            self.teller.once(why)

    def _ask_engine(self, micro: Sequence[Any]) -> None:
        if self.engine_check is not None:
            number, batches = self.step_number, [one.batch for one in micro]
            self.engine_seen = self.engine_check.before_step(number, self._is_due, batches) or EngineSeen()

    def _read_before(self) -> None:
        assert self.sketch is not None
        if self.sketch.is_on:
            self.reader.before()
            self.pending = [c for formula in self.formulas for c in formula.before()]
            self.pending += rate_causes(self.declared, self.moved.groups, self.step_number)
            self.norm = gradient_norm(self.moved) if self.declared.max_grad_norm else 0.0
        elif self._is_due(self.step_number + 2):
            # The gradient before a watched step, in case it is used again.
            self.reader.before()
            self.previous = self._vector(self.reader.after())

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self.failure and self.sketch is not None and not torch.compiler.is_compiling():
            overflowed = getattr(optimizer, "found_inf", None) if self.sketch.is_on else None
            if overflowed is not None and bool(overflowed):
                self._not_watched("")  # a fused optimizer skips the step by itself
            self.stepped.add(id(optimizer))
            if len(self.stepped) == len(self.optimizers):
                self._safely(self._finish)

    def _torch_step(self) -> None:
        if self.stepped:
            self._finish()
        assert self.sketch is not None
        self.sketch.was_skipped = self.told == self.step_number
        self.waited = 0 if self.step_number else self.waited + 1
        if self.waited == WAITED:
            self.teller.once(
                "the optimizer has not stepped; is it the one that trains this model, and its step not compiled?"
            )
        self.told = self.step_number

    def _steps_taken(self) -> int:
        return -1 if self.engine is None else int(self.engine.global_steps)

    def _deepspeed_step(self) -> None:
        taken = self._steps_taken()
        if taken >= 0 and taken == self.taken:
            return
        self.taken = taken
        assert self.sketch is not None
        if getattr(self.wrapper, "overflow", False):
            self.sketch.was_skipped = True
            return
        micro = self.sketch.micro_batches
        self._finish()
        if not self.failure:
            self._ask_engine(micro)
        if self.sketch.is_on:
            self.reader.before()

    def _finish(self) -> None:
        """Judge the step that was taken, and prepare for the next one."""
        assert self.sketch is not None
        began = time.perf_counter()
        self.step_number += 1
        self.stepped.clear()
        was_on, self.sketch.is_on = self.sketch.is_on, self._is_due(self.step_number + 1)
        micro = self.sketch.take()
        if not was_on:
            for formula in self.formulas:
                formula.forget()
            return
        seen, causes = self._seen(micro)
        all_ranks = rank_exchange.gather(seen, self.group)
        if any(rank.failed for rank in all_ranks):
            self._off(self.broken or "another process failed")
            return
        judged = self._with_update(judge(all_ranks, self.modules, self.declared), all_ranks, causes)
        self.previous = seen.target
        source, seconds = getattr(self.reader, "source", ""), time.perf_counter() - began
        record = self.teller.log.record(self.step_number, judged, seconds, source)
        record["engine"] = self.engine_seen.numbers
        self.unread = record
        self.teller.tell(record, self.engine_seen.unread, self.step_number)

    def _seen(self, micro: Sequence[Any]) -> tuple[RankSeen, list[Cause]]:
        """Return what this rank saw, also if reading it failed: other ranks wait for it."""
        nothing = np.full(len(self.modules), np.nan)
        seen = RankSeen(failed=True, is_narrow=False, target=nothing, previous=nothing, micro=())
        causes: list[Cause] = []
        with Survive(self._failed):
            target, still = self._vector(self.reader.after()), self.moved.after()
            if any(m.is_second for m in micro):
                target = nothing
                self.teller.once("with create_graph, the weights of micro-batches are not read")
            causes = [c for formula in self.formulas for c in formula.causes()]
            columns = [(self._vector(m.columns, 0.0), m) for m in micro]
            narrow = {d for m in micro for d in m.dtypes} | {w.weight.dtype for w in self.watched}
            seen = RankSeen(
                failed=bool(self.broken), target=target, previous=self.previous,
                is_narrow=bool(narrow & {torch.bfloat16, torch.float16}) or rounds_products(),
                micro=tuple(_micro(c, m) for c, m in columns),
                replicated=self.moved.replicated, still=tuple(still), wrong_update=bool(causes), norm=self.norm,
                noise=self.reader.noise,
            )  # fmt: skip
        return seen, causes

    def _vector(self, parts: dict[int, Any], missing: float = float("nan")) -> np.ndarray:
        whole = [
            np.full(len(one.left), missing) if index not in parts else parts[index].cpu().numpy()
            for index, one in enumerate(self.watched)
        ]
        return np.concatenate(whole)

    def _with_update(self, judged: Judged, ranks: Sequence[RankSeen], own: Sequence[Cause]) -> Judged:
        """Add what the optimizer did wrong, on any rank."""
        still = [all(flags) for flags in zip(*(r.still for r in ranks), strict=True)]
        found = self.moved.causes(still)
        if any(r.wrong_update for r in ranks):
            found += list(own) or [cause("update", "update_on_another_rank")]
        if len({r.replicated for r in ranks}) > 1:
            found.append(cause("ranks_diverge", "ranks_have_other_parameters"))
        found, self.pending = [*found, *self.pending, *self.engine_seen.causes], []
        judged = replace(judged, notes=(*judged.notes, *self.engine_seen.notes))
        asked = self.declared.accumulation
        count = max(len(r.micro) for r in ranks)
        self.same_steps = self.same_steps + 1 if same_rows(ranks) else 0
        # A single micro-batch may be the same by chance.
        if self.same_steps == 2 and all(c.code != "data_lost" for c in judged.causes):
            found.append(cause("data_lost", "ranks_have_same_rows"))
        self.short_steps = self.short_steps + 1 if count < asked else 0
        # One short step may be the end of an epoch.
        if self.short_steps == FIRST:
            found.append(cause("grouping", "too_few_micro_batches", found=count, asked=asked))
        self.given_up_steps = self.given_up_steps + 1 if judged.given_up else 0
        # Now and then, a step may be left out on purpose.
        if self.given_up_steps == FIRST:
            found.append(cause("kept", "given_up_often", count=judged.given_up))
        if not found:
            return judged
        return replace(judged, causes=(*judged.causes, *found), verdict=Verdict.FAULT)

    # errors

    def _safely(self, do: Callable[[], None]) -> None:
        with Survive(self._ended, passes=self.teller.is_meant):
            do()

    def _ended(self, error: Exception) -> None:
        self._off(f"{type(error).__name__}: {error}")

    def _failed(self, error: Exception) -> None:
        """Note an error; the guard goes off together on all ranks at the end of the step."""
        self.broken = self.broken or f"{type(error).__name__}: {error}"

    def _off(self, why: str) -> None:
        self.failure = why = " ".join(redact(why).split())[:300] or "unknown"
        self.teller.mark("off", lambda: {"step": self.step_number, "why": why})
        self.teller.log.say(f"truestep guard: off ({why}); the training goes on without it")
        self.remove()


def _micro(column: np.ndarray, seen: MicroBatch) -> MicroSeen:
    """Return what is exchanged of a micro-batch."""
    passes = seen.passes
    unreached = UNTRAINED if seen.batch.is_untrained else NO_BACKWARD
    backward = unreached if not passes else SEVERAL if len(passes) > 1 else next(iter(passes))
    tokens = None if seen.is_split else seen.tokens
    return MicroSeen(column=column, mark=seen.batch.mark(), backward=backward, tokens=tokens)


def guard(model: nn.Module, optimizer: Any = None, **options: Any) -> Guard:
    """Return a ``Guard``; use it in a ``with`` statement."""
    known = [f.name for f in fields(Declared)]
    declared = Declared(**{k: options.pop(k) for k in known if k in options})
    return Guard(model, optimizer, declared=declared, **options)
