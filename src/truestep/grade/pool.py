"""Algebra in processes that can be killed: a deadline on the wall clock, a warm spare, and no comparison ever lost."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from truestep.grade.symbolic import OUT_OF_MEMORY
from truestep.settings import SettingsError

ATTEMPTS = 3  # at one comparison, when workers end that nobody here has killed
START_SECONDS = 300.0  # to import the algebra, on a machine that is busy
TIMED_OUT = "symbolic comparison timed out"
NO_MEMORY = "symbolic comparison ran out of memory"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``equal`` is None where there is no verdict; then ``reason`` says why."""

    equal: bool | None
    reason: str


class WorkerDied(Exception):
    """A child process ended on its own, or was ended by somebody else."""


class Worker:
    """One child process and what it has said so far."""

    def __init__(self, seconds: float, memory_mb: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self.process = subprocess.Popen(
            # -P: a file called sympy.py in the working directory is not imported
            [sys.executable, "-P", "-m", "truestep.grade.symbolic", str(seconds), str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent, which then closes the pool
        )
        self._said = b""
        self._ready = False

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def wait_ready(self) -> None:
        """Wait until the algebra is imported; not counted into any comparison's time."""
        deadline = time.monotonic() + START_SECONDS
        while not self._ready:
            with selectors.DefaultSelector() as selector:
                selector.register(self, selectors.EVENT_READ)
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerDied(f"did not start in {START_SECONDS:.0f} s")
            for reply in self.receive():
                if "missing" in reply:
                    raise SettingsError(
                        f'the checker "math" needs the package {reply["missing"]}: write pip install "truestep[train]"'
                    )
                self._ready = "ready" in reply

    def send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerDied("its pipe is closed") from None

    def receive(self) -> list[dict[str, Any]]:
        """The whole replies that have come; raises WorkerDied at the end of the pipe."""
        chunk = os.read(self.fileno(), 1 << 16)
        if not chunk:
            raise WorkerDied(f"ended with status {self.process.wait()}")
        *lines, self._said = (self._said + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was left to flush has no reader any more


@dataclass(kw_only=True)
class _Job:
    number: int
    deadline: float
    attempt: int
    begun: float
    work: float  # processor seconds of the worker when it began


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far; infinite where the system does not tell, so that nobody waits for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Pool:
    """Runs comparisons on ``workers`` child processes. Nothing is started before the first comparison."""

    def __init__(self, *, workers: int, seconds: float, memory_mb: int, patience: float = 1.0) -> None:
        self._num_workers, self._seconds, self._memory_mb = workers, seconds, memory_mb
        self._patience = patience
        self._idle: list[Worker] = []
        self._spare: Worker | None = None
        self._busy: dict[Worker, _Job] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """The child processes that are alive, the spare one last."""
        alive = [*self._busy, *self._idle, *([self._spare] if self._spare else [])]
        return [worker.process.pid for worker in alive]

    def warm(self) -> None:
        """Have a worker and the spare one ready: the next comparison, and one after a kill, wait for no start."""
        if not self._idle:
            self._idle.append(self._take())
        if self._spare is not None:
            self._spare.wait_ready()

    def close(self) -> None:
        for worker in [*self._busy, *self._idle, *([self._spare] if self._spare else [])]:
            worker.kill()
        self._busy, self._idle, self._spare = {}, [], None

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """One outcome per (gold, answer), in order; each takes at most ``seconds`` on the wall clock, or ``patience``
        times as long where the machine has given the process less than half of that time."""
        outcomes: list[Outcome | None] = [None] * len(pairs)
        waiting = deque((number, 0) for number in range(len(pairs)))
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self._num_workers:
                    self._begin(*waiting.popleft(), pairs, outcomes, waiting)
                self._collect(outcomes, waiting)
        finally:
            for worker in list(self._busy):  # interrupted: a late reply must not meet the next question
                worker.kill()
            self._busy.clear()
        return [outcome or Outcome(equal=None, reason="symbolic comparison was lost") for outcome in outcomes]

    def _begin(
        self,
        number: int,
        attempt: int,
        pairs: Sequence[tuple[str, str]],
        outcomes: list[Outcome | None],
        waiting: deque[tuple[int, int]],
    ) -> None:
        worker = self._take()
        gold, found = pairs[number]
        now, work = time.monotonic(), processor_seconds(worker.process.pid)
        self._busy[worker] = _Job(number=number, deadline=now + self._seconds, attempt=attempt, begun=now, work=work)
        try:
            worker.send({"id": number, "gold": gold, "found": found})
        except WorkerDied:
            self._lose(worker, outcomes, waiting)

    def _collect(self, outcomes: list[Outcome | None], waiting: deque[tuple[int, int]]) -> None:
        if not self._busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in self._busy:
                selector.register(worker, selectors.EVENT_READ)
            soonest = min(job.deadline for job in self._busy.values())
            spoken = [key.fileobj for key, _ in selector.select(max(0.0, soonest - time.monotonic()))]
        for worker, job in list(self._busy.items()):
            if worker in spoken:
                self._hear(worker, job, outcomes, waiting)
            elif time.monotonic() >= job.deadline and not self._extend(worker, job):
                outcomes[job.number] = Outcome(equal=None, reason=TIMED_OUT)
                self._drop(worker)

    def _extend(self, worker: Worker, job: _Job) -> bool:
        """More time for a comparison that the machine has not let work."""
        worked = processor_seconds(worker.process.pid) - job.work
        job.deadline += self._seconds / 2
        return worked < self._seconds / 2 and job.deadline - job.begun <= self._patience * self._seconds

    def _hear(self, worker: Worker, job: _Job, outcomes: list[Outcome | None], waiting: deque[tuple[int, int]]) -> None:
        try:
            replies = worker.receive()
        except WorkerDied:
            self._lose(worker, outcomes, waiting)
            return
        for reply in replies:
            if reply["note"] == OUT_OF_MEMORY:
                outcomes[job.number] = Outcome(equal=None, reason=NO_MEMORY)
                self._drop(worker)
            else:
                outcomes[job.number] = Outcome(equal=reply["equal"], reason=reply["note"])
                del self._busy[worker]
                self._idle.append(worker)

    def _lose(self, worker: Worker, outcomes: list[Outcome | None], waiting: deque[tuple[int, int]]) -> None:
        """A worker ended that nobody here has killed: its question is asked again, of another worker."""
        job = self._busy[worker]
        status = worker.process.wait()
        self._drop(worker)
        if status == -signal.SIGXCPU:
            outcomes[job.number] = Outcome(equal=None, reason=TIMED_OUT)
        elif job.attempt + 1 < ATTEMPTS:
            waiting.appendleft((job.number, job.attempt + 1))
        else:
            outcomes[job.number] = Outcome(equal=None, reason=f"symbolic comparison crashed (status {status})")

    def _drop(self, worker: Worker) -> None:
        del self._busy[worker]
        worker.kill()

    def _take(self) -> Worker:
        """A warm worker: an idle one, the spare, or a new one; a new spare starts behind it."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.kill()
        reason = ""
        for _ in range(3):
            worker, self._spare = self._spare or self._start(), None
            try:
                worker.wait_ready()
            except WorkerDied as death:
                worker.kill()
                reason = str(death)
                continue
            except BaseException:
                worker.kill()
                raise
            self._spare = self._start()
            return worker
        raise SettingsError(
            f"the symbolic grader cannot be started ({reason}): run python -m truestep.grade.symbolic 1 384"
        )

    def _start(self) -> Worker:
        return Worker(self._seconds, self._memory_mb)
