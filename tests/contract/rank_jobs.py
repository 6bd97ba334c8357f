"""The ranks of one job as processes, which a test can signal, and what they said."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
HERE = Path(__file__).parent


@functools.cache
def _zygote() -> subprocess.Popen[str]:
    """It ends with this process, at the end of its stdin."""
    command = [sys.executable, str(HERE / "rank_zygote.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _asked(request: dict[str, Any]) -> Any:
    zygote = _zygote()
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    return json.loads(zygote.stdout.readline())


@dataclass
class Ended:
    """The exit codes and outputs of the ranks, and the seconds since the signal (or since the start)."""

    codes: list[int]
    outputs: list[str]
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Every line of any rank that reports an error, or would belong to a traceback."""
        lines = [line for output in self.outputs for line in output.splitlines()]
        return [line for line in lines if line.startswith(("error:", "Traceback", "RuntimeError"))]


class Job:
    """Ranks started without torchrun: a command of truestep, or a case of rank_worker.py in ``folder``."""

    def __init__(
        self, words: Sequence[str], folder: Path, *, world_size: int = 2, silence: float = 30.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(world_size), "TRUESTEP_RANK_SILENCE": str(silence),
        }  # fmt: skip
        self.folder, self.logs = folder, [folder / f"{rank}.log" for rank in range(world_size)]
        self.began = time.monotonic()
        request = {"words": list(words), "logs": [str(p) for p in self.logs], "env": environment}
        self.pids: list[int] = _asked(request)
        self.codes: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self._running():
            time.sleep(0.01)

    def _running(self) -> list[int]:
        asked = [pid for pid in self.pids if pid not in self.codes]
        codes = _asked({"poll": asked})
        self.codes |= {pid: code for pid, code in zip(asked, codes, strict=True) if code is not None}
        return [pid for pid in asked if pid not in self.codes]

    def outputs(self) -> list[str]:
        return [path.read_text(errors="replace") if path.exists() else "" for path in self.logs]

    def ready(self) -> bool:
        """Whether all ranks of a worker's job are at work."""
        return all((self.folder / f"ready-{rank}").exists() for rank in range(len(self.pids)))

    def wait_for(self, ready: Callable[[], bool], seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, self.outputs()
            assert len(self._running()) == len(self.pids), (self.codes, self.outputs())
            time.sleep(0.02)

    def signal(self, name: str, *ranks: int) -> None:
        self.began = time.monotonic()
        for rank in ranks:
            os.kill(self.pids[rank], SIGNALS[name])

    def end(self, seconds: float) -> Ended:
        """Wait until all ranks have ended by themselves."""
        deadline = time.monotonic() + seconds
        while self._running():
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.02)
        took = time.monotonic() - self.began
        return Ended([self.codes[pid] for pid in self.pids], self.outputs(), took)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
