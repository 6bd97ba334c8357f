"""The worker processes of one reward function, with the code to start, call, monitor and kill them.

A batch that fails as a whole (an exception, a timeout, too much memory, a dead worker) is repeated sample by
sample, so that one sample does not make the others fail. A wrong number of values is a fault of the function, and
its batch is not repeated."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.records import RewardInput
from truestep.redaction import from_environment, redact
from truestep.reward_settings import RewardSettings
from truestep.rewards.record import Answer, to_json
from truestep.user_code import Source

POLL_SECONDS = 0.1  # between two measurements of a worker's memory
START_SECONDS = 600.0  # seconds to load a function and its state
RETRY_TIME = 3.0  # in units of timeout_seconds: the time for all samples of a failed batch together
MIN_SAMPLES = 20  # a share of fewer samples is noise, so steps are counted together until there are this many
OUTPUT_TAIL = 4000  # characters of a worker's output that are shown after a failure
PAGE = os.sysconf("SC_PAGE_SIZE")


class WorkerFailed(Exception):
    """Error for a worker that gave no reply and was killed."""


def processes(root: int) -> dict[int, int]:
    """Return the resident bytes of a worker and of each process that it has started, by process id; empty
    without /proc. Shared pages count for each process."""
    found: dict[int, tuple[int, int, int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X"):
                    found[int(name)] = (int(fields[1]), int(fields[3]), int(fields[21]))
    family = {pid for pid, (_, session, _) in found.items() if root in (pid, session)}
    while more := {pid for pid, (parent, _, _) in found.items() if parent in family} - family:
        family |= more
    return {pid: found[pid][2] * PAGE for pid in family}


class Worker:
    """One child process that has loaded a function."""

    def __init__(self, setup: dict[str, Any], memory_mb: int) -> None:
        self._memory_mb, self._said, self._printed = memory_mb, b"", b""
        self._channel, far_end = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with far_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "truestep.rewards.worker", str(far_end.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=(far_end.fileno(),),
                start_new_session=True,  # one signal ends all its children too; Ctrl-C is for the parent
            )  # fmt: skip
        assert self.process.stdout is not None
        self._output = self.process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._selector.register(self._output, selectors.EVENT_READ)
        self._send(setup, START_SECONDS)

    def loaded(self) -> Answer:
        """Wait until the function is loaded. Returns a failed Answer if it cannot be loaded."""
        found = self._receive(START_SECONDS)
        return self.failed(**found) if found["failed"] else Answer(**found)

    def ask(self, samples: Sequence[RewardInput], seconds: float) -> list[Answer] | Answer:
        """Return one Answer for each sample, or a failed Answer for the batch. Raises WorkerFailed."""
        self._printed = b""
        self._send(samples, seconds)
        reply = self._receive(seconds)
        if not isinstance(reply, list):
            return self.failed(**reply)
        return [Answer(**a | {k: redact(a[k]) for k in ("reason", "detail") if a.get(k)}) for a in reply]

    def failed(self, *, reason: str, detail: str = "", fault: bool = False, **_: Any) -> Answer:
        """Return a failed Answer that also shows what the function printed last."""
        printed = redact(self._printed.decode("utf-8", "replace").strip())[-OUTPUT_TAIL:]
        detail += f"\nThe function printed:\n{printed}" if printed else ""
        return Answer(reason=redact(reason), failed=True, detail=redact(detail.strip()), fault=fault)

    def _send(self, request: Any, seconds: float) -> None:
        self._channel.settimeout(seconds)
        with contextlib.suppress(OSError):  # the worker ended or does not read, which _receive reports
            self._channel.sendall(to_json(request))

    def _receive(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            ready = {key.fileobj for key, _ in self._selector.select(max(0.0, min(left, POLL_SECONDS)))}
            if self._output in ready:
                self._read_output()
            if self._channel in ready:
                try:
                    chunk = self._channel.recv(1 << 20)
                except OSError:
                    chunk = b""
                self._said += chunk
                if chunk.endswith(b"\n"):
                    line, self._said = self._said, b""
                    self._watch_memory()
                    try:
                        return json.loads(line)
                    except ValueError:
                        raise WorkerFailed("the function wrote to the worker's own channel") from None
                if not chunk:
                    raise self._ended()
            elif self.process.poll() is not None:
                raise self._ended()
            elif left <= 0:
                raise WorkerFailed(f"the worker took longer than timeout_seconds = {seconds:g}")
            elif not ready:
                self._watch_memory()

    def _read_output(self) -> None:
        chunk = os.read(self._output.fileno(), 1 << 16)
        self._printed = (self._printed + chunk)[-2 * OUTPUT_TAIL :]  # half a secret would not be found
        if not chunk:
            self._selector.unregister(self._output)

    def _watch_memory(self) -> None:
        resident = sum(processes(self.process.pid).values()) >> 20
        if resident > self._memory_mb:
            raise WorkerFailed(f"the worker used {resident} MB, more than memory_mb = {self._memory_mb}")

    def _ended(self) -> WorkerFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        while self._output in {key.fileobj for key, _ in self._selector.select(0)}:
            self._read_output()
        status = self.process.returncode
        how = "closed its channel" if status is None else f"ended with exit status {status}"
        if status is not None and status < 0:
            how = f"was ended by signal {-status} ({signal.strsignal(-status)})"
        return WorkerFailed(f"the worker process {how}")

    def kill(self) -> None:
        """Kill the worker and every process that it has started, and wait until they have ended."""
        for _ in range(50):
            family = processes(self.process.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the only way without /proc
                os.killpg(self.process.pid, signal.SIGKILL)
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            if not family:
                return
            time.sleep(0.01)

    def end(self) -> None:
        self.kill()
        for thing in (self._selector, self._channel, self._output):
            thing.close()


def row_of(sample: RewardInput) -> str:
    """Return the file and line of a sample's problem, or its id."""
    return sample.problem.row or sample.problem.id


