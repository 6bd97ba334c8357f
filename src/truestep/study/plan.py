"""The settings of a study (arms, seeds and allowed differences), read from a TOML file and checked first.

An arm is a list of the study's stages. The keys that an arm changes (``set``) must be declared in
``may_differ``. All other settings are the same in every arm by construction. One file: the checks and the models
refer to each other."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.frozen import Frozen
from truestep.redaction import INSTEAD, find_secret
from truestep.settings import Settings, parse_settings
from truestep.study.resources import Resources

Control = Literal["base", "sft", "sft-continued", "rl-from-base", "random-reward", "rejection"]
Seed = Annotated[int, Field(ge=0)]
MOST_SEEDS = 20  # the exact test counts the sign patterns of at most this many seeds, one by one
CONTROLS: tuple[Control, ...] = get_args(Control)
BASE_MODEL = "./base/model"  # the pinned base, relative to the study directory


class EqualFlops(Frozen):
    """Setting that chooses how many steps an arm's last stage has, so that the arm spends as many FLOPs as
    arm ``to``. A sequence is assumed to cost as much as one in stage ``step_like`` of arm ``to``."""

    to: str
    """The arm whose FLOPs are matched. Example: ``to = "b"``"""
    step_like: str
    """The stage of that arm whose sequences cost as much as those of this arm's last stage.
    Example: ``step_like = "sft"``"""


class Arm(Frozen):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """The name of the arm. Example: ``name = "sft-rl"``"""
    stages: tuple[str, ...] = ()
    """The arm's stages, in order. Example: ``stages = ["sft"]``"""
    control: Control | Literal[""] = ""
    """The control that the arm is. Each occurs once, or is in controls_off. Example: ``control = "sft"``"""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that only this arm changes. Each must be in may_differ.
    Example: ``set = { "sft.steps" = 300 }``"""
    equal_flops: EqualFlops | Literal[""] = ""
    """Choose the last stage's steps so that the arm spends as many FLOPs as another arm.
    Example: ``equal_flops = { to = "b", step_like = "sft" }``"""
    num_seeds: int = Field(0, ge=0)
    """Use only the first so many of the study's seeds. 0: all. Example: ``num_seeds = 2``"""
    untuned: str = ""
    """Why only this arm has no learning-rate trials. Example: ``untuned = "the paper's rate"``"""


class Tuning(Frozen):
    """Learning-rate trials of the last stage of every arm, on a dev set, with separate seeds."""

    data: str
    """The dev set on which the trials are scored. Example: ``data = "held"``"""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors of the last stage's learning rate; 1 is one of them. Example: ``factors = [0.5, 1.0, 2.0]``"""
    seeds: tuple[Seed, ...] = Field((1001,), min_length=1)
    """Seeds of the trials. They must not be seeds of the study. Example: ``seeds = [1001]``"""

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if 1.0 not in self.factors or len(set(self.factors)) != len(self.factors) or min(self.factors) <= 0:
            raise ValueError("tuning.factors must be distinct and greater than 0, and must include 1.0")
        return self


