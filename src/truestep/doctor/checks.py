"""Runs checks one after the other, and keeps what each of them measured.

A check is a function of a ``Bench`` that yields numbers. A number with a limit can fail the check; one without is only
reported. ``Skip`` says why a check cannot be made here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from truestep.device import synchronize
from truestep.errors import UserError

Verdict = Literal["PASS", "FAIL", "SKIP"]
# What a broken kernel, library or driver raises: a check that ends with one of these has failed.
BROKEN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


class Skip(Exception):
    """Raised by a check that cannot be made here. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """What was measured, and its limits, if it has any. NaN is outside of every limit."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        limits = [f"at most {self.at_most:.3g}"] if self.at_most is not None else []
        limits += [f"at least {self.at_least:.3g}"] if self.at_least is not None else []
        value = f"{self.value:.3g} {self.unit}".strip()
        return f"{self.name} {value}" + (f" ({', '.join(limits)})" if limits else "")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where checks are made. ``config`` is the config.json of the model whose shape they use. On a processor,
    ``is_small``: a model of the same kind that takes seconds. ``folder`` is empty."""

    device: torch.device
    config: Mapping[str, Any]
    folder: Path
    is_small: bool
    num_gpus: int = 0
    vllm: str = ""  # the Python of an environment with vLLM

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which this device is fast."""
        return torch.float32 if self.is_small else torch.bfloat16

    @property
    def judges_speed(self) -> bool:
        """Whether speed is judged, and not only reported."""
        return not self.is_small


@dataclass(frozen=True, kw_only=True)
class Check:
    """``seconds`` is about how long it takes on a GPU. ``needs`` is "" if it can be made on a processor, or what it needs."""

    name: str
    what: str
    seconds: int
    measure: Callable[[Bench], Iterator[Number]]
    needs: str = ""
    is_long: bool = False  # on a processor, so that it is made there only if it is the only one


@dataclass(frozen=True, kw_only=True)
class Outcome:
    check: str
    verdict: Verdict
    ran_on: str = ""
    seconds: float = 0.0
    reason: str = ""
    numbers: tuple[Number, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        numbers = [
            {
                **asdict(one),
                "value": one.value if math.isfinite(one.value) else str(one.value),
                "holds": one.holds,
            }
            for one in self.numbers
        ]
        return {**asdict(self), "seconds": round(self.seconds, 2), "numbers": numbers}


def run(
    checks: Sequence[Check], bench: Bench, seconds: float, now: Callable[[], float] = time.monotonic
) -> Iterator[Outcome]:
    """Yield the outcome of each check. After ``seconds``, the rest is left out, and so it is once the device is broken."""
    end, broken = now() + seconds, ""
    for check in checks:
        if broken or now() > end:
            why = broken or f"the {seconds / 60:.0f} minutes are over; pass --only {check.name}"
            yield Outcome(check=check.name, verdict="SKIP", reason=why)
        elif bench.device.type == "cpu" and check.needs:
            yield Outcome(check=check.name, verdict="SKIP", reason=f"needs {check.needs}")
        elif bench.device.type == "cpu" and check.is_long and len(checks) > 1:
            why = f"takes a minute or more on a processor; pass --only {check.name}"
            yield Outcome(check=check.name, verdict="SKIP", reason=why)
        else:
            found = made(check, bench, now)
            if found.verdict == "FAIL" and not answers(bench.device):
                broken = f"the device does not answer any more since the check {check.name}"
            yield found


def made(check: Check, bench: Bench, now: Callable[[], float] = time.monotonic) -> Outcome:
    """Make one check. Whatever breaks it is its result."""
    began, numbers = now(), list[Number]()
    verdict: Verdict = "PASS"
    reason = ""
    try:
        for number in check.measure(bench):
            numbers.append(number)
        if not all(number.holds for number in numbers):
            verdict = "FAIL"
            reason = "; ".join(str(number) for number in numbers if not number.holds)
    except Skip as stop:
        failed = [str(number) for number in numbers if not number.holds]
        verdict, reason = ("FAIL", "; ".join(failed)) if failed else ("SKIP", str(stop))
    except (*BROKEN, UserError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        verdict, reason = "FAIL", f"{type(error).__name__}: {first}"
    ran_on = "" if verdict == "SKIP" and not numbers else bench.device.type
    return Outcome(
        check=check.name,
        verdict=verdict,
        ran_on=ran_on,
        seconds=now() - began,
        reason=reason,
        numbers=tuple(numbers),
    )


def answers(device: torch.device) -> bool:
    """Return whether a device still computes. After some faults, none of its later calls succeeds in this process."""
    try:
        found = float(torch.ones(8, device=device).sum())
        synchronize(device)
    except RuntimeError:
        return False
    return found == 8.0
