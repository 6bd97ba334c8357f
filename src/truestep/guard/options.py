"""What the user says of a run, and the checks of the options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOSSES = ("token_mean", "sequence_mean", "any")
GRADIENTS = ("sum", "any")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What the user says of the run; 0 and None mean unknown."""

    accumulation: int = 0  # micro-batches of one process in one step
    loss: str = "token_mean"  # of a loss whose weights are all positive
    max_grad_norm: float = 0.0
    gradient: str = "sum"  # "any" if the gradient is changed on purpose, so that it need not be a sum
    rate: Callable[[int], float] | None = (
        None  # number of the step, from 0 → learning rate of the first group
    )
    engine_lag: int = 1  # optimizer steps that the weights of the sampling engine may be behind


def check(every: Any, on_fault: Any, declared: Declared) -> None:
    """Raise ValueError for options that are not valid."""
    for name, value, least in (("every", every, 1), ("accumulation", declared.accumulation, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} = {value!r}; use a whole number, {least} or more")
    if not callable(on_fault) and on_fault not in ("warn", "stop"):
        raise ValueError(f'on_fault = {on_fault!r}; use "warn", "stop" or a function')
    for name, value, known in (("loss", declared.loss, LOSSES), ("gradient", declared.gradient, GRADIENTS)):
        if value not in known:
            raise ValueError(f"{name} = {value!r}; use one of {', '.join(known)}")
    if declared.rate is not None and not callable(declared.rate):
        raise ValueError(f"rate = {declared.rate!r}; use a function of the step's number, from 0")
    if not isinstance(declared.max_grad_norm, int | float) or declared.max_grad_norm < 0:
        raise ValueError(f"max_grad_norm = {declared.max_grad_norm!r}; use a number, 0 or more")