class Study(Frozen):
    """A study file. ``run`` and ``stages`` have the keys of a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The name of the study, in its folder and on its page. Example: ``name = "letters"``"""
    question: str
    """The question that the study answers, for its page.
    Example: ``question = "Is SFT, then RL better than LUFFY?"``"""
    declaration: str = ""
    """The page that was written before anything ran. Example: ``declaration = "docs/letters.md"``"""
    seeds: tuple[Seed, ...] = Field(min_length=1, max_length=MOST_SEEDS)
    """The training seeds. Every arm runs with each of them. Example: ``seeds = [1, 2, 3, 4, 5]``"""
    workers: int = Field(2, ge=1)
    """How many cells (an arm with a seed) run at once. Example: ``workers = 4``"""
    retries: int = Field(3, ge=0)
    """How often a cell is started again after its process was killed. Example: ``retries = 0``"""
    resources: Resources = Resources()
    """What each cell uses. Example: ``resources = { ranks = 2, gpus = 2 }``"""
    flops_per_second: float = Field(2e10, gt=0)
    """Speed of one cell, only for the plan's estimate of time. Example: ``flops_per_second = 1e14``"""
    base: str = ""
    """A recipe that runs once; its last stage's model is the base of all cells.
    Example: ``base = "bases/weak.toml"``"""
    run: dict[str, Any]
    """What all cells share, as in a recipe: model, compute, chat, data, evaluate.
    Example: ``run.compute = { dtype = "float32" }``"""
    stages: dict[str, dict[str, Any]]
    """The stages of the arms, by name, as in a recipe. Example: ``stages.sft.optimizer = { lr = 1e-4 }``"""
    arms: tuple[Arm, ...] = Field(min_length=1)
    """The arms, which are compared.
    Example: ``arms = [{ name = "b", stages = ["sft"], control = "sft" }, { name = "a", control = "base" }]``"""
    reference: str
    """The arm with which settings and budgets are compared. Example: ``reference = "b"``"""
    primary: tuple[tuple[str, str], ...] = ()
    """Pairs a, b: is a − b different from 0? With Holm's correction. Example: ``primary = [["b", "a"]]``"""
    secondary: tuple[tuple[str, str], ...] = ()
    """Further pairs, without a place in the correction. Example: ``secondary = [["b", "a"]]``"""
    may_differ: tuple[str, ...] = ()
    """Patterns of KIND.key in which arms may differ; any other difference is an error.
    Example: ``may_differ = ["rl.method", "sft.*"]``"""
    controls_off: dict[Control, str] = Field(default_factory=dict)
    """Controls that are left out, each with a reason.
    Example: ``controls_off = { rejection = "too slow" }``"""
    tuning: Tuning | Literal[""] = ""
    """Learning-rate trials of the last stage of every arm. Example: ``tuning = { data = "held" }``"""

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("two arms have the same name, or two seeds are the same; make each unique")
        for arm in self.arms:
            self._check_arm(arm, names)
        self._check_resources()
        pairs = (*self.primary, *self.secondary)
        for name in (self.reference, *(name for pair in pairs for name in pair)):
            if name not in names:
                raise ValueError(f"{name!r} is not an arm; the arms are {', '.join(names)}")
        if same := [a for a, b in pairs if a == b]:
            raise ValueError(f"{same[0]!r} is compared with itself; name two different arms")
        if self.tuning and set(self.tuning.seeds) & set(self.seeds):
            raise ValueError("tuning.seeds must not include a seed of the study; use different seeds")
        return self

    def _check_arm(self, arm: Arm, names: Sequence[str]) -> None:
        where, match = f"arms.{arm.name}", arm.equal_flops
        for stage in arm.stages:
            if stage not in self.stages:
                raise ValueError(
                    f"{where}: there is no [stages.{stage}]; the stages are {', '.join(self.stages)}"
                )
        for key in arm.set:
            if key.partition(".")[0] not in arm.stages:
                known = ", ".join(arm.stages) or "no stages"
                raise ValueError(
                    f"{where}.set: {key!r} does not begin with a stage of the arm, which has {known}"
                )
        try:
            stage_tables(self, arm)
        except UserError as error:
            raise ValueError(str(error)) from None
        if arm.num_seeds > len(self.seeds):
            raise ValueError(
                f"{where}.num_seeds = {arm.num_seeds}, but the study has {len(self.seeds)} seeds"
            )
        if not match:
            return
        if match.to not in names:
            raise ValueError(f"{where}.equal_flops.to = {match.to!r} is not an arm")
        goal = self.arm(match.to)
        if goal.equal_flops or len(self.seeds_of(goal)) < len(self.seeds_of(arm)):
            raise ValueError(
                f"{where}.equal_flops.to: expected an arm without equal_flops and with at least as many seeds"
            )
        if not arm.stages or match.step_like not in goal.stages:
            raise ValueError(
                f"{where}.equal_flops.step_like = {match.step_like!r} is not a stage of {goal.name} "
                f"(it has {', '.join(goal.stages) or 'none'}), or the arm itself has no stage"
            )

    def _check_resources(self) -> None:
        known = [*self.stages, *(["base"] if self.base else [])]
        for name in self.resources.stages:
            if name not in known:
                raise ValueError(
                    f"resources.stages.{name}: there is no such stage; the stages are {', '.join(known)}"
                )

    @model_validator(mode="after")
    def _controls(self) -> Self:
        """Raise ValueError if a control is left out without a declared reason, which the table prints."""
        there = [arm.control for arm in self.arms if arm.control]
        for control in CONTROLS:
            if there.count(control) + (control in self.controls_off) != 1:
                raise ValueError(
                    f'the control {control!r} must occur exactly once; add an arm with control = "{control}", or set '
                    f'controls_off.{control} = "..." to the reason why it is left out'
                )
        for arm in self.arms:
            if arm.control and not _is_control(arm, arm.control, [self.stages[s] for s in arm.stages]):
                meaning = _CONTROL[arm.control][0]
                raise ValueError(f"arms.{arm.name}: control = {arm.control!r} needs an arm that {meaning}")
        if any(not reason.strip() for reason in self.controls_off.values()):
            raise ValueError("controls_off: a reason must not be empty")
        return self

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds[: arm.num_seeds or None]

    def tuning_of(self, arm: Arm) -> Tuning | None:
        """Return the settings of an arm's learning-rate trials, or None if it has no trials."""
        return self.tuning if self.tuning and arm.stages and not arm.untuned else None


