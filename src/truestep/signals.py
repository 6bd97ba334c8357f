"""Handles Ctrl-C and SIGTERM. After the first one, a run saves its state and stops at the next safe point. A
second one stops it at once, but keeps the last finished step. A third one has its usual effect."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(Exception):
    """Raised by ``check`` between two pieces of work. ``signum`` is the signal that arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


_pending: list[int] = []
_elsewhere: list[int] = []  # signals that other ranks received; a first signal here is not a second one
_second: list[int] = []
_is_held = False


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


def hold() -> None:
    """Make a second signal wait for ``release``, because the state in between could not be saved."""
    global _is_held
    _is_held = True


def release() -> None:
    """Let a second signal interrupt the work again. Raises Interrupted if one has arrived since ``hold``."""
    global _is_held
    _is_held = False
    if _second:
        raise Interrupted(_second.pop())


@contextlib.contextmanager
def deferred(place: Callable[[], str] = lambda: "", *, is_alone: bool = True) -> Iterator[None]:
    """Make the first SIGINT or SIGTERM only request a stop, and answer it at once with where the work is
    (``place``). The second one raises Interrupted wherever the process is, unless the state is held; if the process
    is not alone, it has its usual effect, because other ranks wait for this one. So has the third."""

    def note(signum: int, frame: FrameType | None) -> None:
        if not _pending:
            _pending.append(signum)
            if where := place():
                _answer(f"{signal.Signals(signum).name}: stopping {where} and saving; again to stop now")
        elif is_alone and len(_pending) == 1:
            _pending.append(signum)
            if not _is_held:
                raise Interrupted(signum)
            _second.append(signum)
            _answer("stopping as soon as this step is kept")
        else:
            signal.signal(signum, previous[signal.Signals(signum)])
            signal.raise_signal(signum)

    global _is_held
    _is_held = False  # a step that was made outside of a stage leaves it held
    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
        for arrived in (_pending, _elsewhere, _second):
            arrived.clear()


def _answer(text: str) -> None:
    """Write a line to stderr. Its buffer may be in use, so the line is written without it."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
