"""Reads a study file. A file with faults is refused with all of them at once.

The parts of the file are checked one by one. A part with a fault is replaced by a stand-in, so that the other
parts can still be checked, and checks that need the part are left out."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from truestep.errors import Faults, UserError, did_you_mean, each_fault
from truestep.pipeline.prepare import check_methods
from truestep.redaction import INSTEAD, find_secret
from truestep.settings import Settings, Stage
from truestep.study.plan import (
    BASE_MODEL,
    CONTROLS,
    Arm,
    Control,
    Study,
    differences,
    scaled,
    stage_tables,
    with_steps,
)

GENERATED = ("procedural:", "reasoning_gym:")
OWN_KEYS = ("name", "seed", "stages")  # of a run, which the study sets
SPARE_SEEDS = tuple(range(10**9, 10**9 + 20))  # instead of faulty ones; they are not seeds of the trials


@dataclass(kw_only=True)
class Draft:
    """What a study file says, as far as it can be read, and its faults. ``run`` has the parts of [run] without
    faults, ``broken`` names the others (a data set by its name), and ``good`` has the arms without faults."""

    faults: Faults = field(default_factory=Faults)
    study: Study | None = None
    run: dict[str, Any] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    good: list[Arm] = field(default_factory=list)
    # The valid stages of each arm, as in the file: before rates are chosen and budgets are matched.
    stages: dict[str, list[Stage]] = field(default_factory=dict)


def load_study(path: Path) -> Study:
    """Read and check a study file, but not its data. Raises UserError that names the file and every fault."""
    return parse_study(read_toml(path), str(path))


def parse_study(raw: Mapping[str, Any], where: str) -> Study:
    draft = read_draft(raw, where)
    refuse(draft.faults, where)
    assert draft.study is not None
    return draft.study


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [str(p) for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such study file{did_you_mean(str(path), known)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None


def refuse(faults: Faults, where: str) -> None:
    """Raise UserError with all faults of the study file ``where``, if there are any."""
    try:
        faults.refuse()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_draft(raw: Mapping[str, Any], where: str) -> Draft:
    """Read a study and check everything but its data and model. Raises UserError only for a secret."""
    if (key := find_secret(raw)) is not None:
        raise UserError(f"{where}: {key} looks like a secret, and a study is written to files; {INSTEAD}")
    draft = Draft()
    study, left_out = _model(raw, draft.faults)
    draft.study = study
    if study is None:
        return draft
    draft.faults.add(*_references(study, left_out), *_of_arms(study, left_out))
    if not left_out & {"controls_off", "arms", "arms.control", "arms.stages"}:
        draft.faults.add(*_controls(study))
    _check_run(draft, study)
    _check_arms(draft, study, Path(where).parent)
    draft.faults.add(*_roles(draft, study))
    return draft


def _model(raw: Mapping[str, Any], faults: Faults) -> tuple[Study | None, set[str]]:
    """Read the file's own keys. Return the study, with guesses for keys that are missing or faulty, and these
    keys, because other keys cannot be compared with them."""
    table, left_out = deepcopy(dict(raw)), set[str]()
    for _ in range(2):  # the second time without the faulty keys
        try:
            return Study.model_validate(table), left_out
        except ValidationError as error:
            faults.add(*each_fault(error, Study, table))
            left_out |= {_without(table, one["loc"]) for one in error.errors()}
            guessed: dict[str, Any] = {
                "name": "study",
                "question": "?",
                "seeds": SPARE_SEEDS,
                "run": {},
                "stages": {},
            }
            for key in left_out & guessed.keys():
                table[key] = guessed[key]
            if "arms" in left_out:
                table["arms"] = [{"name": "arm", "stages": list(table["stages"])}]
            if left_out & {"arms", "arms.name", "reference"}:
                table["reference"] = table["arms"][0]["name"]
    return None, left_out


def _without(table: dict[str, Any], place: Sequence[str | int]) -> str:
    """Remove the key of a fault: one of an arm, or otherwise the whole top-level key. Return its name."""
    top, arms = str(place[0]) if place else "", table.get("arms")
    if top == "arms" and len(place) > 2 and isinstance(arms, list) and isinstance(arms[int(place[1])], dict):
        arm, key = arms[int(place[1])], str(place[2])
        arm.pop(key, None)
        if key == "name":
            arm["name"] = f"arm-{place[1]}"
        return f"arms.{key}"
    table.pop(top, None)
    return top


def _references(study: Study, left_out: set[str]) -> Iterator[str]:
    """Yield faults of names and numbers that other keys give."""
    names = [arm.name for arm in study.arms]
    if len(set(names)) != len(names) or len(set(study.seeds)) != len(study.seeds):
        yield "two arms have the same name, or two seeds are the same; make each unique"
    known = [*study.stages, *(["base"] if study.base else [])]
    for name in study.resources.stages:
        if name not in known:
            yield f"resources.stages.{name}: there is no such stage; the stages are {', '.join(known)}"
    if study.tuning and set(study.tuning.seeds) & set(study.seeds):
        yield "tuning.seeds must not include a seed of the study; use different seeds"
    pairs = [(key, pair) for key in ("primary", "secondary") for pair in getattr(study, key)]
    if not left_out & {"arms", "arms.name"}:
        for key, name in dict.fromkeys(
            [("reference", study.reference), *((k, n) for k, p in pairs for n in p)]
        ):
            if name not in names:
                yield f"{key}: {name!r} is not an arm; the arms are {', '.join(names)}{did_you_mean(name, names)}"
    yield from (
        f"{key}: {a!r} is compared with itself; name two different arms" for key, (a, b) in pairs if a == b
    )
    reasons = {f"controls_off.{key}": why for key, why in study.controls_off.items()}
    reasons |= {f"allow_overlap.{key}": why for key, why in study.allow_overlap.items()}
    empty = [key for key, why in reasons.items() if not why.strip()]
    if empty:
        yield f"{', '.join(empty)}: a reason must not be empty; write why"


def _of_arms(study: Study, left_out: set[str]) -> Iterator[str]:
    for arm in study.arms:
        if arm.untuned and not study.tuning and "tuning" not in left_out:
            yield f"arms.{arm.name}.untuned is set, but the study has no trials; remove it"
        yield from _of_arm(study, arm, [other.name for other in study.arms])


def _of_arm(study: Study, arm: Arm, names: Sequence[str]) -> Iterator[str]:
    where, match = f"arms.{arm.name}", arm.equal_flops
    for stage in arm.stages:
        if stage not in study.stages:
            known = (", ".join(study.stages) or "none") + did_you_mean(stage, list(study.stages))
            yield f"{where}: there is no [stages.{stage}]; the stages are {known}"
    for key in arm.set:
        if key.partition(".")[0] not in arm.stages:
            known = ", ".join(arm.stages) or "no stages"
            yield f"{where}.set: {key!r} does not begin with a stage of the arm, which has {known}"
    if arm.num_seeds > len(study.seeds):
        yield f"{where}.num_seeds = {arm.num_seeds}, but the study has {len(study.seeds)} seeds"
    if not match:
        return
    if match.to not in names:
        yield f"{where}.equal_flops.to = {match.to!r} is not an arm"
        return
    goal = study.arm(match.to)
    if goal.equal_flops or len(study.seeds_of(goal)) < len(study.seeds_of(arm)):
        yield f"{where}.equal_flops.to: expected an arm without equal_flops and with at least as many seeds"
    if not arm.stages or match.step_like not in goal.stages:
        yield (
            f"{where}.equal_flops.step_like = {match.step_like!r} is not a stage of {goal.name} "
            f"(it has {', '.join(goal.stages) or 'none'}), or the arm itself has no stage"
        )


Kinds = Sequence[Any]  # of an arm's stages; the flag says whether a stage has the random reward
_CONTROL: dict[Control, tuple[str, Callable[[Kinds, bool], bool]]] = {
    "base": ("has no stages", lambda k, _: not k),
    "sft": ("has only SFT stages, at least one", lambda k, _: set(k) == {"sft"}),
    "sft-continued": ("has only SFT stages, at least two", lambda k, _: len(k) > 1 and set(k) == {"sft"}),
    "rl-from-base": ("starts with an RL stage", lambda k, _: k[:1] == ["rl"]),
    "random-reward": ('sets the reward of an RL stage to "random"', lambda _, random: random),
    "rejection": ("has a rejection stage", lambda k, _: "rejection" in k),
}


def _controls(study: Study) -> Iterator[str]:
    """Yield the controls that are left out without a declared reason, which the table prints."""
    there = [arm.control for arm in study.arms if arm.control]
    lacking = [c for c in CONTROLS if c not in there and c not in study.controls_off]
    if lacking:
        yield (
            f"the controls {', '.join(lacking)} are missing; add an arm for each, with control = "
            f'"{lacking[0]}" and so on, or leave them all out with a reason, which the table prints: '
            'controls_off = "..."'
        )
    for control in CONTROLS:
        if there.count(control) + (control in study.controls_off) > 1:
            yield f"the control {control!r} occurs twice; keep one arm, or only its reason in controls_off"
    for arm in study.arms:
        tables = [study.stages.get(name, {}) for name in arm.stages]
        if arm.control and not _is_control(arm, arm.control, tables):
            yield f"arms.{arm.name}: control = {arm.control!r} needs an arm that {_CONTROL[arm.control][0]}"


def _is_control(arm: Arm, control: Control, stages: Sequence[Mapping[str, Any]]) -> bool:
    rewards = [v for key, v in arm.set.items() if key.endswith(".reward")] + [s.get("reward") for s in stages]
    return _CONTROL[control][1]([stage.get("kind") for stage in stages], "random" in rewards)


def _check_run(draft: Draft, study: Study) -> None:
    """Check the parts of [run], each with the parts before it that have no fault."""
    run = {
        **study.run,
        **({"model": {**study.run.get("model", {}), "path": BASE_MODEL}} if study.base else {}),
    }
    draft.run = {"name": "study", "model": {"path": "tiny"}, "data": {}}
    draft.faults.add(*(f"run.{key}: the study sets it; remove it" for key in OWN_KEYS if key in run))
    if "model" not in run:
        draft.broken.add("model")
        draft.faults.add('run.model is missing; set run.model.path = "FOLDER" (or a file or hub id)')
    sets = run.pop("data", {})
    if not sets:
        draft.faults.add('run.data is missing; add a data set, [run.data.NAME] with source = "FILE"')
    for name, table in sets.items() if isinstance(sets, dict) else [("data", sets)]:
        if _fits(draft, "data", {**draft.run["data"], name: table} if isinstance(sets, dict) else sets):
            continue
        draft.broken.add(name)
        draft.run["data"][name] = {"source": "procedural:addition", "seed": 0}
    for key in [key for key in run if key not in OWN_KEYS]:
        if not _fits(draft, key, run[key]):
            draft.broken.add(key)
    for name, table in draft.run["data"].items():
        if str(table.get("source", "")).startswith(GENERATED) and not isinstance(table.get("seed"), int):
            draft.faults.add(
                f"run.data.{name}.seed: seeds and problems are crossed, so the problems must be the same for "
                f"all seeds; set run.data.{name}.seed = 0"
            )


def _fits(draft: Draft, key: str, part: Any) -> bool:
    """Add a part to the run, if it has no fault."""
    raw = {**draft.run, key: part}
    try:
        Settings.model_validate(raw)
    except ValidationError as error:
        draft.faults.add(*(f"run.{fault}" for fault in each_fault(error, Settings, raw)))
        return False
    draft.run = raw
    return True


def _check_arms(draft: Draft, study: Study, base_dir: Path) -> None:
    """Check every arm's stages, methods, options and faults, its learning rate at every factor of the trials,
    and that it differs from the reference only in what is declared."""
    for arm in study.arms:
        if any(name not in study.stages for name in arm.stages):
            continue
        num = len(draft.faults.found)
        with draft.faults.caught():
            tables = stage_tables(study, arm)
            draft.stages[arm.name] = []
            faults = [fault for table in tables for fault in _of_stage(draft, arm, table)]
            if not faults:
                faults = _of_stages(draft, study, arm, tables, base_dir)
            draft.faults.add(*faults)
            if not faults and num == len(draft.faults.found):
                draft.good.append(arm)
    reference = next((arm for arm in draft.good if arm.name == study.reference), None)
    for arm in draft.good if reference and not draft.broken else ():
        for key, (theirs, own) in differences(study, arm).items():
            if not any(fnmatch.fnmatch(key, pattern) for pattern in study.may_differ):
                draft.faults.add(
                    f"arms.{arm.name}: {key} = {own!r} differs from {theirs!r} in {study.reference} and is "
                    f'not declared; add "{key}" to may_differ = [...], or use the same value'
                )


def _of_stage(draft: Draft, arm: Arm, table: Mapping[str, Any]) -> list[str]:
    raw = {**draft.run, "stages": [table]}
    try:
        draft.stages[arm.name] += Settings.model_validate(raw).stages
    except ValidationError as error:
        return [_named(arm, fault) for fault in each_fault(error, Settings, raw)]
    return []


def _of_stages(
    draft: Draft, study: Study, arm: Arm, tables: Sequence[Mapping[str, Any]], base_dir: Path
) -> list[str]:
    """Return the faults of an arm whose stages are valid one by one."""
    tuning, found = study.tuning_of(arm), Faults()
    for factor in (1.0, *(tuning.factors if tuning else ())):
        last = [scaled(table, factor) for table in tables[-1:]]
        if arm.equal_flops:
            last = [with_steps(table, 1) for table in last]
        raw = {**draft.run, "stages": [*tables[:-1], *last]}
        try:
            settings = Settings.model_validate(raw)
        except ValidationError as error:
            trial = "" if factor == 1.0 else f" (in the trials with factor {factor:g})"
            found.add(*(f"arms.{arm.name}: {fault}{trial}" for fault in each_fault(error, Settings, raw)))
            continue
        with found.caught():
            check_methods(settings, base_dir)
    return [_named(arm, fault) for fault in found.found]


def _named(arm: Arm, fault: str) -> str:
    """Begin a fault with the arm, if it is in a key that the arm sets."""
    return (
        f"arms.{arm.name}: {fault}" if fault.startswith(tuple(f"stages.{key}" for key in arm.set)) else fault
    )


def _roles(draft: Draft, study: Study) -> Iterator[str]:
    """Yield data sets that are not there, or are used for two purposes that exclude each other."""
    sets, evaluate = draft.run["data"], draft.run.get("evaluate", {})
    if evaluate.get("benchmarks"):
        yield (
            "run.evaluate.benchmarks: a study evaluates data sets; add the file as [run.data.NAME] with source = "
            '"FILE", and set run.evaluate.data = ["NAME"]'
        )
    elif not evaluate.get("data") and "evaluate" not in draft.broken:
        yield 'run.evaluate.data is empty, but a study compares scores; set run.evaluate.data = ["..."]'
    if study.tuning and study.tuning.data not in sets:
        yield f"tuning.data = {study.tuning.data!r} is not in [run.data]{did_you_mean(study.tuning.data, list(sets))}"
    watched = (data for stages in draft.stages.values() for s in stages for data in s.watched_data.values())
    if study.tuning and study.tuning.data in watched:
        yield (
            f"tuning.data = {study.tuning.data!r} also chooses a stage's checkpoint or its end; use a separate data set: "
            "the trials are compared by their scores on it"
        )
    for name in study.allow_overlap:
        if name not in sets:
            yield f"allow_overlap.{name}: there is no [run.data.{name}]{did_you_mean(name, list(sets))}"
    trained, chosen, tested = roles(draft, study)
    for names, others, first, use in (
        (tested, chosen, "testing", "selection"),
        (tested, trained, "testing", "training"),
        (chosen, trained, "selection", "training"),
    ):
        for name in names:
            if name in others and name not in study.allow_overlap:
                yield f"data.{name} is used both for {first} and for {use}; use a separate data set"


def roles(draft: Draft, study: Study) -> tuple[list[str], list[str], list[str]]:
    """Return the data sets that train, those that choose learning rates, checkpoints or when to stop, and those
    that test."""
    stages = [stage for of_arm in draft.stages.values() for stage in of_arm]
    trained = [name for stage in stages for name in stage.data_names]
    chosen = [name for stage in stages for name in stage.watched_data.values()]
    chosen += [study.tuning.data] if study.tuning else []
    tested = list(draft.run.get("evaluate", {}).get("data", ()))
    return tuple(list(dict.fromkeys(names)) for names in (trained, chosen, tested))  # type: ignore[return-value]