Kinds = Sequence[Any]  # of an arm's stages; the flag says whether a stage has the random reward
_CONTROL: dict[Control, tuple[str, Callable[[Kinds, bool], bool]]] = {
    "base": ("has no stages", lambda k, _: not k),
    "sft": ("has only SFT stages, at least one", lambda k, _: set(k) == {"sft"}),
    "sft-continued": ("has only SFT stages, at least two", lambda k, _: len(k) > 1 and set(k) == {"sft"}),
    "rl-from-base": ("starts with an RL stage", lambda k, _: k[:1] == ["rl"]),
    "random-reward": ('sets the reward of an RL stage to "random"', lambda _, random: random),
    "rejection": ("has a rejection stage", lambda k, _: "rejection" in k),
}


def _is_control(arm: Arm, control: Control, stages: Sequence[Mapping[str, Any]]) -> bool:
    rewards = [v for key, v in arm.set.items() if key.endswith(".reward")] + [s.get("reward") for s in stages]
    return _CONTROL[control][1]([stage.get("kind") for stage in stages], "random" in rewards)


def load_study(path: Path) -> Study:
    """Read and check a study file. Raises UserError with one line that names the file and the key."""
    try:
        return parse_study(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such study file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None


def parse_study(raw: Mapping[str, Any], where: str) -> Study:
    if (key := find_secret(raw)) is not None:
        raise UserError(f"{where}: {key} looks like a secret, and a study is written to files; {INSTEAD}")
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(p) for p in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}") from None
    check_study(study, where)
    return study


def stage_tables(study: Study, arm: Arm) -> list[dict[str, Any]]:
    """Return the arm's stages with the arm's changes, named as in the study."""
    tables = []
    for name in arm.stages:
        table: dict[str, Any] = {**deepcopy(study.stages[name]), "name": name}
        for key, value in arm.set.items():
            stage, _, rest = key.partition(".")
            if stage == name:
                *parents, leaf = rest.split(".")
                node = table
                for part in parents:
                    node = node.setdefault(part, {})
                    if not isinstance(node, dict):
                        raise UserError(f"arms.{arm.name}.set: {key!r}: {part} is a value, not a table")
                node[leaf] = value
        tables.append(table)
    return tables


def owner_of(study: Study, tables: Sequence[Mapping[str, Any]]) -> str:
    """Return the arm whose trials choose the learning rate of the last of these stages, or "" without one. It
    is the first arm with exactly these stages. Arms whose steps are matched later are skipped."""
    arms = (a for a in study.arms if not a.equal_flops)
    return next((a.name for a in arms if stage_tables(study, a) == list(tables)), "")


