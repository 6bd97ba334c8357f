"""What one rank of a small job without a model does, for test_lost_ranks.py and test_stop_ranks.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from truestep import signals
from truestep.cli import main
from truestep.signals import Interrupted
from truestep.train.parallel import Ranks, join, leave
from truestep.train.step import NonFiniteError

FOREVER = 120.0  # seconds; longer than any test


def collective(ranks: Ranks) -> None:
    """A rank waits for the others in a collective at any time."""
    while True:
        ranks.sum([1.0])
        time.sleep(0.01)


def error(ranks: Ranks) -> None:
    """Rank 1 fails while the others wait for it."""
    if ranks.rank == 1:
        raise NonFiniteError("step 3: the loss is not finite")
    collective(ranks)


def same_error(ranks: Ranks) -> None:
    """All ranks fail for the same reason."""
    ranks.sum([1.0])
    raise NonFiniteError("step 3: the gradient is not finite")


def busy(ranks: Ranks) -> None:
    """One rank computes one large product and then in Python, for longer than a silent rank is waited for."""
    if ranks.rank == 1:
        began, large = time.monotonic(), torch.ones(2500, 2500, dtype=torch.float64)
        while time.monotonic() - began < 2.0:
            large @ large
        while time.monotonic() - began < 4.0:
            sum(range(100_000))
    ranks.barrier()
    ranks.sum([1.0])


def micro_batches(ranks: Ranks) -> None:
    """A collective in every micro-batch, in which no rank may be left. Almost always, two ranks have passed a stop
    point that the slow one has not."""
    done = 0
    try:
        while True:
            ranks.stop_point()
            ranks.sum([1.0])
            done += 1
            time.sleep(0.1 if ranks.rank == 1 else 0.0)
    except Interrupted:
        print(f"stopped after {done}", flush=True)
        raise


def rollout(ranks: Ranks) -> None:
    """Rank 0 has finished its samples, and the others take two minutes."""
    for step in range(2):
        ranks.stop_point()
        began = time.monotonic()
        with ranks.apart():
            while ranks.rank > 0 and step == 1 and time.monotonic() - began < FOREVER:
                signals.check()
                time.sleep(0.01)
        print(f"finished {step}", flush=True)


CASES: dict[str, Callable[[Ranks], None]] = {
    f.__name__: f for f in (collective, error, same_error, busy, micro_batches, rollout)
}


def run(case: str, folder: Path) -> int:
    """Be one rank to its end, and return the exit code. An error ends it as it ends the command line."""
    torch.set_num_threads(1)
    try:
        ranks = join()
        with signals.deferred():
            (folder / f"ready-{ranks.rank}").touch()
            CASES[case](ranks)
    except Interrupted as stop:
        leave()
        return 128 + stop.signum
    except Exception as failure:
        main._end_ranks(failure, *main._described(failure))
        raise
    leave()
    return 0
