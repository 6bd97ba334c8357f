"""The guard as a callback of transformers' Trainer, and of the trainers that are built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from truestep.guard.engine_http import Engine, Server
from truestep.guard.judge import Declared
from truestep.guard.live import Act, Guard

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
        Guard.check(every, on_fault, loss)
        if isinstance(engine, str):
            Server(engine)  # raises for a wrong address

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        declared = Declared(
            accumulation=int(args.gradient_accumulation_steps), loss=self.loss,
            max_grad_norm=0.0 if args.deepspeed else float(args.max_grad_norm or 0.0),
            rate=_rate(args, state), engine_lag=self.engine_lag,
        )  # fmt: skip
        log = self.log or Path(args.output_dir) / LOG
        self.guard = Guard(given["model"], given["optimizer"], log=log, declared=declared, **self.options)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.guard is not None:
            self.guard.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.guard is not None:
            self.guard.close()


def _rate(args: Any, state: Any) -> Any:
    """Return the learning rate of a step from the Trainer's arguments, or None if it is not a function of the
    step alone."""
    if args.deepspeed:
        return None
    own = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    warmup = args.get_warmup_steps(state.max_steps)
    more = {"scheduler_specific_kwargs": getattr(args, "lr_scheduler_kwargs", None) or {}}
    try:
        made = transformers.get_scheduler(args.lr_scheduler_type, own, warmup, state.max_steps, **more)
    except (TypeError, ValueError, AttributeError):
        return None
    if not isinstance(made, torch.optim.lr_scheduler.LambdaLR):
        return None
    first = state.global_step
    return lambda step: args.learning_rate * made.lr_lambdas[0](first + step)
