"""Runs a study. Every cell and every shared stage runs once; after a kill, only what is missing runs.

A cell's settings are known once its learning rates are chosen and its budget is matched. The last stage of an
arm is tuned by the arm's own trials, an earlier stage by the trials of the arm that ends with that stage.
Trials are additional cells, evaluated on the dev set."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from signal import Signals
from typing import Any

from truestep import signals
from truestep.errors import UserError
from truestep.settings import Settings
from truestep.study.cell_results import cell_name, score
from truestep.study.cell_runner import CellFailed, Runner, node, result
from truestep.study.plan import Arm, cell_settings, owner_of, scaled, stage_tables, with_steps

NO_FLOPS = {"paper": 0.0, "full": 0.0}


def run_cells(runner: Runner) -> dict[str, dict[str, Any]]:
    """Run all cells of the study, seed by seed. Return the finished cells by name; the others are in
    ``failures``. After SIGINT or SIGTERM, set ``stopped`` and wait until the child processes have saved."""
    runner.out.mkdir(parents=True, exist_ok=True)
    study = runner.study
    wanted = [(arm, seed) for seed in study.seeds for arm in study.arms if seed in study.seeds_of(arm)]
    found: dict[str, dict[str, Any]] = {}

    def work(arm: Arm, seed: int) -> None:
        name = cell_name(arm.name, seed)
        try:
            found[name] = cell(runner, arm.name, seed)
            run = runner.out / "cells" / found[name]["key"] / "run"
            where = f": {run}" if run.is_dir() else ""  # an earlier result may be only a file
            runner.say(f"{name}: done ({len(found)} of {len(wanted)}){where}")
        except CellFailed as error:
            if not runner.stopped.is_set():
                runner.failures[name] = str(error)
                runner.say(f"{name}: FAILED: {error}")

    def stop(signum: int) -> None:
        if not runner.stopped.is_set():
            runner.signum = signum
            runner.stopped.set()
            what = f"interrupted by {Signals(signum).name}: waiting until the running cells are saved"
            runner.say(f"{what} (a second signal stops at once)")
        runner.stop(signum)

    with signals.deferred():
        problems = in_threads([functools.partial(work, arm, seed) for arm, seed in wanted], stop)
    if problems:
        raise problems[0]
    names = [cell_name(arm.name, seed) for arm, seed in wanted]
    for name in names:
        if not (runner.stopped.is_set() or name in found or name in runner.failures):  # its thread has ended
            runner.failures[name] = "ended without a result; the traceback is on stderr"
    return {name: found[name] for name in names if name in found}


def in_threads(
    tasks: Iterable[Callable[[], None]], interrupted: Callable[[int], None]
) -> list[BaseException]:
    """Run each task in a thread, as tasks wait most of the time. Return the exceptions that they raised. After
    a signal, ``interrupted`` is called again and again with it until the threads have ended."""
    raised: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except (UserError, OSError, RuntimeError) as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # a join without a timeout would block Ctrl-C
            if signum := signals.pending():
                interrupted(signum)
    return raised


def cell(runner: Runner, arm: str, seed: int) -> dict[str, Any]:
    """Return the compact result of one cell. An earlier result is used if there is one."""

    def make() -> Settings:
        return settled(runner, arm, seed, chosen_factor(runner, arm))

    return result(runner, runner.once(f"settled {arm} {seed}", make), arm)


def settled(runner: Runner, arm: str, seed: int, factor: float, *, dev: str = "") -> Settings:
    """Return the settings of a cell, or of a trial (evaluated only on the ``dev`` set). The learning rate
    of the last stage is multiplied by ``factor``. Earlier stages have the learning rates that were chosen
    for them. The steps are matched."""
    tables = tables_of(runner, arm)
    if tables:
        tables[-1] = scaled(tables[-1], factor)

    def settings(stages: Sequence[Mapping[str, Any]]) -> Settings:
        made = cell_settings(runner.study, arm, seed, stages, str(runner.where))
        evaluate = made.evaluate.model_copy(update={"data": (dev,)} if dev else {})
        return made.model_copy(update={"evaluate": evaluate})

    def spent(other: str) -> Mapping[str, Any]:
        return trial(runner, other, chosen_factor(runner, other), seed) if dev else cell(runner, other, seed)

    match_flops(runner, arm, tables, settings, spent)
    return settings(tables)


def tables_of(runner: Runner, arm: str) -> list[dict[str, Any]]:
    """Return the arm's stages. Each but the last has the rate chosen for the arm that ends with it."""
    plain = stage_tables(runner.study, runner.study.arm(arm))
    tables = list(plain)
    for end in range(1, len(tables)):
        if owner := owner_of(runner.study, plain[:end]):
            tables[end - 1] = scaled(tables[end - 1], chosen_factor(runner, owner))
    return tables