def cell_settings(
    study: Study, arm: str, seed: int, stages: Sequence[Mapping[str, Any]], where: str
) -> Settings:
    """Return the settings of a run: the given stages and seed, one thread, and what all cells share. Child
    processes run in the study directory, so that a stage's identity contains no path of this machine."""
    raw = deepcopy(study.run)
    if study.base:
        raw["model"] = {**raw.get("model", {}), "path": BASE_MODEL}
    raw["compute"] = {**raw.get("compute", {}), "threads": 1}
    own = {"name": f"{study.name}-{arm}", "seed": seed, "stages": [dict(s) for s in stages]}
    return parse_settings({**raw, **own}, where=f"{where}: arms.{arm}")


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as dotted keys. An empty table yields nothing."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def differences(study: Study, arm: Arm, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings in which a stage of the arm differs from the reference's stage of the same kind, as
    KIND.key → (reference's value, arm's value). A stage of a kind that the reference lacks is skipped."""
    pair = (study.arm(study.reference), arm)
    reference, own = (cell_settings(study, a.name, 0, stage_tables(study, a), where) for a in pair)
    kinds = {s.kind: s for s in reversed(reference.stages)}
    found: dict[str, tuple[Any, Any]] = {}
    for stage in (stage for stage in own.stages if stage.kind in kinds):
        theirs, mine = (dict(flattened(s.model_dump(mode="json"))) for s in (kinds[stage.kind], stage))
        for key in sorted((theirs.keys() | mine.keys()) - {"name", "kind"}):
            if theirs.get(key) != mine.get(key):
                found[f"{stage.kind}.{key}"] = (theirs.get(key), mine.get(key))
    return found


def check_study(study: Study, where: str) -> None:
    """Raise UserError for undeclared differences, tuning on test sets, and problems that vary by seed."""
    for arm in study.arms:
        for key, (theirs, own) in differences(study, arm, where).items():
            if not any(fnmatch.fnmatch(key, pattern) for pattern in study.may_differ):
                raise UserError(
                    f"{where}: arms.{arm.name}: {key} = {own!r} differs from {theirs!r} in {study.reference} and is "
                    f'not declared; set may_differ = ["{key}"], or use the same value'
                )
        if arm.untuned and not study.tuning:
            raise UserError(
                f"{where}: arms.{arm.name}.untuned is set, but the study has no trials; remove it"
            )
    sets = study.run.get("data", {})
    tested = study.run.get("evaluate", {}).get("data", [])
    if not tested:
        raise UserError(
            f'{where}: run.evaluate.data is empty, but a study compares scores; set evaluate.data = ["..."]'
        )
    if study.tuning and study.tuning.data not in sets:
        raise UserError(f"{where}: tuning.data = {study.tuning.data!r} is not in [run.data]")
    every = every_arm(study, where)
    trained = {name for settings in every for stage in settings.stages for name in stage.data_names}
    chosen = dev_sets(study, every)
    for used, tables, kind in (("selection", chosen, "dev"), ("training", trained, "test")):
        if both := tables & set(tested):
            raise UserError(
                f"{where}: {both.pop()!r} is used both for testing and for {used}; use a separate {kind} set"
            )
    if study.tuning and study.tuning.data in trained:
        raise UserError(
            f"{where}: tuning.data = {study.tuning.data!r} is also used for training; use a separate dev set"
        )
    check_stages(study, where)
    for name, table in sets.items():
        generated = str(table.get("source", "")).startswith(("procedural:", "reasoning_gym:"))
        if generated and not isinstance(table.get("seed"), int):
            raise UserError(
                f"{where}: run.data.{name}.seed: seeds and problems are crossed, so the problems must be the same for "
                f"all seeds; set run.data.{name}.seed = 0"
            )


def check_stages(study: Study, where: str) -> None:
    """Check every arm's methods, options and faults, and its learning rate at every factor of the trials."""
    from truestep.pipeline.prepare import check_methods

    for arm in study.arms:
        tables = stage_tables(study, arm)
        tuning = study.tuning_of(arm)
        for factor in tuning.factors if tuning else (1.0,):
            stages = [*tables[:-1], scaled(tables[-1], factor)] if tables else []
            try:
                check_methods(cell_settings(study, arm.name, 0, stages, where), Path(where).parent)
            except UserError as error:
                text = str(error).removeprefix(f"{where}: ").removeprefix(f"arms.{arm.name}: ")
                raise UserError(f"{where}: arms.{arm.name}: {text}") from None


def scaled(table: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the stage with its learning rate multiplied by a factor."""
    rate = float(table["optimizer"]["lr"]) * factor
    return {**table, "optimizer": {**table["optimizer"], "lr": float(f"{rate:.6g}")}}


def every_arm(study: Study, where: str) -> list[Settings]:
    """Return the settings of each arm as in the file, before rates are chosen and budgets are matched."""
    return [cell_settings(study, arm.name, 0, stage_tables(study, arm), where) for arm in study.arms]


def dev_sets(study: Study, every: Sequence[Settings]) -> set[str]:
    """Return the data sets that are used to choose learning rates or checkpoints."""
    found = {stage.dev.data for settings in every for stage in settings.stages if stage.dev.data}
    return found | ({study.tuning.data} if study.tuning else set())


def check_disjoint(study: Study, base_dir: Path) -> None:
    """Raise UserError if a problem of a dev set is also a test problem."""
    every = every_arm(study, study.name)
    settings, dev = every[0], dev_sets(study, every)
    texts: dict[str, set[str]] = {}
    for name in {*dev, *settings.evaluate.data}:
        problems = load_problems(name, settings.data[name], seed=0, base_dir=base_dir)
        texts[name] = {problem.messages[-1].content for problem in problems}
    for a, b in product(dev, settings.evaluate.data):
        if shared := texts[a] & texts[b]:
            raise UserError(f"data.{a} and data.{b} share {len(shared)} problems; remove them from {a}")
