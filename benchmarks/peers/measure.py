"""What every contestant's script shares: its specification, its clock, and the line that it reports.

Each contestant is a separate process: ``python SCRIPT SPECIFICATION.json``. The last line of its stdout that
starts with ``{"figures"`` is its result. truestep is not imported here, because this file is also used in the
peers' environments.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def specification() -> dict[str, Any]:
    """Return what to run (sizes, model folder, dtype, threads), with the workload of all contestants."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return {**spec, **json.loads(Path(spec["workload"]).read_text(encoding="utf-8"))}


class StepClock:
    """Seconds and real tokens of every step; a step ends when the next begins, so no time is lost between
    them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.marks = [time.perf_counter()]
        self.tokens = [0]

    def count(self, tokens: int) -> None:
        self.tokens[-1] += tokens

    def end_step(self) -> int:
        """Close the current step; return how many are closed."""
        self.marks.append(time.perf_counter())
        self.tokens.append(0)
        return len(self.marks) - 1

    def figures(self, warmup: int) -> dict[str, Any]:
        seconds = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        tokens = self.tokens[: len(seconds)]
        measured = seconds[warmup:]
        return {
            "tokens_per_second": sum(tokens[warmup:]) / sum(measured),
            "seconds_per_step": sum(measured) / len(measured),
            "step_seconds": seconds,
            "step_tokens": tokens,
            "warmup_steps": warmup,
        }


def generation_figures(lengths: Sequence[int], seconds: float) -> dict[str, Any]:
    """Return the generated tokens per second, up to and including the stop token."""
    return {
        "tokens_per_second": sum(lengths) / seconds,
        "seconds": seconds,
        "generated_tokens": sum(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
    }


def num_generated(ids: Sequence[int], stops: Sequence[int]) -> int:
    """Return the number of tokens up to and including the first stop token."""
    return next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))


def text_parity(text: str) -> float:
    """Return a reward that costs nothing and varies within a group: 1 for an even number of characters."""
    return float(len(text) % 2 == 0)


def report(figures: dict[str, Any], *packages: str) -> None:
    """Print the result line: figures, peak resident memory, load, and the versions that made them."""
    line = {
        "figures": {**figures, "peak_rss_bytes": peak_rss_bytes()},
        "load_average": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    sys.stdout.flush()
    print("\n" + json.dumps(line), flush=True)


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process (not of the parent that it was forked from)."""
    status = Path("/proc/self/status")
    if status.exists():
        for row in status.read_text().splitlines():
            if row.startswith("VmHWM:"):
                return int(row.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
