"""The progress protocol of every long piece of work; ``cli.progress`` writes it to stderr."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    def say(self, text: str) -> None:
        """One line of information."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A piece of work of ``total`` units starts; ``done`` of them are already finished."""

    def advance(self, done: int, note: str = "") -> None:
        """``done`` units of it are finished."""
