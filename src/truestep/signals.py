"""Handles Ctrl-C and SIGTERM. After the first one, a run saves its state and stops at the next safe point. A
second one stops it at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
    """Raised by ``check`` between two pieces of work. ``signum`` is the signal that arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


_pending: list[int] = []
_elsewhere: list[int] = []  # signals that other ranks received; a first signal here is not a second one


def pending() -> int:
    """Return the signal that this process has received, or 0 if there is none."""
    return _pending[0] if _pending else 0


def ask(signum: int) -> None:
    """Request a stop because of a signal that another rank received."""
    _elsewhere.append(signum)


def check() -> None:
    """Raise Interrupted if a signal has arrived here or at another rank. Used between decoding steps,
    micro-batches and steps."""
    for arrived in (_pending, _elsewhere):
        if arrived:
            raise Interrupted(arrived[0])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Make the first SIGINT or SIGTERM only request a stop. The second one has its usual effect."""

    def note(signum: int, frame: FrameType | None) -> None:
        if _pending:
            signal.signal(signum, previous[signal.Signals(signum)])
            signal.raise_signal(signum)
        _pending.append(signum)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        _pending.clear()
        _elsewhere.clear()
