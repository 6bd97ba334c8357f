"""Findings as records. ``present.words`` turns them into sentences."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Verdict(enum.StrEnum):
    """The verdict on one configuration. FAULT: data is lost, or the update depends on how the same batch is
    split, sharded, padded or packed. DEFAULT: the update does not depend on these, but it is not the textbook
    step (clipping, weight decay, a constant scale). DOCUMENTED CHOICE: the same pattern as a fault, but
    requested by an option set to a non-default value."""

    RIGHT = "RIGHT"
    FAULT = "FAULT"
    DEFAULT = "DEFAULT"
    DOCUMENTED_CHOICE = "DOCUMENTED CHOICE"
    NOT_OBSERVABLE = "NOT OBSERVABLE"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One deviation from the configured step, or one reason why something was not observed.

    ``code`` is the fault's family, for programs ("" if it is not a fault). ``kinds`` name its sentence in
    ``present.words``, or two if the evidence has two readings. ``values`` fill in the numbers and names.
    """

    code: str
    kinds: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)


def cause(code: str, *kinds: str, **values: Any) -> Cause:
    return Cause(code=code, kinds=kinds, values=values)


Causes = tuple[Cause, ...]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The differences between the runs of one case and what was configured; empty if there are none."""

    data: Causes = ()  # in the whole run: windows, lost rows, diverging ranks
    steps: tuple[Causes, ...] = ()  # in single steps, each distinct set once
    in_every_step: bool = True

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.code for c in (*self.data, *(c for step in self.steps for c in step))))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The finding about one subject in one configuration."""

    subject: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict = Verdict.NOT_RUN
    found: Differences = Differences()
    codes: Sequence[str] = ()  # of all cases, the main one first
    documented: str = ""  # the option that requests the difference
    reasons: Causes = ()  # for NOT RUN and NOT OBSERVABLE, and for anything else that was not observed
    asked: Mapping[str, Any] = field(default_factory=dict)  # the objective of an RL step
    delivery: Mapping[str, Any] = field(
        default_factory=dict
    )  # distances of the weights that a sampler may have
    versions: Mapping[str, str] = field(default_factory=dict)
    cases: Mapping[str, Differences] = field(default_factory=dict)
    tokens: Sequence[Sequence[int]] = ()  # of the step that is shown, per rank
    weights: Sequence[Sequence[float]] = ()
    standard_errors: Sequence[Sequence[float]] = ()
    relative_error: float | None = None
    residual: float | None = None
    noise: float | None = None
    condition: float | None = None
    logged_loss: float | None = None
    true_loss: float | None = None
    logged_loss_could_show_it: bool | None = None
    location: str = ""  # FILE:LINE where the audited code runs the model
    remedy: str = ""  # a change with which a second audit was RIGHT
    reproducer: str = ""  # a script that was run and shows the fault
    seconds: Mapping[str, float] = field(default_factory=dict)
