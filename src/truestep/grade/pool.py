"""Symbolic comparisons in processes that can be killed. Each comparison has a deadline, new workers start
quickly, and no comparison is lost."""

from __future__ import annotations

import math
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from truestep.errors import UserError
from truestep.grade.equivalent import Decision
from truestep.grade.fork_server import ForkServer, Worker, WorkerDied
from truestep.grade.symbolic import OUT_OF_MEMORY, UNREADABLE
from truestep.signals import check

PATIENCE = 20.0  # the clock time of a comparison is limited to this multiple of its processor time
ATTEMPTS = 3  # for each comparison, if its workers end without having been killed here
TIMED_OUT = "symbolic comparison timed out"
NO_MEMORY = "symbolic comparison ran out of memory"


@dataclass(kw_only=True)
class _Job:
    number: int
    deadline: float
    attempt: int
    begun: float
    work: float  # processor seconds that the worker had used when the comparison began


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process so far; infinite if unknown, so that no more time is given."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Pool:
    """A pool of child processes that compare formulas. They are started when the first comparison is made."""

    def __init__(self, *, workers: int, seconds: float, memory_mb: int) -> None:
        self._num_workers, self.seconds, self._memory_mb = workers, seconds, memory_mb
        self._idle: list[Worker] = []
        self._server: ForkServer | None = None
        self._busy: dict[Worker, _Job] = {}

    @property
    def process_ids(self) -> list[int]:
        """The child processes that are alive; the one that forks the others is last."""
        alive = [worker.pid for worker in (*self._busy, *self._idle)]
        return [*alive, *([self._server.pid] if self._server else [])]

    def prepare(self) -> None:
        """Start importing the symbolic-algebra library in the background, unless that was already done."""
        self._server = self._server or ForkServer(self.seconds, self._memory_mb)

    def warm(self) -> None:
        """Prepare a worker, so that neither the next comparison nor one after a kill waits for an import."""
        self._idle.append(self._take())

    def close(self) -> None:
        for worker in (*self._busy, *self._idle):
            worker.end()
        if self._server is not None:
            self._server.close()
        self._busy, self._idle, self._server = {}, [], None

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[Decision]:
        """Return one outcome per (gold, answer) pair, in order. Each comparison takes at most ``seconds`` of
        processor time, so that the load of the machine does not change its verdict. If the process has a
        core to itself, it takes at most that much wall-clock time too."""
        self._outcomes: dict[int, Decision] = {}
        self._waiting = deque((number, 0) for number in range(len(pairs)))
        try:
            while self._waiting or self._busy:
                check()
                while self._waiting and len(self._busy) < self._num_workers:
                    number, attempt = self._waiting.popleft()
                    self._begin(number, attempt, *pairs[number])
                if self._busy:
                    self._collect()
        finally:
            for worker in list(self._busy):  # interrupted: a late reply must not be taken for the next one
                worker.end()
            self._busy.clear()
        lost = Decision(equal=None, reason="symbolic comparison was lost")
        return [self._outcomes.get(number, lost) for number in range(len(pairs))]

    def _begin(self, number: int, attempt: int, gold: str, found: str) -> None:
        worker = self._take()
        now, work = time.monotonic(), processor_seconds(worker.pid)
        deadline = now + self.seconds
        self._busy[worker] = _Job(number=number, deadline=deadline, attempt=attempt, begun=now, work=work)
        try:
            worker.send({"id": number, "gold": gold, "found": found})
        except WorkerDied:
            self._lose(worker)

    def _collect(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self._busy:
                selector.register(worker, selectors.EVENT_READ)
            soonest = min(job.deadline for job in self._busy.values())
            spoken = [key.fileobj for key, _ in selector.select(max(0.0, soonest - time.monotonic()))]
        for worker, job in list(self._busy.items()):
            if worker in spoken:
                self._hear(worker, job)
            elif time.monotonic() >= job.deadline and not self._extend(worker, job):
                self._drop(worker, TIMED_OUT)

    def _extend(self, worker: Worker, job: _Job) -> bool:
        """Give more time to a comparison that has not yet received its processor time."""
        left = self.seconds - (processor_seconds(worker.pid) - job.work)
        job.deadline += max(left, 0.05)  # it cannot use up its processor time in less clock time
        return left > 0.05 and job.deadline - job.begun <= PATIENCE * self.seconds

    def _hear(self, worker: Worker, job: _Job) -> None:
        try:
            replies = worker.receive()
        except WorkerDied:
            self._lose(worker)
            return
        for reply in replies:
            if reply["note"] == OUT_OF_MEMORY:
                self._drop(worker, NO_MEMORY)
            else:
                note, unreadable = reply["note"], reply["note"] == UNREADABLE
                self._outcomes[job.number] = Decision(
                    equal=reply["equal"], reason=note, unreadable=unreadable
                )
                del self._busy[worker]
                self._idle.append(worker)

    def _lose(self, worker: Worker) -> None:
        """Repeat the comparison of a worker that ended without having been killed here. After a timeout or
        the last attempt, record the comparison as undecided."""
        job = self._busy[worker]
        status = self._drop(worker)
        if status != -signal.SIGXCPU and job.attempt + 1 < ATTEMPTS:
            self._waiting.appendleft((job.number, job.attempt + 1))
            return
        crashed = f"symbolic comparison crashed (status {status})"
        reason = TIMED_OUT if status == -signal.SIGXCPU else crashed
        self._outcomes[job.number] = Decision(equal=None, reason=reason)

    def _drop(self, worker: Worker, reason: str = "") -> int | None:
        """End a worker. If ``reason`` is given, record its comparison as undecided for that reason."""
        job = self._busy.pop(worker)
        if reason:
            self._outcomes[job.number] = Decision(equal=None, reason=reason)
        return worker.end()

    def _take(self) -> Worker:
        """Return a warm worker, either an idle one or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_silent():
                return worker
            worker.end()
        reason = ""
        for _ in range(3):
            self.prepare()
            assert self._server is not None
            try:
                return self._server.start()
            except WorkerDied as death:
                reason = str(death)
                self._server.close()
                self._server = None
        hint = "run python -c 'import math_verify' to see why"
        raise UserError(f"the symbolic grader cannot be started ({reason}); {hint}")
