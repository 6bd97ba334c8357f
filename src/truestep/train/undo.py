"""A copy of the state before a step of several updates, so that a signal can stop it after its first update."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import Ranks

WORTH_SECONDS = 5.0  # a step whose later updates take less time is finished instead


@dataclass
class Undo:
    """Copies the state before every step whose updates after the first take long, if memory is left for it."""

    optimizers: Iterable[MasterOptimizer]
    ranks: Ranks
    seconds: float = 0.0  # what the updates after the first took in the last step, on the slowest rank
    _put_back: list[Callable[[], None]] = field(default_factory=list)

    def learn(self, seconds: float) -> None:
        """Note what a step's updates after the first took (a collective)."""
        self.seconds = self.ranks.max([seconds])[0]
        self._put_back = []

    def is_ready(self) -> bool:
        """Copy the state if that is worth it. Return whether there is a copy, the same on all ranks."""
        self._put_back = []
        if self.seconds < WORTH_SECONDS:
            return False
        size = sum(optimizer.num_bytes() for optimizer in self.optimizers)
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.ranks.max([float(2 * beside * size > free_memory_bytes())])[0]:
            return False
        self._put_back = [optimizer.copy_state() for optimizer in self.optimizers]
        return True

    def put_back(self) -> None:
        """Put the state before the interrupted step back. Without a copy, the step has changed nothing."""
        for put_back in self._put_back:
            put_back()


def free_memory_bytes() -> int:
    """Return how much memory the system can give, or 0 if it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
