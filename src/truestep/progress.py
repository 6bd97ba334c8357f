"""The protocol by which long-running work reports its progress; ``cli.progress`` writes it to stderr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Measured:
    """A note with a measurement, such as a validation loss, which is shown also if others are left out."""

    text: str

    def __str__(self) -> str:
        return self.text


Note = str | Measured


class Reporter(Protocol):
    def say(self, text: str) -> None:
        """Report one line of information."""

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None:
        """Start a piece of work of ``total`` units, of which ``done`` are already finished. With ``head``, its notes
        are the rows of a table under these headings."""

    def advance(self, done: int, note: Note = "") -> None:
        """Report that ``done`` units of the current work are finished."""
