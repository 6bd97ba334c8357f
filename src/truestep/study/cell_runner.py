"""Makes the parts of a study, each only once: its runs and its pinned base. Reuses earlier results.

A task is requested by name, and the first thread that requests it does it. A run requests the run that it
starts from. Most threads wait; at most ``workers`` of them have a child process. All state is in files: a run
is done if cells/KEY/cell.json exists. Each run is a child process, which is started again if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truestep import rundir, signals
from truestep.data.files import is_local, local_files, sources_of
from truestep.errors import UserError
from truestep.model.packaged import PACKAGED
from truestep.pipeline.code import code_of, with_absolute_code
from truestep.settings import DataSettings, Settings, load_settings, settings_hash, table_of
from truestep.study import cell_results
from truestep.study.engines import Launch
from truestep.study.plan import BASE_MODEL, Study, cell_settings
from truestep.study.processes import LOST, Order, how_it_ended, was_killed
from truestep.study.resources import Places, Share


class CellFailed(RuntimeError):
    """Raised if a cell's process ends with an error. The study continues without the cell."""


@dataclass(kw_only=True)
class Runner:
    """The state of one call of ``truestep study``. ``results`` is a folder of earlier cells, or None. ``gpus``
    and ``stop`` are those of the engine."""

    study: Study
    where: Path  # the study file
    out: Path
    launch: Launch
    workers: int
    results: Path | None = None
    say: Callable[[str], None] = print
    gpus: tuple[str, ...] | None = None
    stop: Callable[[int], None] = lambda signum: None
    failures: dict[str, str] = field(default_factory=dict)
    # Set after a signal, with its number; then no more child processes are started.
    stopped: threading.Event = field(default_factory=threading.Event)
    signum: int = 0
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    _made: dict[str, Future[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _places: Places = field(init=False)

    def __post_init__(self) -> None:
        self._places = Places(self.workers, self.gpus)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of a task, which only the first caller computes."""
        with self._lock:
            future, first = self._made.get(name), name not in self._made
            if future is None:
                future = self._made[name] = Future()
        if first:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()


def result(runner: Runner, settings: Settings, arm: str) -> dict[str, Any]:
    """Return the compact result of these settings, from the folder of earlier results or by running them."""
    key, name = key_of(runner, settings), cell_results.cell_name(arm, settings.seed)
    for folder in (runner.results / "cells", runner.results / "trials") if runner.results else ():
        with contextlib.suppress(OSError, ValueError):  # a file that cannot be read is not a result
            old = rundir.read_json(folder / f"{name}.json")
            if isinstance(old, dict) and old.get("key") == key:
                return old
    return {**node(runner, settings, arm), "arm": arm}  # two arms with the same settings share one run


def node(runner: Runner, settings: Settings, arm: str) -> dict[str, Any]:
    """Run these settings once, in a folder named after their identity, and return the compact result."""
    key = key_of(runner, settings)
    return dict(runner.once(f"node {key}", lambda: _node(runner, settings, arm, key)))


def key_of(runner: Runner, settings: Settings) -> str:
    """Return a cell's identity: a hash of its settings, its other inputs and the recipe's own code."""
    code = [code_of(stage, runner.where.parent) for stage in settings.stages]
    given = given_identity(runner)
    given = settings_hash(given, str(code)) if any(code) else given
    kinds = runner.study.resources.kinds([stage.name for stage in settings.stages])
    return cell_results.cell_key(settings, settings_hash(given, str(kinds)) if kinds else given)


def _node(runner: Runner, settings: Settings, arm: str, key: str) -> dict[str, Any]:
    home = runner.out / "cells" / key
    done = home / "cell.json"
    if done.exists():
        try:
            return dict(rundir.read_json(done))
        except UserError as error:
            runner.say(f"{error.args[0].partition(';')[0]}; it is made again from the run")
    parent = _parent(runner, settings)
    if runner.study.base:
        runner.once("base", lambda: _base(runner))
    share = runner.study.resources.of(settings.stages[-1].name if settings.stages else "")
    with runner._places.take(share.gpus) as devices:
        if parent is not None:
            made = runner.out / "cells" / key_of(runner, parent) / "run"
            adopt(made, home / "run", len(parent.stages), settings)
        # named after its key, because it depends on chance which of the arms that share it comes first
        named = settings.model_copy(update={"name": f"{runner.study.name}-{key}", "group": runner.study.name})
        absolute = with_absolute_paths(named, runner.where.parent)
        rundir.write_atomic(home / "recipe.toml", rundir.to_toml(table_of(absolute)))
        name = cell_results.cell_name(arm, settings.seed)
        rundir.write_atomic(home / "name", name + "\n")
        child(runner, _order(runner, f"cells/{key}", share, devices), name)
        cell = cell_results.compact(home / "run", arm=arm, seed=settings.seed, key=key)
        rundir.write_json(done, cell)
    return cell


def _order(runner: Runner, folder: str, share: Share, devices: tuple[str, ...] | None) -> Order:
    """Return the request to run FOLDER/recipe.toml in FOLDER/run."""
    named = runner.where.parent / (runner.study.base if folder == "base" else "study.toml")
    return Order(study=str(runner.out.resolve()), recipe=f"{folder}/recipe.toml", run=f"{folder}/run",
                 ranks=share.ranks, gpus=share.gpus, devices=devices, code=str(named.parent.resolve()))  # fmt: skip


def child(runner: Runner, order: Order, name: str) -> None:
    """Run a child process. If it is killed, start it again where it stopped. Raises CellFailed if it fails, or
    if it is killed more than ``retries`` times."""
    for again in range(runner.study.retries + 1):
        if runner.stopped.is_set():
            raise CellFailed(f"{order.run}: not started")
        code, words = runner.launch(order)
        if code == 0:
            return
        ended = how_it_ended(code)
        full = f"{ended}, {rundir.redact(words)[:300]}".removesuffix(", ")
        if not was_killed(code) or runner.stopped.is_set() or signals.pending():
            break
        if again < runner.study.retries:
            count = f"{again + 1} of {runner.study.retries}"
            why = full if code == LOST else ended
            runner.say(f"{name}: {why}; it is started again where it stopped ({count})")
        elif again:
            full = f"{full}; it was started again {again} times"
    raise CellFailed(f"{order.run}: {full}")


def _parent(runner: Runner, settings: Settings) -> Settings | None:
    """Return the settings of the run that this one continues (all stages but the last), after running it."""
    if not settings.stages:
        return None
    before = settings.model_copy(update={"stages": settings.stages[:-1]})
    node(runner, before, "shared." + ("-".join(stage.name for stage in before.stages) or "start"))
    return before


def with_absolute_paths(settings: Settings, base_dir: Path) -> Settings:
    """Make paths of data, model and code absolute. They are relative to the study file or current folder."""
    data, model = dict(settings.data), settings.model
    for name, one in settings.data.items():
        if paths := [str(path.resolve()) for path in local_sources(name, one, base_dir)]:
            data[name] = one.model_copy(update={"source": paths[0] if len(paths) == 1 else tuple(paths)})
    if path := local_model(model.path, base_dir):
        model = model.model_copy(update={"path": str(path.resolve())})
    return with_absolute_code(settings, base_dir).model_copy(update={"data": data, "model": model})


def local_sources(name: str, data: DataSettings, base_dir: Path) -> list[Path]:
    """Return the files or folders of a data set, or [] if the data is generated or comes from a hub."""
    if not is_local(sources_of(data)[0]):
        return []
    sources = local_files(name, data, base_dir)
    return [p for path, used, _ in sources for p in ([path] if path.exists() else used)]


def local_model(path: str, base_dir: Path) -> Path | None:
    """Return the folder or file that ``path`` names in ``load_settings``; None for a model that ships with
    truestep, the base or a hub id."""
    if path in (BASE_MODEL, "tiny", *PACKAGED):
        return None
    beside = [base_dir / path] if "/" in path or path.endswith(".gguf") else []
    found = next((p for p in (*beside, Path(path)) if p.exists()), None)
    return rundir.model_of(found) if found and (found / "resolved.toml").is_file() else found


def adopt(parent: Path, run: Path, num_stages: int, settings: Settings) -> None:
    """Copy the stages and evaluations of a parent run to a run. ``truestep run`` checks their identities."""
    if not (run / "resolved.toml").exists():
        rundir.write_atomic(run / "resolved.toml", rundir.to_toml(table_of(settings)))
    names = [s.name for s in settings.stages[:num_stages]]
    stages = [parent / "stages" / f"{i + 1:02d}-{name}" for i, name in enumerate(names)]
    for folder in (*stages, *(parent / "evaluations" / name for name in ("base", *names))):
        target = run / folder.relative_to(parent)
        if folder.exists() and not target.exists():
            aside = target.with_name(f".{target.name}{rundir.UNFINISHED[0]}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            left_out = shutil.ignore_patterns("checkpoints", "best")
            shutil.copytree(folder, aside, copy_function=_link, ignore=left_out)
            aside.rename(target)


def _link(source: str, target: str) -> None:
    """Link a file of weights, which is never overwritten, and copy any other file."""
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):  # a different file system
            os.link(source, target)
            return
    shutil.copy2(source, target)


def base_recipe(where: Path, study: Study) -> Settings:
    """Load the recipe of the pinned base. Raises UserError if it cannot be read or has no stage."""
    settings = load_settings(where.parent / study.base)
    if not settings.stages:
        raise UserError(f"{where.parent / study.base}: a base recipe needs a stage; add [[stages]]")
    return settings


def base_identity(runner: Runner) -> str:
    """Return the identity of the base's recipe and of the content of the files that it names."""
    if not runner.study.base:
        return ""
    folder = (runner.where.parent / runner.study.base).parent
    recipe = base_recipe(runner.where, runner.study)
    kinds = runner.study.resources.kinds(["base"])

    def make() -> str:
        files = files_of(recipe, folder)
        return cell_results.cell_key(recipe, settings_hash(files, str(kinds)) if kinds else files)

    return str(runner.once("base identity", make))


def given_identity(runner: Runner) -> str:
    """Return the identity of a cell's other inputs: the base, and the content of the data and model files."""

    def make() -> str:
        settings = cell_settings(runner.study, runner.study.reference, 0, (), str(runner.where))
        base, files = base_identity(runner), files_of(settings, runner.where.parent)
        return settings_hash(base, files) if files else base

    return str(runner.once("given identity", make))


def files_of(settings: Settings, base_dir: Path) -> str:
    """Hash the files from which data sets and the model are read. Return "" if there are none."""
    places = [
        (name, path) for name, one in settings.data.items() for path in local_sources(name, one, base_dir)
    ]
    places += [("model", path) for path in [local_model(settings.model.path, base_dir)] if path]
    parts: list[str] = []
    for name, place in places:
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        parts += [f"{name} {path.name} {rundir.file_sha256(path)}" for path in files]
    return settings_hash(*parts) if parts else ""


def check_base(runner: Runner) -> None:
    """Raise UserError if the study directory has a base that was trained from something else."""
    home = runner.out / "base"
    identity = home / "identity"
    if not (runner.study.base and (runner.out / BASE_MODEL).exists() and identity.exists()):
        return
    if identity.read_text(encoding="utf-8").strip() != base_identity(runner):
        raise UserError(
            f"{home} was trained from a different {runner.study.base}, or from different files; pass a different --out"
        )


def _base(runner: Runner) -> Path:
    """Train the pinned base with its recipe, and return the link ./base/model to the exported model."""
    link, home = runner.out / BASE_MODEL, runner.out / "base"
    settings = base_recipe(runner.where, runner.study)
    if link.exists():
        check_base(runner)
        return link
    identity = home / "identity"
    made = with_absolute_paths(settings, (runner.where.parent / runner.study.base).parent)
    rundir.write_atomic(home / "recipe.toml", rundir.to_toml(table_of(made)))
    rundir.write_atomic(identity, base_identity(runner) + "\n")
    share = runner.study.resources.of("base")
    with runner._places.take(share.gpus) as devices:
        child(runner, _order(runner, "base", share, devices), "base")
    last = f"{len(settings.stages):02d}-{settings.stages[-1].name}"
    link.symlink_to(Path("run", "stages", last, "export"))
    return link