class FunctionPool:
    """All workers of one reward function, for use from one thread."""

    def __init__(self, entry: RewardSettings, source: Source, *, base: Path, folder: Path) -> None:
        self.entry, self._idle, self._all, self._closed = entry, list[Worker](), set[Worker](), False
        from_environment(entry.options, f'reward "{entry.name}": options')  # an unset variable is found here
        self._setup = {
            "source": asdict(source), "options": entry.options, "path": [*sys.path, str(base.resolve())],
            "folder": str(folder.resolve()),
        }  # fmt: skip
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers=entry.workers)
        self._step, self._samples, self._passed = -1, 0, 0
        self._failures = list[
            tuple[str, Answer]
        ]()  # each with the row of its problem, if one sample caused it

    def start(self) -> None:
        """Load the function once, before anything is sampled. Raises UserError if that fails."""
        self._idle.append(self._take())

    def rehearse(self, trials: Sequence[RewardInput]) -> None:
        """Call the function on one sample after the other until it returns. Raises UserError with the first failure if
        it fails on all, unless all samples of a run may fail, too."""
        failures = list[Answer]()
        for trial in trials:
            reply = self._ask([trial])
            found = reply[0] if isinstance(reply, list) else reply
            if not found.failed:
                return
            failures.append(found)
        if failures and self.entry.max_failure_share < 1:
            tried = f"failed on a trial with {row_of(trials[0])}, before anything was sampled"
            remedy = "correct it, or return None for a completion that it cannot score"
            first = failures[0]
            raise UserError(
                f'reward "{self.entry.name}" {tried}: {first.reason}; {remedy}\n{first.detail}'.rstrip()
            )

    def close(self) -> None:
        self._closed = True
        for worker in list(self._all):
            worker.kill()  # this ends the threads that wait for the worker
        self._threads.shutdown(cancel_futures=True)
        for worker in list(self._all):
            self._drop(worker)

    def submit(self, samples: Sequence[RewardInput]) -> list[concurrent.futures.Future[list[Answer]]]:
        """Start scoring and return one future for each batch, in order."""
        if samples and samples[0].step != self._step and self._samples >= MIN_SAMPLES:
            self._samples, self._passed, self._failures = 0, 0, []
        self._step = samples[0].step if samples else self._step
        self._samples += len(samples)
        size = max(1, min(self.entry.batch_size, -(-len(samples) // self.entry.workers)))
        batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        return [self._threads.submit(self._batch, batch) for batch in batches]

    def check_failures(self) -> None:
        """Raise UserError with the first failure's traceback if more than ``max_failure_share`` failed."""
        allowed = self.entry.max_failure_share * self._samples + 1e-9
        if self._samples >= MIN_SAMPLES and len(self._failures) > allowed:
            (row, first), num = self._failures[0], len(self._failures)
            at = f" ({row})" if row else ""
            share = f"max_failure_share = {self.entry.max_failure_share:g}"
            bad = f"{num} of {self._samples} samples"
            told = f"{bad} (step {self._step + 1})"
            if not self._passed:  # the retry of a batch has ended early
                told = f"every sample that was tried ({bad}, step {self._step + 1})"
            raise UserError(
                f'reward "{self.entry.name}" failed on {told}, more than {share}, so the run stops; '
                f"the first failure{at}: {first.reason}\n{first.detail}".rstrip()
            )

    def _batch(self, samples: Sequence[RewardInput]) -> list[Answer]:
        reply = self._ask(samples)
        if isinstance(reply, list):
            failures = [(row_of(s), a) for s, a in zip(samples, reply, strict=True) if a.failed]
            self._failures += failures
            self._passed += len(reply) - len(failures)
            return reply
        if len(samples) == 1 or reply.fault:
            self._failures += [("" if reply.fault else row_of(samples[0]), reply)] * len(samples)
            return [reply] * len(samples)
        answers, until = list[Answer](), time.monotonic() + RETRY_TIME * self.entry.timeout_seconds
        for number, sample in enumerate(samples):
            self.check_failures()
            if time.monotonic() > until:
                rest = [replace(reply, reason=f"its batch failed: {reply.reason}")] * (len(samples) - number)
                self._failures += [("", one) for one in rest]
                return answers + rest
            answers += self._batch([sample])
        return answers

    def _ask(self, samples: Sequence[RewardInput]) -> list[Answer] | Answer:
        worker = self._take()
        try:
            reply = worker.ask(samples, self.entry.timeout_seconds)
        except WorkerFailed as fault:
            self._drop(worker)
            return worker.failed(reason=str(fault))
        self._idle.append(worker)
        return reply

    def _take(self) -> Worker:
        while self._idle and not self._closed:
            if (worker := self._idle.pop()).process.poll() is None:
                return worker
            self._drop(worker)
        worker = Worker(self._setup, self.entry.memory_mb)
        self._all.add(worker)
        try:
            if self._closed:
                raise WorkerFailed("the pool was closed")
            fault = worker.loaded()
        except WorkerFailed as death:
            fault = worker.failed(reason=str(death))
        if not fault.failed:
            return worker
        self._drop(worker)
        reason = f"{fault.reason}\n{fault.detail}".strip()
        raise UserError(f'reward "{self.entry.name}" cannot be loaded: {reason}')

    def _drop(self, worker: Worker) -> None:
        self._all.discard(worker)
        worker.end()
