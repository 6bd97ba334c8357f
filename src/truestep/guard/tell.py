"""What a guard does with what it finds: the log, lines on stderr, trackers, and the user's function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from truestep.audit.measure.findings import Cause
from truestep.guard import trackers
from truestep.guard.log import Log, message
from truestep.guard.ranks import world

Act = str | Callable[["Record"], None]
Record = dict[str, Any]


class GuardFault(RuntimeError):
    """Raised by a guard with ``on_fault="stop"``; ``record`` is the step's record."""

    def __init__(self, text: str, record: Record) -> None:
        super().__init__(text)
        self.record = record


class Teller:
    """Tells what one rank's guard found. Only the first rank of ``group`` writes; all of them act."""

    def __init__(self, log: str | Path | None, on_fault: Act, group: Any) -> None:
        self.log, self.on_fault, self.group = Log(log), on_fault, group
        self.records: list[Record] = []
        self.raised: Exception | None = None  # by the user's function
        self.tracked: set[str] = set()  # faults that trackers were told

    @property
    def is_first(self) -> bool:
        group = self.group or world()
        return group is None or torch.distributed.get_rank(group) == 0

    def is_meant(self, error: Exception) -> bool:
        """Return whether an error is meant for the training."""
        return isinstance(error, GuardFault) or error is self.raised

    def mark(self, kind: str, values: Callable[[], dict[str, Any]]) -> None:
        """Write a record that is not about a step. An error in it does not turn the guard off."""
        with contextlib.suppress(Exception):
            if self.is_first:
                self.log.mark(kind, **values())

    def once(self, text: str) -> None:
        """Say a line that was not said before."""
        if text not in self.log.said:
            self.log.said.add(text)
            self.log.say(f"truestep guard: {text}")

    def tell(self, record: Record, unread: Sequence[Cause], step: int) -> None:
        """Write the record of a step, say what is new in it, and act on a fault."""
        self.records.append(record)
        is_first = self.is_first
        if is_first:
            self.log.write(record)
            self.log.say_unread(record, tuple(unread))
        if record["verdict"] != "FAULT":
            if is_first and len(self.records) == 1:
                self.log.say(message(record))
            return
        if is_first and record["fault"] not in self.tracked:
            self.tracked.add(record["fault"])
            trackers.tell(trackers.summary_of(self.records, step, ""), is_finding=True)
        if callable(self.on_fault):
            try:
                self.on_fault(record)
            except BaseException as error:
                self.raised = error if isinstance(error, Exception) else None
                raise
        elif self.on_fault == "stop":
            raise GuardFault(message(record), record)
        elif is_first:
            self.log.say_fault(record)

    def end(self, step: int, failure: str, finished: bool) -> None:
        """Write the last record, and tell the trackers."""
        self.mark("end", lambda: {"steps": step, "finished": finished})
        if self.records and self.is_first:
            trackers.tell(trackers.summary_of(self.records, step, failure), is_finding=False)
