"""Run a study: every cell once, what cells have in common once, and after a kill only what is missing.

Each task is asked for by name and made once; a task asks for what it needs (the pinned base, the run it starts from,
the learning-rate trials of its stages, the arm whose FLOPs it matches). Tasks are threads that mostly wait; at most
``workers`` of them have a child process at a time. State is files alone: cells/NAME/cell.json says that a cell is done.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truestep import rundir
from truestep.settings import Settings, SettingsError, load_settings
from truestep.study import cells
from truestep.study.launch import Launch, Order
from truestep.study.plan import BASE_MODEL, Arm, Study, cell_settings, stage_tables


class CellFailed(RuntimeError):
    """A cell's process ended with an error; the study goes on without it."""


@dataclass(kw_only=True)
class Runner:
    """The state of one sitting. ``results`` is a folder of finished cells from earlier days, or None."""

    study: Study
    where: Path  # the study file
    out: Path
    launch: Launch
    workers: int
    results: Path | None = None
    say: Callable[[str], None] = print
    failures: dict[str, str] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)  # by Ctrl-C: no child is started any more
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    _made: dict[str, Future[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _gate: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._gate = threading.Semaphore(self.workers)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a task, made by whoever asks first."""
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


def run_cells(runner: Runner) -> dict[str, dict[str, Any]]:
    """All cells of the study, seed by seed; the finished ones by "ARM-sSEED". What failed is in ``failures``.

    After Ctrl-C the children at work, which have got it as well, are waited for: see ``stopped``.
    """
    runner.out.mkdir(parents=True, exist_ok=True)
    study = runner.study
    wanted = [(arm, seed) for seed in study.seeds for arm in study.arms if seed in study.seeds_of(arm)]
    found: dict[str, dict[str, Any]] = {}

    def work(arm: Arm, seed: int) -> None:
        name = f"{arm.name}-s{seed}"
        try:
            found[name] = cell(runner, arm.name, seed)
            runner.say(f"{name}: done ({len(found)} of {len(wanted)})")
        except CellFailed as error:
            if not runner.stopped.is_set():
                runner.failures[name] = str(error)
                runner.say(f"{name}: FAILED: {error}")

    def stop() -> None:
        runner.stopped.set()
        runner.say("interrupted: waiting until the cells at work have saved what they did (Ctrl-C again: do not wait)")

    problems = in_threads([functools.partial(work, arm, seed) for arm, seed in wanted], stop)
    if problems:
        raise problems[0]
    return {f"{a.name}-s{s}": found[f"{a.name}-s{s}"] for a, s in wanted if f"{a.name}-s{s}" in found}


def in_threads(tasks: Iterable[Callable[[], None]], interrupted: Callable[[], None]) -> list[BaseException]:
    """Run all tasks, each in a thread of its own (they wait most of the time); what they raised."""
    raised: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except (SettingsError, OSError, RuntimeError) as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        _join(threads)
    except KeyboardInterrupt:
        interrupted()
        _join(threads)
    return raised


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # a join without end would not let Ctrl-C through


# -------------------------------------------------------------------------------------------------------------- cells


def cell(runner: Runner, arm: str, seed: int) -> dict[str, Any]:
    """The compact result of one cell, from an earlier day if there is one."""
    return result(runner, settled(runner, arm, seed), f"{arm}-s{seed}", seed)


def result(runner: Runner, settings: Settings, name: str, seed: int) -> dict[str, Any]:
    """The compact result of these settings: from an earlier day's folder if it is there, else by running them."""
    key = cells.cell_key(settings, base_identity(runner))
    for kind in ("cells", "trials"):
        kept = runner.results / kind / f"{name}.json" if runner.results else None
        if kept and kept.exists() and (old := rundir.read_json(kept))["key"] == key:
            return dict(old)
    made = node(runner, settings, name, seed)
    return {**made, "arm": name.rpartition("-s")[0]}  # two arms with equal settings share one run


def node(runner: Runner, settings: Settings, name: str, seed: int) -> dict[str, Any]:
    """Run these settings, once, in a folder that their identity names; the compact result."""
    key = cells.cell_key(settings, base_identity(runner))
    return dict(runner.once(f"node {key}", lambda: _node(runner, settings, name, seed, key)))


def node_folder(runner: Runner, settings: Settings) -> Path:
    return runner.out / "cells" / cells.cell_key(settings, base_identity(runner))


def _node(runner: Runner, settings: Settings, name: str, seed: int, key: str) -> dict[str, Any]:
    home = runner.out / "cells" / key
    done = home / "cell.json"
    if done.exists():
        return dict(rundir.read_json(done))
    parent = _parent(runner, settings, seed)
    if runner.study.base:
        base_folder(runner)
    with runner._gate:
        if parent is not None:
            adopt(node_folder(runner, parent) / "run", home / "run", len(parent.stages), settings)
        # named by its key: which of the arms that share it asks first is chance
        named = settings.model_copy(update={"name": f"{runner.study.name}-{key}"})
        absolute = with_absolute_data(named, runner.where.parent)
        rundir.write_atomic(home / "recipe.toml", rundir.to_toml(absolute.model_dump(mode="json")))
        rundir.write_atomic(home / "name", f"{name}\n")
        child(runner, Order(study=str(runner.out.resolve()), recipe=f"cells/{key}/recipe.toml", run=f"cells/{key}/run"))
        made = cells.compact(home / "run", arm=name.rpartition("-s")[0], seed=seed, key=key)
        rundir.write_json(done, made)
    return made


def child(runner: Runner, order: Order) -> None:
    if runner.stopped.is_set():
        raise CellFailed(f"{order.run}: not started")
    code, words = runner.launch(order)
    if code != 0:
        raise CellFailed(f"{order.run}: exit code {code}: {rundir.redact(words)[-300:]}")


def _parent(runner: Runner, settings: Settings, seed: int) -> Settings | None:
    """The settings of the run that this one goes on from: all stages but the last. Made first, and once.

    Two arms that begin with the same stages at the same seed have one parent: an SFT checkpoint is trained once.
    """
    if not settings.stages:
        return None
    before = settings.model_copy(update={"stages": settings.stages[:-1]})
    node(runner, before, _label(runner, before, seed), seed)
    return before


def _label(runner: Runner, settings: Settings, seed: int) -> str:
    stages = "-".join(s.name for s in settings.stages) or "start"
    return f"shared.{stages}-s{seed}"


def with_absolute_data(settings: Settings, base_dir: Path) -> Settings:
    """Data files named relative to the study file, found from anywhere."""
    data = {}
    for name, one in settings.data.items():
        path = base_dir / one.source
        is_file = ":" not in one.source and path.exists()
        data[name] = one.model_copy(update={"source": str(path.resolve())}) if is_file else one
    return settings.model_copy(update={"data": data})


def adopt(parent: Path, run: Path, num_stages: int, settings: Settings) -> None:
    """Give a run the stages and evaluations that its parent has made; ``truestep run`` checks their identities."""
    if not (run / "resolved.toml").exists():
        rundir.write_atomic(run / "resolved.toml", rundir.to_toml(settings.model_dump(mode="json")))
    names = [s.name for s in settings.stages[:num_stages]]
    stages = [parent / "stages" / f"{i + 1:02d}-{name}" for i, name in enumerate(names)]
    for folder in (*stages, *(parent / "evaluations" / name for name in ("base", *names))):
        target = run / folder.relative_to(parent)
        if folder.exists() and not target.exists():
            aside = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, aside, copy_function=_link, ignore=shutil.ignore_patterns("checkpoints", "best"))
            aside.rename(target)


def _link(source: str, target: str) -> None:
    """Weights are linked (nobody writes into them), everything else is copied."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)


# -------------------------------------------------------------------------------------------------------- pinned base


def base_recipe(runner: Runner) -> Settings:
    return load_settings(runner.where.parent / runner.study.base)


def base_identity(runner: Runner) -> str:
    if not runner.study.base:
        return ""
    return str(runner.once("base identity", lambda: cells.cell_key(base_recipe(runner), "")))


def base_folder(runner: Runner) -> Path:
    """The pinned base, trained once by its own recipe; ./base/model leads to what it exported."""
    return Path(runner.once("base", lambda: _base(runner)))


def _base(runner: Runner) -> Path:
    link = runner.out / BASE_MODEL
    if link.exists():
        return link
    settings = base_recipe(runner)
    if not settings.stages:
        raise SettingsError(f"{runner.study.base}: a base recipe needs a stage: write [[stages]]")
    home = runner.out / "base"
    made = with_absolute_data(settings, (runner.where.parent / runner.study.base).parent)
    rundir.write_atomic(home / "recipe.toml", rundir.to_toml(made.model_dump(mode="json")))
    with runner._gate:
        child(runner, Order(study=str(runner.out.resolve()), recipe="base/recipe.toml", run="base/run"))
    last = f"{len(settings.stages):02d}-{settings.stages[-1].name}"
    link.symlink_to(Path("run") / "stages" / last / "export")
    return link


# ----------------------------------------------------------------------------------------- learning rates and budgets


def settled(runner: Runner, arm: str, seed: int) -> Settings:
    """The settings of a cell once its learning rates are chosen and its steps are matched."""
    made: Settings = runner.once(f"settled {arm} {seed}", lambda: _settled(runner, arm, seed))
    return made


def _settled(runner: Runner, arm: str, seed: int) -> Settings:
    tables = tables_of(runner, arm)
    if tables:
        tables[-1] = scaled(tables[-1], chosen_factor(runner, arm))
        match_flops(runner, arm, tables, lambda other: cell(runner, other, seed))
    return cell_settings(runner.study, arm, seed, tables, str(runner.where))


def tables_of(runner: Runner, arm: str) -> list[dict[str, Any]]:
    """The arm's stages, all but the last with the learning rate that the arm which ends there has chosen."""
    tables = stage_tables(runner.study, runner.study.arm(arm))
    for end in range(1, len(tables)):
        owner = next((a.name for a in runner.study.arms if stage_tables(runner.study, a) == tables[:end]), "")
        if owner:
            tables[end - 1] = scaled(tables[end - 1], chosen_factor(runner, owner))
    return tables


def scaled(table: Mapping[str, Any], factor: float) -> dict[str, Any]:
    rate = float(table["optimizer"]["lr"]) * factor
    return {**table, "optimizer": {**table["optimizer"], "lr": float(f"{rate:.6g}")}}


def match_flops(
    runner: Runner, arm: str, tables: list[dict[str, Any]], result: Callable[[str], Mapping[str, Any]]
) -> None:
    """Set the last stage's steps so that the arm spends what the other has spent; the table shows how well."""
    goal = runner.study.arm(arm).equal_flops
    if not goal:
        return
    other = result(goal.to)
    spent = {s["name"]: s for s in other["stages"]}
    if goal.step_like not in spent:
        raise SettingsError(f"{runner.where}: arms.{arm}.equal_flops.step_like: {goal.to} has no {goal.step_like!r}")
    like = spent[goal.step_like]
    before = sum(spent[t["name"]]["flops_paper"] for t in tables[:-1] if t["name"] in spent)
    theirs = next(t for t in stage_tables(runner.study, runner.study.arm(goal.to)) if t["name"] == goal.step_like)
    size = sequences(tables[-1]) / sequences(theirs)
    steps = (other["flops"]["paper"] - before) / (like["flops_paper"] / like["steps"] * size)
    tables[-1].pop("epochs", None)
    tables[-1]["steps"] = max(1, round(steps))


def sequences(table: Mapping[str, Any]) -> float:
    """Sequences of a step."""
    if table["kind"] == "rl":
        return float(table["prompts_per_step"] * table.get("samples_per_prompt", 8))
    return float(table["sequences_per_step"])


def chosen_factor(runner: Runner, arm: str) -> float:
    """The learning-rate factor that did best on the dev set in the trials (1 where there are none)."""
    return float(runner.once(f"factor {arm}", lambda: _chosen(runner, arm)))


def _chosen(runner: Runner, arm: str) -> float:
    tuning = runner.study.tuning
    if not tuning or not runner.study.arm(arm).stages or runner.study.arm(arm).untuned:
        return 1.0
    scores = {f: _mean(trial(runner, arm, f, s) for s in tuning.seeds) for f in tuning.factors}
    best = max(scores.values())
    return min((f for f in scores if scores[f] == best), key=lambda f: (abs(f - 1), f))


def _mean(results: Iterable[Mapping[str, Any]]) -> float:
    values = [cells.score(r, b) for r in results for b in r["benchmarks"]]
    return sum(values) / len(values)


def trial(runner: Runner, arm: str, factor: float, seed: int) -> dict[str, Any]:
    """One learning-rate trial: the arm with its last stage's rate scaled, evaluated on the dev set alone."""
    settings = trial_settings(runner, arm, factor, seed)
    made = result(runner, settings, f"{arm}.lr{factor:g}-s{seed}", seed)
    runner.trials[f"{arm}.lr{factor:g}-s{seed}"] = made
    return made


def trial_settings(runner: Runner, arm: str, factor: float, seed: int) -> Settings:
    tables = tables_of(runner, arm)
    tables[-1] = scaled(tables[-1], factor)
    match_flops(runner, arm, tables, lambda other: trial(runner, other, chosen_factor(runner, other), seed))
    settings = cell_settings(runner.study, arm, seed, tables, str(runner.where))
    assert runner.study.tuning
    return settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"data": (runner.study.tuning.data,)})}
    )


