"""Ctrl-C and SIGTERM: ask once, stop between two pieces of work with everything saved; ask twice, stop at
once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
    """Raised by ``check`` at a point where nothing is half done. ``signum`` says which signal asked."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


_pending: list[int] = []


def pending() -> int:
    """The signal that has asked to stop, 0 if none."""
    return _pending[0] if _pending else 0


def check() -> None:
    """Raise Interrupted if a signal has arrived. Called between decoding steps, micro-batches and optimizer
    steps."""
    if _pending:
        raise Interrupted(_pending[0])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While active the first SIGINT or SIGTERM only asks; the second acts as it would have."""
    handled = (signal.SIGINT, signal.SIGTERM)

    def ask(signum: int, frame: FrameType | None) -> None:
        if _pending:
            signal.signal(signum, previous[signal.Signals(signum)])
            signal.raise_signal(signum)
        _pending.append(signum)

    previous = {s: signal.getsignal(s) for s in handled}
    for s in handled:
        signal.signal(s, ask)
    try:
        yield
    finally:
        for s in handled:
            signal.signal(s, previous[s])
        _pending.clear()
