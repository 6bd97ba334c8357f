"""A command of python as the ranks of one job, which a test can signal, and what they said."""

from __future__ import annotations

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
from typing import Self

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}


@dataclass
class Ended:
    """The exit codes and outputs of the ranks, and the seconds since the signal."""

    codes: list[int]
    outputs: list[str]
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Every line of any rank that reports an error, or would belong to a traceback."""
        lines = [line for output in self.outputs for line in output.splitlines()]
        return [line for line in lines if line.startswith(("error:", "Traceback", "RuntimeError"))]


class Job:
    """Ranks started by hand. ``log`` is a file that grows while the job is at work."""

    def __init__(
        self, words: Sequence[str], folder: Path, *, world_size: int = 2, silence: float = 30.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", "TRUESTEP_RANK_SILENCE": str(silence),
        }  # fmt: skip
        self.processes, self.paths, self.began = [], [folder / f"{r}.log" for r in range(world_size)], 0.0
        for rank, path in enumerate(self.paths):
            with path.open("wb") as out:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, rank: int) -> str:
        return self.paths[rank].read_text(errors="replace")

    def wait_for(self, ready: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, [self.output(r)[-2000:] for r in range(len(self.paths))]
            assert all(p.poll() is None for p in self.processes), [
                self.output(r)[-2000:] for r in range(len(self.paths))
            ]
            time.sleep(0.02)

    def signal(self, name: str, *ranks: int) -> None:
        self.began = time.monotonic()
        for rank in ranks:
            self.processes[rank].send_signal(SIGNALS[name])

    def end(self, seconds: float) -> Ended:
        """Wait until all ranks have ended by themselves."""
        deadline = time.monotonic() + seconds
        try:
            codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError([self.output(r)[-3000:] for r in range(len(self.paths))]) from None
        took = time.monotonic() - self.began
        return Ended(codes, [self.output(r) for r in range(len(self.paths))], took)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_in(run: Path, stage: str) -> list[int]:
    """The steps that a stage has logged."""
    text = (run / "stages" / stage / "metrics.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]
