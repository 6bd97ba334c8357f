"""The child process of a cell: ``truestep run`` in the study directory, as one process or as several ranks.

It is forked from a process that has imported everything, because importing takes a sixth of a small cell's
time. The child holds a lock file, so that a study that is killed and started again waits for the child to end.
"""

from __future__ import annotations

import fcntl
import functools
import multiprocessing
import os
import platform
import re
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
ONE_THREAD |= {"OMP_WAIT_POLICY": "passive"}
# How long ranks have to save their work after a signal, and to write their report.
STOP = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
LOST_RANK = 5  # the exit code of a rank that has lost another one (train/channel.py)
LOST = -1000  # stands for the exit code of a process whose node has gone
_SIGNALS = {s.value for s in signal.Signals} - {signal.SIGINT.value}
_TORCHRUN_LOG = re.compile(r"[DIWEF]\d{4} \d\d:\d\d")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request to run a recipe to its end. The paths are relative to ``study``, the study directory. ``gpus``
    is the number of GPUs; ``devices`` are their names, or None if they are not known yet. ``code`` is the folder
    in which the recipe's modules (PACKAGE.MODULE:NAME) are."""

    study: str
    recipe: str
    run: str
    ranks: int = 1
    gpus: int = 0
    devices: tuple[str, ...] | None = None
    code: str = ""


IMPORTED = [
    "truestep.cli.run", "truestep.cli.progress", "truestep.pipeline.run", "truestep.report.html",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "torch.distributed.tensor", "matplotlib.backends.backend_svg", "matplotlib.figure",
]  # fmt: skip
ONE_AT_A_TIME = threading.Lock()
_RUNNING: set[Any] = set()  # processes that have not been told to end


@functools.cache
def _forks() -> ForkServerContext:
    """Return the server that forks child processes. It is started once, with ``environment``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    mine = dict(os.environ)
    os.environ.update(environment(mine))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(mine)
    return context


def start(order: Order) -> tuple[int, str]:
    """Run a child process to its end. Return its exit code and the last line that it wrote on stderr.

    The exit code is negative, or 128 + its number, if a signal ended the process. The process first waits for
    any other process that is working in its folder. KeyboardInterrupt, which only a main thread receives, is
    passed on as SIGTERM, so that the child saves its work."""
    log = Path(order.study) / f"{order.run}.log"
    with ONE_AT_A_TIME:
        process = _forks().Process(target=_child, args=(order,))
        try:
            process.start()
        except EOFError:  # Ctrl-C while it was still importing
            return 130, "the process that cells are forked from has ended"
        _RUNNING.add(process)
    # An exit code can be read only once, and starting a process reads the exit codes of all ended processes.
    _wait(process)
    with ONE_AT_A_TIME:
        process.join()
        _RUNNING.discard(process)
    # A process that is told to end while it starts has no log yet.
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return process.exitcode or 0, _last_words(said)


def _wait(process: Any) -> None:
    try:
        while not connection.wait([process.sentinel], 0.5):
            pass  # Ray's KeyboardInterrupt does not end a call that waits
    except KeyboardInterrupt:
        process.terminate()
        connection.wait([process.sentinel])


def _last_words(said: Sequence[str]) -> str:
    """Return the last line of a log that is not from torchrun, which ends with a long summary of its own."""
    lines = [line.strip() for line in said if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    own = [line for line in lines if not _TORCHRUN_LOG.match(line)]
    return (errors or own or [""])[-1]


def was_killed(code: int) -> bool:
    """Return whether a process was ended from outside and can continue: by a signal (SIGKILL if the memory is
    used up, SIGTERM if a node goes away) or with its node. Ctrl-C and errors in the work do not count."""
    return code == LOST or (-code if code < 0 else code - 128) in _SIGNALS


def how_it_ended(code: int) -> str:
    if code == LOST or not was_killed(code):
        return "lost" if code == LOST else f"exit code {code}"
    return f"killed by {signal.Signals(-code if code < 0 else code - 128).name}"


def terminate_children() -> None:
    """Send SIGTERM once to every child process that runs, so that it saves its work and ends."""
    with ONE_AT_A_TIME:
        for process in _RUNNING:
            process.terminate()
        _RUNNING.clear()


def _child(order: Order) -> None:
    """Do what ``python -m truestep run`` does, in the study directory. Messages go to the log."""
    os.environ.update(environment(os.environ))  # the program may have had a fork server before
    os.chdir(order.study)
    _hold(f"{order.run}.lock")
    if order.code:
        sys.path.append(order.code)
        paths = [os.environ["PYTHONPATH"], order.code]  # for ranks and rewards
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if order.devices is not None:
        from truestep.device import use_only_gpus

        use_only_gpus(order.devices)
        for name in sorted(order.devices):  # a child of a study that was killed may still use it
            _hold(f"gpu-{platform.node()}-{name.replace('/', '-')}.lock")
    log = os.open(f"{order.run}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDWR)
    for mine, theirs in ((nothing, 0), (nothing, 1), (log, 2)):
        os.dup2(mine, theirs)
    words = ["run", order.recipe, "--out", order.run, "--resume"]
    if order.ranks > 1:
        _torchrun(order, words)
        return
    sys.argv = ["truestep", *words]
    runpy.run_module("truestep", run_name="__main__")


def _hold(path: str) -> int:
    """Wait for the lock on a file, and hold it to the end of this process."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _torchrun(order: Order, words: Sequence[str]) -> None:
    """Do what ``torchrun --standalone --nproc_per_node RANKS -m truestep run`` does, but end with the exit code
    of the ranks, which torchrun does not pass on. A signal to this process goes to every rank once."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    lock = f"{order.run}.ranks.lock"
    os.close(_hold(lock))  # waits for ranks whose parent was killed
    for name, value in STOP.items():
        os.environ.setdefault(name, value)
    mine = ["-m", "truestep.study.rank", str(os.getpid()), lock]
    given = ["--standalone", "--nproc_per_node", str(order.ranks), *mine, *words]
    try:
        torchrun.run(torchrun.parse_args(given))
    except ChildFailedError as error:
        raise SystemExit(code_of_ranks([f.exitcode for f in error.failures.values()])) from None
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None


def code_of_ranks(codes: Sequence[int]) -> int:
    """Return the exit code of a cell from those of its ranks that did not end well.

    If one rank ends, the others end because of it: with the exit code of a lost rank, with 1 (before they had
    all joined), or by SIGTERM from torchrun. So an error that truestep has reported comes first, then a signal,
    then any other code."""
    killed = [128 - code for code in codes if code < 0 and -code != signal.SIGTERM]
    reported = [code for code in codes if 1 < code < 128 and not (killed and code == LOST_RANK)]
    return [*reported, *killed, *[code for code in codes if code > 0], 128 + signal.SIGTERM][0]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process, with one thread and the path of this package."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *[os.path.abspath(p) for p in inherited.get("PYTHONPATH", "").split(os.pathsep) if p]]
    return {**inherited, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
