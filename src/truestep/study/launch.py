"""One cell is one child process, ``python -m truestep run``, on one thread; who starts it changes nothing in it.

A lock file is held by the child itself (it inherits the descriptor), so a study that was killed and started again
waits for a child that is still at work instead of writing beside it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.settings import SettingsError

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """A recipe to be run to its end. All paths are seen from ``study``, the study directory."""

    study: str
    recipe: str
    run: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "truestep", "run", self.recipe, "--out", self.run, "--resume"]


Launch = Callable[[Order], tuple[int, str]]  # → exit code, last words on stderr


def start(order: Order) -> tuple[int, str]:
    """Run the child, after whoever still works in its folder."""
    study = Path(order.study)
    log = study / f"{order.run}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (study / f"{order.run}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with log.open("wb") as words:
            done = subprocess.run(
                order.command, cwd=study, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words,
                env=environment(os.environ), pass_fds=(lock.fileno(),), check=False,
            )  # fmt: skip
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return done.returncode, said[-1] if said else ""


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """This process's environment on one thread, and the same package wherever the child's folder is."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *[os.path.abspath(p) for p in inherited.get("PYTHONPATH", "").split(os.pathsep) if p]]
    return {**inherited, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def local(workers: int) -> Launch:
    del workers  # the runner starts no more at once
    return start


def ray(workers: int) -> Launch:
    """The same children, started by Ray's workers, one processor each; all nodes must share the study directory."""
    try:
        import ray as cluster
    except ModuleNotFoundError:
        raise SettingsError('--engine ray needs the package ray: pip install "truestep[ray]"') from None
    if not cluster.is_initialized():
        address: Any = os.environ.get("RAY_ADDRESS")
        here = environment(os.environ)["PYTHONPATH"]
        mine: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 10**8}
        cluster.init(
            address=address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
            **({} if address else mine),
        )
    remote = cluster.remote(num_cpus=1, max_retries=0)(start)
    return lambda order: cluster.get(remote.remote(order))


ENGINES: dict[str, Callable[[int], Launch]] = {"local": local, "ray": ray}


def engine(name: str, workers: int) -> Launch:
    if name not in ENGINES:
        raise SettingsError(f"--engine {name}: there are {', '.join(ENGINES)}")
    return ENGINES[name](workers)
