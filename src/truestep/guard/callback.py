"""The guard as a callback of transformers' Trainer, and of the trainers that are built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from truestep.guard.engine_http import Engine, Server
from truestep.guard.live import Act, Guard
from truestep.guard.options import Declared, check

LOG = "truestep_guard.jsonl"


class TruestepGuard(transformers.TrainerCallback):
    """Use it as ``Trainer(..., callbacks=[TruestepGuard()])``.

    The number of micro-batches, the clip and the schedule are read from the Trainer's arguments. Records go to
    ``truestep_guard.jsonl`` in the output folder. ``loss`` says what the loss is: "token_mean", "sequence_mean"
    or "any". The other options are those of ``Guard``.
    """

    def __init__(
        self,
        *,
        every: int = 20,
        on_fault: Act = "warn",
        log: str | Path | None = None,
        loss: str = "token_mean",
        engine: str | Engine | None = None,
        engine_lag: int = 1,
    ) -> None:
        self.options: dict[str, Any] = {"every": every, "on_fault": on_fault, "engine": engine}
        self.engine_lag = engine_lag
        self.log, self.loss = log, loss
        self.guard: Guard | None = None
        check(every, on_fault, Declared(loss=loss))
        if isinstance(engine, str):
            Server(engine)  # raises for a wrong address

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.guard is not None:
            self.guard.remove()  # of a training that was interrupted
        declared = Declared(
            accumulation=int(args.gradient_accumulation_steps), loss=self.loss,
            max_grad_norm=0.0 if args.deepspeed else float(args.max_grad_norm or 0.0),
            rate=_rate(given.get("lr_scheduler"), state), engine_lag=self.engine_lag,
        )  # fmt: skip
        log = self.log or Path(args.output_dir) / LOG
        self.guard = Guard(given["model"], given["optimizer"], log=log, declared=declared, **self.options)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.guard is not None:
            self.guard.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.guard is not None:
            self.guard.close()


def _rate(scheduler: Any, state: Any) -> Any:
    """Return the learning rate of each of the guard's steps: the Trainer's own schedule, ticked once per step. Return
    None for a schedule that depends on more than the step."""
    while not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler = getattr(scheduler, "scheduler", None)  # of a wrapper
        if scheduler is None:
            return None
    first, base, share = state.global_step, scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    return lambda step: base * share(first + step)
