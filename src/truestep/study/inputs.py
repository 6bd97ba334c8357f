"""Checks the data, model and code of a study before anything is trained, with the checks of ``truestep run``.

The stages of all arms are checked as one run, so that every data set is read once. The real run and the dry run
do the same checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from truestep.data.overlap import problem_text, same_problems
from truestep.data.problems import load_problems
from truestep.errors import Faults, UserError
from truestep.pipeline.prepare import Prepared, prepare, read_problems, usable_methods
from truestep.records import Problem
from truestep.settings import ModelSettings, Settings, Stage, StageSettings
from truestep.study.cell_runner import base_recipe, local_model
from truestep.study.engines import check_engine
from truestep.study.load import Draft, read_draft, read_toml, refuse, roles
from truestep.study.plan import Study

Sets = dict[str, list[Problem]]
SHOWN = 60  # characters of an example


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of a study without faults: ``prepared`` is the stages of all arms as one run, and ``stages`` has
    the names that an arm's stages have there."""

    prepared: Prepared
    stages: dict[str, list[str]]


def checked_study(path: Path, engine: str = "local") -> tuple[Study, Inputs]:
    """Read a study and check everything that can be checked before training. Raises UserError that lists every
    fault."""
    draft = read_draft(read_toml(path), str(path))
    inputs = _inputs(draft, path, engine) if draft.study is not None else None
    refuse(draft.faults, str(path))
    assert draft.study is not None
    assert inputs is not None
    return draft.study, inputs


def check_inputs(study: Study, path: Path) -> Inputs:
    """Check the inputs of a study that has been read from ``path``. Raises UserError."""
    draft = read_draft(study.model_dump(mode="json", exclude_unset=True), str(path))
    inputs = _inputs(draft, path, "ray")
    refuse(draft.faults, str(path))
    assert inputs is not None
    return inputs


def _inputs(draft: Draft, path: Path, engine: str) -> Inputs | None:
    study, folder = draft.study, path.parent
    assert study is not None
    with draft.faults.caught():
        check_engine(engine, study)
    base = _base(draft.faults, study, path)
    names, stages, labels = _every_stage(draft, study)
    settings = _as_one_run(draft, study, stages, folder, base)
    found = Faults()
    methods = usable_methods(settings, folder, found)
    problems = read_problems(settings, methods, folder, found)
    if len(draft.good) < len(
        study.arms
    ):  # sets of stages with a fault are read, too, to list what is wrong in them
        for name in draft.run["data"].keys() - problems.keys() - draft.broken - _used(settings):
            with found.caught():
                data = settings.data[name]
                problems[name] = load_problems(name, data, seed=settings.seed, base_dir=folder, needs=())
    found.add(*_shared(draft, study, problems, base))
    prepared = None
    if "model" not in draft.broken and not (study.base and base is None):
        used = {name: of_set for name, of_set in problems.items() if name in _used(settings)}
        with found.caught():
            prepared = prepare(settings, base_dir=folder, problems=used)
    draft.faults.add(*_relabeled(found.found, labels))
    return None if prepared is None else Inputs(prepared=prepared, stages=names)


def _base(faults: Faults, study: Study, path: Path) -> Prepared | None:
    """Check the recipe of the pinned base. Return None without one, or if it has a fault."""
    if not study.base:
        return None
    try:
        recipe = base_recipe(path, study)
        return prepare(recipe, base_dir=(path.parent / study.base).parent)
    except UserError as error:
        faults.add(*(fault if study.base in fault else f"{study.base}: {fault}" for fault in error.faults))
        return None


def _every_stage(
    draft: Draft, study: Study
) -> tuple[dict[str, list[str]], list[Stage], dict[str, tuple[str, str]]]:
    """Return the names of every arm's stages in one run of all different stages, these stages, and the arm and stage
    of those that an arm has changed."""
    made: dict[str, Stage] = {}
    names: dict[str, list[str]] = {}
    labels: dict[str, tuple[str, str]] = {}
    for number, arm in enumerate(study.arms):
        names[arm.name] = []
        for stage in draft.stages.get(arm.name, ()):
            if draft.broken & {*stage.data_names, *stage.watched_data.values()}:
                continue
            versions = [stage.name, *(name for name, (_, of) in labels.items() if of == stage.name)]
            same = [
                n for n in versions if n in made and made[n].model_copy(update={"name": stage.name}) == stage
            ]
            name = same[0] if same else stage.name if stage.name not in made else f"{stage.name}--{number}"
            if name not in made:
                made[name] = stage.model_copy(update={"name": name})
                labels |= {name: (arm.name, stage.name)} if name != stage.name else {}
            names[arm.name].append(name)
    return names, list(made.values()), labels


def _relabeled(faults: Sequence[str], labels: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return faults with the stages' names in the file. One that an arm has in common with others is left out."""
    found: list[str] = []
    for fault in faults:
        text, owner = fault, ""
        for made, (arm, stage) in labels.items():
            if (
                replaced := re.sub(rf"\bstages\.{re.escape(made)}(?=[.: ])", f"stages.{stage}", text)
            ) != text:
                text, owner = replaced, f"arms.{arm}: "
        found += [] if text in found else [owner + text]
    return found


def _as_one_run(
    draft: Draft, study: Study, stages: Sequence[Stage], folder: Path, base: Prepared | None
) -> Settings:
    """Return one run with these stages, which tests and tunes on all sets on which a cell or a trial does. The model
    of a study with a base is the base's."""
    settings = Settings.model_validate({**draft.run, "seed": study.seeds[0]})
    tested = [*settings.evaluate.data, *([study.tuning.data] if study.tuning else [])]
    known = [name for name in dict.fromkeys(tested) if name in settings.data and name not in draft.broken]
    model = settings.model
    if base is not None:
        own = {key: getattr(model, key) for key in model.model_fields_set - {"path", "tiny"}}
        model = base.settings.model.model_copy(update=own)
    elif place := local_model(model.path, folder):
        model = ModelSettings.model_validate({**model.model_dump(), "path": str(place)})
    evaluate = settings.evaluate.model_copy(update={"data": tuple(known)})
    return settings.model_copy(update={"model": model, "evaluate": evaluate, "stages": tuple(stages)})


def _used(settings: Settings) -> set[str]:
    return {*settings.evaluate.data, *(name for stage in settings.stages for name in _sets_of(stage))}


def _sets_of(stage: StageSettings) -> list[str]:
    return [*stage.data_names, *stage.watched_data.values()]


def _shared(draft: Draft, study: Study, problems: Sets, base: Prepared | None) -> list[str]:
    """Return a fault for each set that contains problems of a set of which it must be independent, by their text."""
    trained, chosen, tested = (
        {f"data.{name}": problems[name] for name in names if name in problems}
        for names in roles(draft, study)
    )
    if base is not None:
        of_base = {name for stage in base.settings.stages for name in stage.data_names}
        trained |= {f"data.{name} of {study.base}": base.problems[name] for name in sorted(of_base)}
    found = []
    for name, judged in {**chosen, **tested}.items():
        if name.removeprefix("data.") in study.allow_overlap:
            continue
        for other, theirs in {**trained, **(chosen if name in tested else {})}.items():
            if other != name and (pairs := list(same_problems(judged, theirs))):
                mine, first = pairs[0]
                found.append(
                    f"{name}: {len(pairs)} of {len(judged)} problems are also in {other}: {mine.row or mine.id} "
                    f"({problem_text(mine)[:SHOWN]!r}) is {first.row or first.id}; remove them from one of the two, or "
                    f'allow them with a reason, allow_overlap.{name.removeprefix("data.")} = "..."'
                )
    return found
