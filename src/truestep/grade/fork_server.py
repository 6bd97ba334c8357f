"""Child processes for symbolic algebra. They are forked from a process that has already imported it, so that
each starts in milliseconds."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from truestep.errors import UserError

START_SECONDS = 300.0  # seconds to import the algebra on a busy machine


class WorkerDied(Exception):
    """Error for a child process that ended on its own, or was ended by another process."""


class Worker:
    """One process that compares formulas, and what it has sent so far."""

    def __init__(self, pid: int, channel: socket.socket, server: ForkServer) -> None:
        self.pid = pid
        self._channel, self._server, self._said = channel, server, b""

    def fileno(self) -> int:
        return self._channel.fileno()

    def is_silent(self) -> bool:
        """Return whether the worker has sent nothing and has not ended. This is true of an idle worker that
        is alive."""
        return not select.select([self], [], [], 0)[0]

    def send(self, request: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(request).encode("ascii") + b"\n")
        except OSError:
            raise WorkerDied("its channel is closed") from None

    def receive(self) -> list[dict[str, Any]]:
        """Return the complete replies received so far. Raises WorkerDied at the end of the channel."""
        try:
            chunk = self._channel.recv(1 << 16)
        except OSError:
            chunk = b""
        if not chunk:
            raise WorkerDied("it ended")
        *lines, self._said = (self._said + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int | None:
        """Kill the worker if it is alive, and wait for it to end. Returns its exit status, or minus the
        signal that ended it; None if the fork server, the only process that knows the status, ended first."""
        self._channel.close()
        try:
            os.kill(self.pid, signal.SIGKILL)  # the process id is not reused before the fork server reaps it
            return int(self._server.ask({"reap": self.pid})["status"])
        except (OSError, WorkerDied):
            return None


class ForkServer:
    """The process that has imported the algebra and forks workers on request. It compares nothing."""

    def __init__(self, seconds: float, memory_mb: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self._control, far_end = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        self._asked, self._said, self._ready = 0, b"", False
        with far_end:
            limits = map(str, (far_end.fileno(), seconds, memory_mb))
            silent: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            self._process = subprocess.Popen(
                # -P: a file called sympy.py in the working directory is not imported
                [sys.executable, "-P", "-B", "-m", "truestep.grade.symbolic", *limits],
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=(far_end.fileno(),),
                start_new_session=True,  # Ctrl-C is for the parent, which then closes the pool
                **silent,
            )
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Wait until the algebra is imported. This does not count towards the time of a comparison."""
        while not self._ready:
            reply = self._hear()
            if "missing" in reply:
                needed = f'the checker "math" needs the {reply["missing"]} package'
                raise UserError(f'{needed}; run pip install "truestep[train]"')
            self._ready = "ready" in reply

    def start(self) -> Worker:
        """Start and return a new worker. Raises WorkerDied if the fork server has ended."""
        self.wait_ready()
        near_end, far_end = socket.socketpair()
        try:
            with far_end:
                pid = self.ask({"start": True}, far_end.fileno())["pid"]
        except BaseException:
            near_end.close()
            raise
        return Worker(pid, near_end, self)

    def ask(self, request: dict[str, Any], *descriptors: int) -> dict[str, Any]:
        """Return the reply to a request. A reply to an earlier, interrupted request is skipped."""
        self._asked += 1
        line = json.dumps({"id": self._asked, **request}).encode() + b"\n"
        try:
            socket.send_fds(self._control, [line], descriptors)
        except OSError:
            raise WorkerDied("its channel is closed") from None
        while True:
            reply = self._hear()
            if reply.get("id") == self._asked:
                return reply

    def _hear(self) -> dict[str, Any]:
        while b"\n" not in self._said:
            try:
                chunk = self._control.recv(1 << 12)
            except TimeoutError:
                raise WorkerDied(f"it did not answer within {START_SECONDS:.0f} s") from None
            except OSError:
                chunk = b""
            if not chunk:
                raise WorkerDied(f"ended with status {self._process.wait()}")
            self._said += chunk
        line, _, self._said = self._said.partition(b"\n")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the fork server; its workers must be ended first."""
        self._control.close()
        self._process.kill()
        self._process.wait()
