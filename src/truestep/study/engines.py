"""What starts the child processes of a study: threads of this process (local), or a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truestep import rundir
from truestep.errors import UserError
from truestep.study.plan import Study
from truestep.study.processes import LOST, Order, environment, start, terminate_children
from truestep.study.resources import Share

Launch = Callable[[Order], tuple[int, str]]  # → exit code, last line on stderr

SHARED = "shared"  # a file of the study directory, by which a node shows that it sees this directory
SEEN_SECONDS = 15.0  # a network file system may show a new file this late
NODE_SECONDS = 300.0  # for the answer of a node, which may be starting its first worker


@dataclass(frozen=True, kw_only=True)
class Engine:
    """``gpus`` are the names of the GPUs that the study assigns to its cells, or None if the engine does that.
    ``stop`` passes a signal on to the children that do not receive it from the terminal. ``check`` raises
    UserError if cells could not run with this study directory."""

    launch: Launch
    gpus: tuple[str, ...] | None
    stop: Callable[[int], None]
    check: Callable[[Path], None] = lambda folder: None


def engine(name: str, study: Study, say: Callable[[str], None]) -> Engine:
    """Return an engine. Raises UserError if this machine has fewer GPUs than a cell needs."""
    check_engine(name, study)
    return ray(study, say) if name == "ray" else local(study, say)


def check_engine(name: str, study: Study) -> None:
    """Raise UserError if the engine does not exist, or a cell needs more GPUs than this machine has."""
    if name not in ("local", "ray"):
        raise UserError(f"--engine {name} is not an engine; pass local or ray")
    if name == "ray":
        return
    from truestep.device import visible_gpus

    num = len(visible_gpus())
    most, stage = max((share.gpus, stage) for stage, share in shares(study).items())
    if most > num:
        raise UserError(
            f"resources.gpus: a cell that runs {stage or 'the base model'} needs {most} GPUs, but this machine has "
            f"{num}; reduce resources.gpus, or pass --engine ray with a cluster that has them"
        )


def shares(study: Study) -> dict[str, Share]:
    """Return what the cells use, by the stage that they run. "" is the evaluation of the base model."""
    used = {stage for arm in study.arms for stage in arm.stages}
    found = {stage: study.resources.of(stage) for stage in ("", *sorted(used))}
    return {**found, "base": study.resources.of("base")} if study.base and "base" not in used else found


def local(study: Study, say: Callable[[str], None]) -> Engine:
    from truestep.device import visible_gpus

    check_engine("local", study)
    gpus = visible_gpus()
    if gpus and not any(share.gpus for share in shares(study).values()):
        say(f"the study uses none of this machine's {len(gpus)} GPUs; to use them, set resources.gpus = 1")

    def stop(signum: int) -> None:
        from signal import SIGTERM

        if signum == SIGTERM:  # a terminal sends Ctrl-C to the child processes too
            terminate_children()

    return Engine(launch=start, gpus=gpus, stop=stop)


def ray(study: Study, say: Callable[[str], None]) -> Engine:
    """Return an engine that starts the child processes as tasks of Ray, which wait for processors and GPUs. All
    nodes must share the study directory."""
    try:
        import ray as cluster
    except ModuleNotFoundError:
        raise UserError('--engine ray needs the ray package; run pip install "truestep[ray]"') from None
    every = shares(study)
    if not cluster.is_initialized():
        address: Any = os.environ.get("RAY_ADDRESS")
        processors = study.workers * max(share.ranks for share in every.values())
        mine: dict[str, Any] = {
            "num_cpus": processors, "include_dashboard": False, "object_store_memory": 10**8,
        }  # fmt: skip
        paths = {"env_vars": {"PYTHONPATH": environment(os.environ)["PYTHONPATH"]}}
        cluster.init(address=address, log_to_driver=False, runtime_env=paths, **({} if address else mine))
    for stage, share in every.items():
        if not _fitting(cluster, share):
            say(
                f"no node of the Ray cluster has {share.ranks} processors and {share.gpus} GPUs; cells that run "
                f"{stage or 'the base model'} wait until there is one (or reduce [resources])"
            )
    tasks = _Tasks(cluster)
    return Engine(launch=tasks.launch, gpus=None, stop=lambda signum: tasks.cancel(),
                  check=functools.partial(check_nodes, cluster, every))  # fmt: skip


class _Tasks:
    """Cells that run as tasks of Ray. A task whose worker or node dies is lost; Ray does not start it again,
    because then nothing would be said and counted."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._remote = cluster.remote(max_retries=0)(on_worker)
        self._references: set[Any] = set()
        self._lock = threading.Lock()

    def launch(self, order: Order) -> tuple[int, str]:
        errors = self._cluster.exceptions
        mark = _mark_of(Path(order.study))
        task = self._remote.options(num_cpus=order.ranks, num_gpus=order.gpus, name=order.run)
        try:
            reference = task.remote(order, mark)
            with self._lock:
                self._references.add(reference)
            code, words = self._cluster.get(reference)
            return int(code), str(words)
        except errors.TaskCancelledError:
            return 130, "cancelled"
        except (errors.RayTaskError, errors.RuntimeEnvSetupError, errors.TaskUnschedulableError) as error:
            return 1, _one_line(error)
        except errors.RayError as error:
            return LOST, f"its Ray worker or node has ended ({_one_line(error)})"
        finally:
            with self._lock:
                self._references.discard(reference)

    def cancel(self) -> None:
        """Tell every task once to save its work and end. Processes of a cluster do not receive Ctrl-C."""
        with self._lock:
            running, self._references = self._references, set()
        for reference in running:
            self._cluster.cancel(reference, force=False)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return f"{type(error).__name__}: {last}"[:250]


