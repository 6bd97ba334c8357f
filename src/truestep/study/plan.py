"""The settings of a study: arms, seeds and allowed differences. ``study.load`` reads and checks them.

An arm is a list of the study's stages. The keys that an arm changes (``set``) must be declared in
``may_differ``. All other settings are the same in every arm by construction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from truestep.errors import UserError
from truestep.frozen import Frozen
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
    equal_flops: EqualFlops | None = None
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
    """Controls that are left out, each with a reason; one text is the reason for all controls that no arm is.
    Example: ``controls_off = { rejection = "too slow" }``"""
    allow_overlap: dict[str, str] = Field(default_factory=dict)
    """Data sets that test or choose and may have problems of training sets, each with a reason.
    Example: ``allow_overlap = { test = "it measures memorization" }``"""
    tuning: Tuning | None = None
    """Learning-rate trials of the last stage of every arm. Example: ``tuning = { data = "held" }``"""

    @model_validator(mode="before")
    @classmethod
    def _one_reason(cls, raw: Any) -> Any:
        """Let one text be the reason for all controls that no arm is."""
        reason = raw.get("controls_off") if isinstance(raw, Mapping) else None
        if not isinstance(reason, str):
            return raw
        there = [arm.get("control") for arm in raw.get("arms", ()) if isinstance(arm, Mapping)]
        return {**raw, "controls_off": {name: reason for name in CONTROLS if name not in there}}

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return self.seeds[: arm.num_seeds or None]

    def tuning_of(self, arm: Arm) -> Tuning | None:
        """Return the settings of an arm's learning-rate trials, or None if it has no trials."""
        return self.tuning if arm.stages and not arm.untuned else None


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


def scaled(table: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the stage with its learning rate multiplied by a factor."""
    rate = float(table["optimizer"]["lr"]) * factor
    return {**table, "optimizer": {**table["optimizer"], "lr": float(f"{rate:.6g}")}}


def with_steps(table: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the stage with a number of steps instead of epochs."""
    return {key: value for key, value in table.items() if key not in ("epochs", "epochs_of")} | {
        "steps": steps
    }
