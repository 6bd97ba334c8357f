"""What was found, as records. ``present.words`` makes the sentences."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Verdict(enum.StrEnum):
    """FAULT: the update depends on how the same batch is split, sharded, padded or packed, or data is lost.
    DEFAULT: it does not, and yet is not the textbook step (clipping, weight decay, a constant scale).
    DOCUMENTED CHOICE: a fault's pattern that the user asked for by an option away from its default."""

    RIGHT = "RIGHT"
    FAULT = "FAULT"
    DEFAULT = "DEFAULT"
    DOCUMENTED_CHOICE = "DOCUMENTED CHOICE"
    NOT_OBSERVABLE = "NOT OBSERVABLE"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One deviation from the step that was asked for, or one reason why something was not seen.

    ``code`` is its family, for programs ("" if it is not a fault); ``kinds`` name its sentence, two if the
    evidence has two readings; ``values`` are the numbers and names in it.
    """

    code: str
    kinds: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)


def cause(code: str, *kinds: str, **values: Any) -> Cause:
    return Cause(code=code, kinds=kinds, values=values)


Causes = tuple[Cause, ...]


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How the runs of one case differ from what was asked. Empty: they do not."""

    data: Causes = ()  # of the whole run: windows, lost rows, diverging ranks
    steps: tuple[Causes, ...] = ()  # what single steps show, each distinct set once
    in_every_step: bool = True

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.code for c in (*self.data, *(c for step in self.steps for c in step))))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One subject in one configuration."""

    subject: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict = Verdict.NOT_RUN
    found: Differences = Differences()
    codes: Sequence[str] = ()  # of all cases, the main one first
    documented: str = ""  # the option that asks for it
    reasons: Causes = ()  # of NOT RUN and NOT OBSERVABLE, and what was not seen otherwise
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
    remedy: str = ""  # a change that was audited again and is RIGHT
    reproducer: str = ""  # a script that shows it, and was run
    seconds: Mapping[str, float] = field(default_factory=dict)