def on_worker(order: Order, mark: str) -> tuple[int, str]:
    """Run a child process on the node of a Ray worker, with the GPUs that Ray has assigned to the task."""
    import ray as cluster

    if fault := unseen(order.study, mark):
        return 2, fault
    return start(replace(order, devices=tuple(str(name) for name in cluster.get_gpu_ids())))


def _mark_of(study: Path) -> str:
    with contextlib.suppress(OSError):
        return (study / SHARED).read_text(encoding="utf-8")
    return ""


def unseen(study: str, mark: str, seconds: float = SEEN_SECONDS) -> str:
    """Return "" if this node sees the study directory with this mark in it, otherwise what to do."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            os.listdir(study)  # makes a network file system look again
        if _mark_of(Path(study)) == mark:
            return ""
        if time.monotonic() > end:
            return (
                f"node {platform.node()} does not see the study directory {study}; pass --out with a folder on a file "
                "system that all nodes share (the same path on each), or pass --engine local"
            )
        time.sleep(0.2)


def check_nodes(cluster: Any, every: dict[str, Share], folder: Path) -> None:
    """Raise UserError if a node that cells may run on does not see the study directory or cannot import this
    package. Writes a new mark into the directory."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    study, mark = str(folder.resolve()), uuid.uuid4().hex
    rundir.write_atomic(folder / SHARED, mark)
    look = cluster.remote(num_cpus=0, max_retries=0)(unseen)
    nodes = {node["NodeID"]: node for share in every.values() for node in _fitting(cluster, share)}
    asked = {}
    for number in nodes:
        here = NodeAffinitySchedulingStrategy(node_id=number, soft=False)
        asked[number] = look.options(scheduling_strategy=here).remote(study, mark)
    for number, reference in asked.items():
        where = f"{nodes[number]['NodeManagerHostname']} ({nodes[number]['NodeManagerAddress']})"
        try:
            fault = cluster.get(reference, timeout=NODE_SECONDS)
        except cluster.exceptions.RayError as error:
            raise UserError(
                f"node {where} cannot run a cell: {_one_line(error)}; install the same version of truestep there, or "
                "remove the node from the cluster"
            ) from None
        if fault:
            raise UserError(f"{fault} (its address is {nodes[number]['NodeManagerAddress']})")


def _fitting(cluster: Any, share: Share) -> list[Any]:
    """Return the nodes of the cluster that have enough processors and GPUs for a cell."""
    return [
        node
        for node in cluster.nodes()
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= share.ranks
        and node["Resources"].get("GPU", 0) >= share.gpus
    ]