def tuning_cost(runner: Runner, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """For each arm: its trials' scores, the factor chosen, and the FLOPs of all trials that it profits from (those of
    its last stage, and those of the arms whose stages it begins with)."""
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        tuning = runner.study.tuning
        if not tuning or not arm.stages or arm.untuned:
            found[arm.name] = {"trials": 0, "factor": 1.0, "scores": {}, "flops": {"paper": 0.0, "full": 0.0},
                               "reason": arm.untuned}  # fmt: skip
            continue
        made = {f: [trial(runner, arm.name, f, s) for s in tuning.seeds] for f in tuning.factors}
        flops = {k: sum(float(t["stages"][-1][f"flops_{k}"]) for ts in made.values() for t in ts)
                 for k in ("paper", "full")}  # fmt: skip
        found[arm.name] = {"trials": sum(map(len, made.values())), "factor": chosen_factor(runner, arm.name),
                           "scores": {f"{f:g}": _mean(ts) for f, ts in made.items()}, "flops": flops,
                           "reason": ""}  # fmt: skip
    for arm in sorted(arms, key=lambda a: -len(a.stages)):  # prefixes are added before they have grown themselves
        for other in arms:
            n = len(other.stages)
            if 0 < n < len(arm.stages) and stage_tables(runner.study, arm)[:n] == stage_tables(runner.study, other):
                for kind in ("paper", "full"):
                    found[arm.name]["flops"][kind] += found[other.name]["flops"][kind]
    return found
