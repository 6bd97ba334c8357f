"""The guard of one run: when it looks, and what it does with what it finds."""

from __future__ import annotations

import contextlib
import sys
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
from truestep.guard import trackers
from truestep.guard.engine import EngineCheck, EngineSeen
from truestep.guard.engine_http import Engine, Server
from truestep.guard.header import describe
from truestep.guard.judge import LOSSES, Declared, Judged, judge
from truestep.guard.log import Log, message
from truestep.guard.modules import choose, rounds_products, stop_ids_of
from truestep.guard.ranks import MicroSeen, RankSeen
from truestep.guard.sketch import Sketch
from truestep.guard.survive import Survive
from truestep.guard.update import Formula, Moved, gradient_norm, has_copies, rate_causes
from truestep.guard.used import (
    FromDeepSpeed,
    FromGradients,
    Reader,
    States,
    is_deepspeed,
    unwrapped,
    unwrapped_models,
)

FIRST = 3  # steps that are always watched
SEED = 20260423
Act = str | Callable[["Record"], None]
Record = dict[str, Any]


class GuardFault(RuntimeError):
    """Raised by a guard with ``on_fault="stop"``; ``record`` is the step's record."""

    def __init__(self, text: str, record: Record) -> None:
        super().__init__(text)
        self.record = record


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
        self.check(every, on_fault, declared.loss)
        self.every, self.on_fault, self.declared, self.group = every, on_fault, declared, group
        self.log = Log(log)
        self.records: list[Record] = []
        self.step_number = 0  # of the steps that the guard has seen
        self.unread: Record | None = None
        self.is_users = False
        self.failure = ""  # why the guard is off
        self.sketch: Sketch | None = None
        self.handles: list[Any] = []
        self.stepped: set[int] = set()  # optimizers that had their part in this step
        self.told = 0  # the number of steps at the last call of ``step``
        self.pending: list[Cause] = []  # found outside of a step, such as by a scheduler
        self.is_closed = False
        self.tracked: set[str] = set()  # faults that trackers were told
        self.engine_check: EngineCheck | None = None
        self.engine_seen = EngineSeen()
        sampler = Server(engine) if isinstance(engine, str) else engine
        self._safely(lambda: self._attach(model, optimizer, sampler))
        if not self.failure:
            self._mark("run", lambda: describe(self))

    @staticmethod
    def check(every: int, on_fault: Act, loss: str) -> None:
        """Raise ValueError for options that are not valid."""
        if every < 1:
            raise ValueError(f"every = {every}; use 1 or more")
        if not callable(on_fault) and on_fault not in ("warn", "stop"):
            raise ValueError(f'on_fault = {on_fault!r}; use "warn", "stop" or a function')
        if loss not in LOSSES:
            raise ValueError(f"loss = {loss!r}; use one of {', '.join(LOSSES)}")

    # attach and remove

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
            raise ValueError("the model has no trainable linear module of its own that could be watched")
        chains = [
            unwrapped(one) for one in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])
        ]
        self.optimizers = [chain[-1] for chain in chains]
        self.is_deepspeed = any(is_deepspeed(one) for chain in chains for one in chain)
        groups = [group for one in self.optimizers for group in one.param_groups]
        self.sketch = Sketch(models, self.watched, self._failed)
        self.sketch.tokens.stop_ids = stop_ids_of(self.model)
        self.moved = Moved(self.model, groups, self.is_deepspeed)
        if sampler is not None:
            self.engine_check = EngineCheck(
                sampler, self.model, lag=self.declared.engine_lag, group=self.group)  # fmt: skip
        self.formulas = [] if self.is_deepspeed else [Formula(self.model, o, random) for o in self.optimizers]
        self.modules = np.repeat(np.arange(len(self.watched)), [len(w.left) for w in self.watched])
        self.previous = np.full(len(self.modules), np.nan)
        self.norm, self.short_steps = 0.0, 0
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
                self.log.say(
                    "truestep guard: the optimizer has copies in float32, so their gradients are not read"
                )
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

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Judge a step that is not judged yet, remove all hooks, and tell trackers a summary."""
        is_running = self.sketch is not None and not self.failure and sys.exc_info()[0] is None
        # Without an engine, every call of ``step`` is one of DeepSpeed's steps.
        if is_running and (self.engine is not None or not self.is_deepspeed):
            self.step()
        self.remove()
        if not self.is_closed:
            self.is_closed = True
            finished = sys.exc_info()[0] is None
            self._mark("end", lambda: {"steps": self.step_number, "finished": finished})
            if self.records and self._is_first_rank():
                trackers.tell(self._summary(), is_finding=False)
        self.log.close()

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
        if self.sketch is None:
            return
        micro = self.sketch.micro_batches
        if id(optimizer) in self.stepped and not self.failure:  # another had no part in the step before
            self._safely(self._finish)
        if self.stepped:
            return
        self._safely(lambda: self._ask_engine(micro))  # also if a hook failed on this rank: the others wait
        if not self.failure:
            self._safely(self._read_before)

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
        if not self.failure and self.sketch is not None:
            self.stepped.add(id(optimizer))
            if len(self.stepped) == len(self.optimizers):
                self._safely(self._finish)

    def _torch_step(self) -> None:
        if self.stepped:
            self._finish()
        assert self.sketch is not None
        self.sketch.was_skipped = self.told == self.step_number
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
        micro, self.sketch.micro_batches = self.sketch.micro_batches, []
        if not was_on:
            for formula in self.formulas:
                formula.forget()
            return
        seen, causes = self._seen(micro)
        all_ranks = rank_exchange.gather(seen, self.group)
        if any(rank.failed for rank in all_ranks):
            self._off(self.failure or "another process failed")
            return
        judged = self._with_update(judge(all_ranks, self.modules, self.declared), all_ranks, causes)
        self.previous = seen.target
        self._tell(judged, time.perf_counter() - began)

    def _seen(self, micro: Sequence[Any]) -> tuple[RankSeen, list[Cause]]:
        """Return what this rank saw, also if reading it failed: other ranks wait for it."""
        nothing = np.full(len(self.modules), np.nan)
        seen = RankSeen(failed=True, is_narrow=False, target=nothing, previous=nothing, micro=())
        causes: list[Cause] = []
        with Survive(self._failed):
            target, still = self._vector(self.reader.after()), self.moved.after()
            causes = [c for formula in self.formulas for c in formula.causes()]
            columns = [(self._vector(m.columns, 0.0), m) for m in micro]
            narrow = {d for m in micro for d in m.dtypes} | {w.weight.dtype for w in self.watched}
            seen = RankSeen(
                failed=bool(self.failure), target=target, previous=self.previous,
                is_narrow=bool(narrow & {torch.bfloat16, torch.float16}) or rounds_products(),
                micro=tuple(MicroSeen(column=c, mark=m.batch.mark(), tokens=m.tokens) for c, m in columns),
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
        asked, count = self.declared.accumulation, max(len(r.micro) for r in ranks)
        self.short_steps += count < asked
        # One short step may be the end of an epoch.
        if self.short_steps == FIRST == self.step_number:
            found.append(cause("grouping", "too_few_micro_batches", found=count, asked=asked))
        if not found:
            return judged
        return replace(judged, causes=(*judged.causes, *found), verdict=Verdict.FAULT)

    # what is said

    def _tell(self, judged: Judged, seconds: float) -> None:
        record = self.log.record(self.step_number, judged, seconds, getattr(self.reader, "source", ""))
        record["engine"] = self.engine_seen.numbers
        self.records.append(record)
        self.unread = record
        is_first_rank = self._is_first_rank()
        if is_first_rank:
            self.log.write(record)
            self.log.say_unread(record, self.engine_seen.unread)
        if judged.verdict is not Verdict.FAULT:
            if is_first_rank and len(self.records) == 1:
                self.log.say(message(record))
            return
        if is_first_rank and record["fault"] not in self.tracked:
            self.tracked.add(record["fault"])
            trackers.tell(self._summary(), is_finding=True)
        if callable(self.on_fault):
            self.is_users = True  # what this function raises is meant for the training
            self.on_fault(record)
            self.is_users = False
        elif self.on_fault == "stop":
            raise GuardFault(message(record), record)
        elif is_first_rank:
            self.log.say_fault(record)

    def _safely(self, do: Callable[[], None]) -> None:
        with Survive(self._ended, passes=lambda error: isinstance(error, GuardFault) or self.is_users):
            do()

    def _ended(self, error: Exception) -> None:
        self._off(f"{type(error).__name__}: {error}")

    def _failed(self, error: Exception) -> None:
        """Note an error in a hook; the guard goes off together on all ranks at the end of the step."""
        self.failure = self.failure or f"{type(error).__name__}: {error}"

    def _is_first_rank(self) -> bool:
        group = self.group or rank_exchange.world()
        return group is None or torch.distributed.get_rank(group) == 0

    def _summary(self) -> dict[str, Any]:
        return trackers.summary_of(self.records, self.step_number, self.failure)

    def _mark(self, kind: str, values: Callable[[], dict[str, Any]]) -> None:
        """Write a record that is not about a step. An error in it does not turn the guard off."""
        with contextlib.suppress(Exception):
            if self._is_first_rank():
                self.log.mark(kind, **values())

    def _off(self, why: str) -> None:
        self.failure = why
        self._mark("off", lambda: {"step": self.step_number, "why": " ".join(why.split())[:300]})
        self.log.say(f"truestep guard: off ({' '.join(why.split())[:300]}); the training goes on without it")
        self.remove()


def guard(model: nn.Module, optimizer: Any = None, **options: Any) -> Guard:
    """Return a ``Guard``; use it in a ``with`` statement."""
    known = [f.name for f in fields(Declared)]
    declared = Declared(**{k: options.pop(k) for k in known if k in options})
    return Guard(model, optimizer, declared=declared, **options)
