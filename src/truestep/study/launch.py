"""One cell is one child process, ``truestep run``, on one thread; who starts it changes nothing in it.

The children are forked from one process that has imported everything: importing takes as long as a sixth of a
small cell. A lock file is held by the child itself, so a study that was killed and started again waits for a
child that is still at work instead of writing beside it.
"""

from __future__ import annotations

import fcntl
import functools
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from truestep.errors import UserError

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
ONE_THREAD |= {"OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """A recipe to be run to its end. All paths are seen from ``study``, the study directory."""

    study: str
    recipe: str
    run: str

    @property
    def arguments(self) -> list[str]:
        return ["run", self.recipe, "--out", self.run, "--resume"]


Launch = Callable[[Order], tuple[int, str]]  # → exit code, last words on stderr


IMPORTED = [
    "truestep.cli.run", "truestep.cli.progress", "truestep.pipeline.run", "truestep.report.html",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "torch.distributed.tensor", "matplotlib.backends.backend_svg", "matplotlib.figure",
]  # fmt: skip
ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _forks() -> ForkServerContext:
    """The server that children are forked from; started once, on one thread, with this package's path."""
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
    """Run the child, after whoever still works in its folder."""
    study = Path(order.study)
    log = study / f"{order.run}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with ONE_AT_A_TIME:
        process = _forks().Process(target=_child, args=(order,))
        try:
            process.start()
        except EOFError:  # Ctrl-C while it was still importing
            return 130, "the process that cells are forked from has ended"
    # An exit code can be read once, and starting a process reads those of all that have ended.
    connection.wait([process.sentinel])
    with ONE_AT_A_TIME:
        process.join()
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return process.exitcode or 0, said[-1] if said else ""


def _child(order: Order) -> None:
    """``python -m truestep run`` in the study directory, with its words in the log."""
    os.chdir(order.study)
    lock = os.open(f"{order.run}.lock", os.O_CREAT | os.O_RDWR, 0o644)  # held to the end of this process
    fcntl.flock(lock, fcntl.LOCK_EX)
    log = os.open(f"{order.run}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDWR)
    for mine, theirs in ((nothing, 0), (nothing, 1), (log, 2)):
        os.dup2(mine, theirs)
    sys.argv = ["truestep", *order.arguments]
    runpy.run_module("truestep", run_name="__main__")


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """This process's environment on one thread, and the same package wherever the child's folder is."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *[os.path.abspath(p) for p in inherited.get("PYTHONPATH", "").split(os.pathsep) if p]]
    return {**inherited, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def ray(workers: int) -> Launch:
    """The same children, started by Ray with one processor each; all nodes must share the study directory."""
    try:
        import ray as cluster
    except ModuleNotFoundError:
        raise UserError('--engine ray needs the package ray: pip install "truestep[ray]"') from None
    if not cluster.is_initialized():
        address: Any = os.environ.get("RAY_ADDRESS")
        here = environment(os.environ)["PYTHONPATH"]
        mine: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 10**8}
        paths = {"env_vars": {"PYTHONPATH": here}}
        cluster.init(address=address, log_to_driver=False, runtime_env=paths, **({} if address else mine))
    remote = cluster.remote(num_cpus=1, max_retries=0)(start)
    return lambda order: cluster.get(remote.remote(order))


def engine(name: str, workers: int) -> Launch:
    if name not in ("local", "ray"):
        raise UserError(f"--engine {name}: is not an engine: pass local or ray")
    return ray(workers) if name == "ray" else start
