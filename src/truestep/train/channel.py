"""What ranks tell each other outside of the collectives: that they live, where to stop, and small values.

Every rank has a thread with a connection to rank 0, the hub. Both ends send a beat every second.

    lost     a connection ends without a word, or is silent for ``limit`` seconds: every rank's process is ended
             by its thread, because the main thread may wait in a collective for the lost rank
    failed   a rank has an error: it alone reports it, and the other ranks' processes are ended
    stop     a rank was signalled: the hub asks how many stop points every rank has passed, and all of them go
             on to the largest of these numbers, where they raise Interrupted. No collective is left half joined
    gather   values that wait for the slowest rank without a time limit, unlike a collective

A thread beats during long kernels and system calls, which release Python's global lock. Held by:
tests/contract/test_lost_ranks.py, tests/contract/test_stop_ranks.py"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from truestep import signals
from truestep.signals import Interrupted
from truestep.train.members import Member, end_stopped
from truestep.train.wire import Wire

TICK, BEAT = 0.2, 1.0  # seconds between two looks, and between two beats
LIMIT = 30.0  # seconds of silence after which a rank is lost
LINGER = 0.5  # seconds for the word of a rank whose connection has ended, or for a signal that ends all ranks
FLUSH = 1.0  # seconds for the other ranks to read why the run ends
LOST_CODE = 5


@dataclass
class _Peer:
    """The far end of a connection. ``silence`` counts only seconds in which this process ran itself."""

    wire: Wire
    silence: float = 0.0
    gone_at: float | None = None
    has_left: bool = False


@dataclass(frozen=True, kw_only=True)
class End:
    """Why the run ends: the error of a rank, or, if ``is_lost``, that a rank is lost."""

    rank: int
    text: str
    code: int
    is_lost: bool = False


@dataclass
class _Hub:
    """What rank 0 knows of all ranks."""

    values: dict[int, dict[int, Any]] = field(default_factory=lambda: defaultdict(dict))
    passed: dict[int, int] = field(default_factory=dict)
    signum: int = 0
    failures: list[tuple[bool, float, End]] = field(
        default_factory=list
    )  # (follows another fault, when, end)


class Channel:
    """One rank's connection with the others. ``speak`` prints the one line about a lost rank, and ``advice``
    says how to go on. Only the lowest remaining rank of a machine speaks."""

    def __init__(self, members: Sequence[Member], rank: int, wires: Mapping[int, Wire], limit: float) -> None:
        self.members, self.rank, self.limit = tuple(members), rank, limit
        self.speak: Callable[[str], None] = print_error
        self.advice: Callable[[], str] = lambda: "start the run again with --resume"
        self._peers = {other: _Peer(wire) for other, wire in wires.items()}
        self._hub = _Hub()
        self._changed = threading.Condition()
        self._results: dict[int, list[Any]] = {}
        self._gathers = self._points = 0  # how many of each this rank has reached
        self._stop_signal = self._last_point = -1
        self._end: End | None = None
        self._told = self._closing = False
        self._next_beat = 0.0
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        for peer in self._peers.values():
            self._selector.register(peer.wire, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="truestep-ranks", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------- called by the main thread

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value in rank order, however long the slowest rank takes. Sent as JSON."""
        with self._changed:
            self._gathers += 1
            number = self._gathers
            self._tell_hub({"k": "value", "n": number, "value": value})
            while number not in self._results:
                self._changed.wait(TICK)
            return self._results.pop(number)

    def stop_point(self) -> None:
        """Raise Interrupted if the ranks have agreed to stop here. All ranks pass the same stop points."""
        with self._changed:
            while self._stop_signal >= 0 and self._last_point < 0:
                self._changed.wait(TICK)
            if self._stop_signal >= 0 and self._points >= self._last_point:
                raise Interrupted(self._stop_signal)
            self._points += 1

    def failed(self, text: str, code: int, *, follows: bool) -> None:
        """Tell the other ranks of this rank's error, which ends them. Returns if this rank is to report it.
        ``follows`` means that the error may be the consequence of a lost rank, which is then waited for."""
        with self._changed:
            end = End(rank=self.rank, text=text, code=code)
            self._tell_hub({"k": "failed", "end": asdict(end), "follows": follows})
            deadline = time.monotonic() + (self.limit + 10.0 if follows else 10.0)
            while self._end is None and time.monotonic() < deadline:
                self._changed.wait(TICK)  # the thread ends this process if another rank's end came first

    def close(self) -> None:
        """Leave together with all other ranks."""
        self.gather(None)
        with self._changed:
            self._closing = True
            for peer in self._peers.values():
                peer.wire.put({"k": "bye"})
        self._wake_up()
        self._thread.join(5.0)

    # ------------------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            for peer in self._peers.values():
                if peer.gone_at is None:
                    wanted = selectors.EVENT_WRITE if peer.wire.waiting else 0
                    self._selector.modify(peer.wire, selectors.EVENT_READ | wanted)
            ready = self._selector.select(TICK)
            with self._changed:
                if self._woken in [key.fileobj for key, _ in ready]:
                    self._woken.recv(1 << 12)
                now = time.monotonic()
                # A process that was stopped itself, or could not run, has not heard anything either.
                elapsed, before = min(now - before, 2 * TICK), now
                self._exchange(now, elapsed)
                if self._closing and self._has_closed():
                    return
                if self._end is None and not self._closing and (end := self._judged(now)):
                    self._conclude(end)

    def _exchange(self, now: float, elapsed: float) -> None:
        """Read and write what can be, beat, and pass a signal on."""
        if now >= self._next_beat:
            self._next_beat = now + BEAT
            for peer in self._peers.values():
                peer.wire.put({"k": "beat"})
        if not self._told and (signum := signals.pending()):
            self._told = True
            self._tell_hub({"k": "signal", "signum": signum})
        for rank, peer in self._peers.items():
            peer.silence += elapsed
            if peer.gone_at is None:
                self._read(rank, peer, now)
                peer.wire.write()

    def _read(self, rank: int, peer: _Peer, now: float) -> None:
        values, is_closed = peer.wire.read()
        if is_closed:
            peer.gone_at = now
            self._selector.unregister(peer.wire)
        for value in values:
            peer.silence = 0.0
            if value["k"] == "bye":
                peer.has_left = True
            elif self.rank == 0:
                self._hear_as_hub(rank, value)
            else:
                self._hear(value)

    def _tell_hub(self, value: dict[str, Any]) -> None:
        if self.rank == 0:
            self._hear_as_hub(0, value)
        else:
            self._peers[0].wire.put(value)
        self._wake_up()

    def _tell_all(self, value: dict[str, Any]) -> None:
        for peer in self._peers.values():
            peer.wire.put(value)
        self._hear(value)

    def _wake_up(self) -> None:
        if threading.current_thread() is not self._thread:
            with contextlib.suppress(BlockingIOError):  # it has been woken often enough
                self._wake.send(b".")

    def _hear_as_hub(self, rank: int, value: dict[str, Any]) -> None:
        hub, number = self._hub, len(self.members)
        if value["k"] == "value":
            found = hub.values[value["n"]]
            found[rank] = value["value"]
            if len(found) == number:
                del hub.values[value["n"]]
                values = [found[other] for other in range(number)]
                self._tell_all({"k": "values", "n": value["n"], "values": values})
        elif value["k"] == "signal" and not hub.signum:
            hub.signum = value["signum"]
            self._tell_all({"k": "stop", "signum": hub.signum})
        elif value["k"] == "passed":
            hub.passed[rank] = value["n"]
            if len(hub.passed) == number:
                self._tell_all({"k": "last", "n": max(hub.passed.values())})
        elif value["k"] == "failed":
            hub.failures.append((value["follows"], time.monotonic(), End(**value["end"])))

    def _hear(self, value: dict[str, Any]) -> None:
        if value["k"] == "values":
            self._results[value["n"]] = value["values"]
        elif value["k"] == "stop":
            self._stop_signal = value["signum"]
            signals.ask(self._stop_signal)
            self._tell_hub({"k": "passed", "n": self._points})
        elif value["k"] == "last":
            self._last_point = value["n"]
        elif value["k"] == "end":
            self._ended(End(**value["end"]))
        self._changed.notify_all()

    # ------------------------------------------------------------------------------------------ how a run ends

    def _judged(self, now: float) -> End | None:
        """Return why the run ends. An error comes before a loss, unless it may follow from one."""
        own = [end for follows, _, end in self._hub.failures if not follows]
        lost = self._lost(now)
        late = [end for _, when, end in self._hub.failures if now - when > self.limit + 5.0]
        return next(iter(own), None) or lost or next(iter(late), None)

    def _lost(self, now: float) -> End | None:
        for rank, peer in self._peers.items():
            has_ended = peer.gone_at is not None
            if peer.has_left or (has_ended and now - (peer.gone_at or 0.0) < LINGER):
                continue
            if has_ended or peer.silence > self.limit:
                what = (
                    f"{self.members[rank]} has not answered for {self.limit:.0f} s (stopped, hung or cut off)"
                )
                if has_ended:
                    what = f"{self.members[rank]} has ended without an error (killed, perhaps for its memory)"
                return End(rank=rank, text=what, code=LOST_CODE, is_lost=True)
        return None

    def _conclude(self, end: End) -> None:
        """Tell the others, if this is the hub, and end."""
        for peer in self._peers.values() if self.rank == 0 else ():
            peer.wire.put({"k": "end", "end": asdict(end)})
        deadline = time.monotonic() + FLUSH
        while self.rank == 0 and time.monotonic() < deadline:
            for peer in self._peers.values():
                peer.wire.write()
                # An end that is closed before it was read may be lost.
                peer.gone_at = peer.gone_at or (time.monotonic() if peer.wire.read()[1] else None)
            if all(peer.gone_at for rank, peer in self._peers.items() if rank != end.rank):
                break
            time.sleep(0.01)
        self._ended(end)

    def _ended(self, end: End) -> None:
        self._end = end
        self._changed.notify_all()
        if end.rank == self.rank and not end.is_lost:
            return  # the main thread reports it
        here = self.members[self.rank]
        beside = [
            m.rank for m in self.members if m.host == here.host and (m.rank != end.rank or not end.is_lost)
        ]
        speaker = end.rank if end.rank in beside else min(beside, default=-1)
        if self.rank == speaker:
            self.speak(
                f"{end.text}; {self.advice()}" if end.is_lost else f"{self.members[end.rank]}: {end.text}"
            )
        if end.is_lost:
            end_stopped(self.members[end.rank], here)
        leave_now(end.code)

    def _has_closed(self) -> bool:
        """Return whether nothing is left to send, and, on the hub, all others have left."""
        peers = self._peers.values()
        is_sent = not any(p.wire.waiting for p in peers if p.gone_at is None)
        return is_sent and (self.rank != 0 or all(p.has_left or p.gone_at for p in peers))


def print_error(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")


def leave_now(code: int) -> None:
    """End this process, whatever its main thread is doing."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