def match_flops(
    runner: Runner,
    arm: str,
    tables: list[dict[str, Any]],
    settings: Callable[[Sequence[Mapping[str, Any]]], Settings],
    other: Callable[[str], Mapping[str, Any]],
) -> None:
    """Set the steps of the last stage so that the arm spends about as much as the other arm did. The cost of
    earlier stages is taken from the other arm if they are the same, and is otherwise measured."""
    goal = runner.study.arm(arm).equal_flops
    if not goal:
        return
    theirs, own = (stage_tables(runner.study, runner.study.arm(name)) for name in (goal.to, arm))
    whole, num = other(goal.to), len(own) - 1
    before = whole["stages"][:num]
    if own[:num] != theirs[:num]:
        before = node(runner, settings(tables[:-1]), f"{arm}.start")["stages"]
    like = next(s for s in whole["stages"] if s["name"] == goal.step_like)
    meant = next(t for t in theirs if t["name"] == goal.step_like)
    left = whole["flops"]["paper"] - sum(s["flops_paper"] for s in before)
    one = like["flops_paper"] / like["steps"] * sequences(tables[-1]) / sequences(meant)
    tables[-1] = with_steps(tables[-1], max(1, round(left / one)))


def sequences(table: Mapping[str, Any]) -> float:
    """Return the number of sequences per step."""
    if table["kind"] == "rl":
        return float(table["prompts_per_step"] * table.get("samples_per_prompt", 8))
    return float(table["sequences_per_step"])


def chosen_factor(runner: Runner, arm: str) -> float:
    """Return the learning-rate factor with the best dev score in the trials, or 1 without trials."""
    tuning = runner.study.tuning_of(runner.study.arm(arm))
    if tuning is None:
        return 1.0

    def choose() -> float:
        scores = {f: _mean(made) for f in tuning.factors if (made := trials(runner, arm, f))}
        if not scores:
            raise CellFailed(f"{arm}: all its learning-rate trials have failed")
        best = max(scores.values())
        return min((f for f in scores if scores[f] == best), key=lambda f: (abs(f - 1), f))

    return float(runner.once(f"factor {arm}", choose))


def _mean(results: Iterable[Mapping[str, Any]]) -> float:
    values = [score(r, b) for r in results for b in r["benchmarks"]]
    return sum(values) / len(values)


def trials(runner: Runner, arm: str, factor: float) -> list[dict[str, Any]]:
    """Run the trials of one rate. If a trial fails, return an empty list, so that the rate is not chosen."""
    assert runner.study.tuning
    made = []
    for seed in runner.study.tuning.seeds:
        try:
            made.append(trial(runner, arm, factor, seed))
        except CellFailed as error:
            if runner.stopped.is_set():
                raise
            runner.failures[cell_name(trial_arm(arm, factor), seed)] = str(error)
    return made if len(made) == len(runner.study.tuning.seeds) else []


def trial(runner: Runner, arm: str, factor: float, seed: int) -> dict[str, Any]:
    """Run one learning-rate trial: the arm with its last stage's rate scaled, scored only on the dev set."""
    assert runner.study.tuning
    label = trial_arm(arm, factor)
    made = result(runner, settled(runner, arm, seed, factor, dev=runner.study.tuning.data), label)
    runner.trials[cell_name(label, seed)] = made
    return made


def trial_arm(arm: str, factor: float) -> str:
    return f"{arm}.lr{factor:g}"


def tuning_cost(runner: Runner, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Return each arm's trial scores, its chosen factor, and the FLOPs of all trials that chose a rate for
    it, including the rates of its earlier stages."""
    own = {arm.name: _own_cost(runner, arm) for arm in arms}
    found = {}
    for arm in arms:
        tables = stage_tables(runner.study, arm)
        owners = [owner_of(runner.study, tables[:end]) for end in range(1, len(tables))]
        shares = [own[name]["flops"] for name in (arm.name, *owners) if name]
        found[arm.name] = own[arm.name] | {"flops": {k: sum(share[k] for share in shares) for k in NO_FLOPS}}
    return found


def _own_cost(runner: Runner, arm: Arm) -> dict[str, Any]:
    tuning = runner.study.tuning_of(arm)
    if tuning is None:
        empty: dict[str, Any] = {"trials": 0, "factor": 1.0, "scores": {}, "failed": [], "flops": NO_FLOPS}
        return empty | {"reason": arm.untuned}
    made = {f: trials(runner, arm.name, f) for f in tuning.factors}
    stages = [t["stages"][-1] for ts in made.values() for t in ts]
    return {
        "trials": len(stages), "factor": chosen_factor(runner, arm.name) if stages else 1.0, "reason": "",
        "scores": {f"{f:g}": _mean(ts) for f, ts in made.items() if ts},
        "failed": [f"{f:g}" for f, ts in made.items() if not ts],
        "flops": {k: sum(float(stage[f"flops_{k}"]) for stage in stages) for k in NO_FLOPS},
    }  # fmt: skip
