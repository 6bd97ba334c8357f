"""The history of a run (RUN/history.json): the settings that were changed after a stage had begun, and hashes of what the
run was made from. It is what makes ``--change`` repeatable, and what names the cause if a run cannot be continued.

The identity of a changed stage is that of its first settings plus the list of changes, so a checkpoint from before a
change belongs to the stage only at the step of that change."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from truestep import rundir
from truestep.checkpoint.store import latest_step
from truestep.errors import UserError
from truestep.frozen import Frozen
from truestep.pipeline.code import with_absolute_paths
from truestep.settings import (
    OUTSIDE_COMPUTE,
    OUTSIDE_RESULTS,
    Settings,
    StageSettings,
    load_settings,
    override,
    parse,
    parse_settings,
    table_of,
)

if TYPE_CHECKING:
    from truestep.pipeline.prepare import Prepared

MEASURES = ("*.dev.*", "*.validation.*", "evaluate.*")
CHANGEABLE = (
    "stages.*.steps",
    "stages.*.epochs",
    "stages.*.optimizer.*",
    "stages.*.early_stopping.*",
    *MEASURES,
)
_MAY = (
    "only steps, epochs, optimizer (except kind), dev, validation and early_stopping of a stage, and evaluate"
)
Values = Mapping[str, Any]


class Change(Frozen):
    """Settings that a run was continued with. ``stage`` is "" if they concern only the run's evaluations."""

    stage: str
    step: int  # steps of the stage that were done before
    values: dict[str, tuple[Any, Any]]  # by key: before, after
    command: tuple[str, ...] = ()


class History(Frozen):
    """``content`` and ``code`` are the hashes of a Prepared; ``changes`` are in the order in which they were made."""

    changes: tuple[Change, ...] = ()
    content: dict[str, str] = Field(default_factory=dict)
    model_content: str | None = None
    code: dict[str, dict[str, str]] = Field(default_factory=dict)
    named: dict[str, tuple[Any, Any]] = Field(
        default_factory=dict
    )  # models and code by key: as in the recipe, absolute

    def of(self, stage: str) -> list[Change]:
        return [change for change in self.changes if change.stage == stage]

    def first(self) -> dict[str, Any]:
        """Return the values with which the run began, of the keys that were changed."""
        return {key: pair[0] for change in reversed(self.changes) for key, pair in change.values.items()}

    def last(self) -> dict[str, Any]:
        return {key: pair[1] for change in self.changes for key, pair in change.values.items()}


def read_history(folder: Path) -> History:
    """Return a run's history, which is empty for a new run. Raises UserError if it is damaged."""
    path = folder / "history.json"
    return parse(History, rundir.read_json(path), where=str(path)) if path.exists() else History()


def write_history(folder: Path, prepared: Prepared) -> None:
    """Write what the run is made from now. What no longer belongs to the recipe is kept, for the identities."""
    old, now = read_history(folder), prepared.history
    absolute = flat(with_absolute_paths(prepared.settings, prepared.base_dir))
    named = {
        key: (value, absolute[key])
        for key, value in flat(prepared.named).items()
        if value != absolute[key] and key.startswith(("model.", "stages.")) and key not in old.named
    }
    made = {
        "content": {**old.content, **prepared.content}, "code": {**old.code, **prepared.code},
        "named": {**old.named, **named},
    }  # fmt: skip
    whole = now.model_copy(update={**made, "model_content": prepared.model_content})
    rundir.write_json(folder / "history.json", whole.model_dump(mode="json"))


def stage_folder(run: Path, index: int, stage: StageSettings) -> Path:
    return run / "stages" / f"{index + 1:02d}-{stage.name}"


def has_begun(stage: Path) -> bool:
    return (stage / "done.json").exists() or latest_step(stage / "checkpoints") > 0


def flat(settings: Settings) -> dict[str, Any]:
    """Return every setting by its key, such as "stages.sft.optimizer.lr"."""
    table = table_of(settings)
    table["stages"] = {stage["name"]: stage for stage in table["stages"]}
    return dict(_leaves(table, ""))


def _leaves(table: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        is_table = isinstance(value, dict) and value
        found += _leaves(value, f"{prefix}{key}.") if is_table else [(prefix + key, value)]
    return found


def with_values(settings: Settings, values: Values) -> Settings:
    """Return the settings with other values. Keys of stages that the settings do not have are left out."""
    table, known = table_of(settings), {s.name: i for i, s in enumerate(settings.stages)}
    for key, value in values.items():
        top, *path = key.split(".")
        node = table[top]
        if top == "stages":
            if path[0] not in known:
                continue
            node, path = node[known[path[0]]], path[1:]
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = copy.copy(value)
    return parse_settings(table, where=settings.name)


def continued(settings: Settings, history: History, wanted: Sequence[str] = ()) -> Settings:
    """Return the recipe's settings with all changes, of which ``wanted`` are the items of this command's ``--change``.
    Raises UserError if the recipe has a third value for another key."""
    first, last, now = history.first(), history.last(), flat(settings)
    given = _keys(settings, wanted)
    for key, value in last.items():
        if key in now and now[key] not in (first[key], value) and not _is_within(key, given):
            raise UserError(
                f"{key} is {value!r} in this run since a --change, but {now[key]!r} in the recipe; pass --change "
                f"{key}={json.dumps(now[key])} to change it again, or set it to {value!r}"
            )
    return _overridden(with_values(settings, last), wanted)


def _overridden(settings: Settings, wanted: Sequence[str]) -> Settings:
    return parse_settings(override(table_of(settings), wanted, flag="--change"), where="--change")


def _keys(settings: Settings, wanted: Sequence[str]) -> list[str]:
    """Return the keys that the items set, with stages by their names. A key can be that of a table."""
    table: dict[str, Any] = {"stages": [{"name": s.name, "kind": s.kind} for s in settings.stages]}
    override(table, [f"{item.partition('=')[0]}=0" for item in wanted], flag="--change")
    table["stages"] = {stage["name"]: stage for stage in table["stages"]}
    return [key for key, _ in _leaves(table, "")]


def _is_within(key: str, tables: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{table}.") for table in tables)


def begun_with(settings: Settings, history: History) -> Settings:
    """Return the settings with which the run's stages began."""
    return with_values(settings, history.first())


def as_named(settings: Settings, base_dir: Path, history: History) -> Settings:
    """Return the settings with the names that files had in the recipe with which the run was begun, as far as they
    are the same files. Identities contain these names; RUN/resolved.toml has absolute ones."""
    now = flat(with_absolute_paths(settings, base_dir))
    return with_values(settings, {k: name for k, (name, path) in history.named.items() if now.get(k) == path})


def changed(settings: Settings, folder: Path, wanted: Sequence[str], command: Sequence[str]) -> History:
    """Return the history of the run in ``folder``, with the ``KEY=VALUE`` items of ``--change``. Nothing is written.
    What is changed is the run's value, which is in resolved.toml; the recipe can have another one.

    Raises UserError if there is no run, or if a key may not be changed or belongs to a stage that others build on."""
    history = read_history(folder)
    if not wanted:
        return history
    if not (folder / "resolved.toml").exists():
        raise UserError(
            f"{folder} is not a run that could be changed; pass its --out, or use --set for a new run"
        )
    run = {**flat(load_settings(folder / "resolved.toml")), **history.last()}
    known = flat(settings)
    before = with_values(settings, {key: value for key, value in run.items() if _may(key) and key in known})
    old, new = flat(before), flat(_overridden(before, wanted))
    found = {key: (old[key], value) for key, value in new.items() if old.get(key) != value}
    for key in found:
        if not _may(key):
            raise UserError(f"--change {key}: {_MAY}, can be changed in a run; {rundir.ELSEWHERE}")
    return history.model_copy(
        update={"changes": (*history.changes, *_by_stage(before, folder, found, command))}
    )


def _by_stage(
    settings: Settings, folder: Path, found: Mapping[str, tuple[Any, Any]], command: Sequence[str]
) -> list[Change]:
    folders = {stage.name: stage_folder(folder, i, stage) for i, stage in enumerate(settings.stages)}
    begun = [name for name, path in folders.items() if has_begun(path)]
    made: dict[str, dict[str, tuple[Any, Any]]] = {}
    for key, pair in found.items():
        name = key.split(".")[1] if key.startswith("stages.") else ""
        if not name and key.startswith("evaluate.sampling."):  # a dev score uses it, too
            running = [n for n in begun if not (folders[n] / "done.json").exists()]
            name = next((s.name for s in settings.stages if s.name in running and s.dev.data), "")
        if name in begun and name != begun[-1]:
            later = folders[begun[begun.index(name) + 1]]
            raise UserError(
                f"--change {key}: {later} began with the model of {name}; {rundir.ELSEWHERE}, or delete {later} to train it "
                "again"
            )
        made.setdefault(name, {})[key] = pair
    steps = {name: latest_step(path / "checkpoints") for name, path in folders.items()}
    return [
        Change(stage=name, step=steps.get(name, 0), values=values, command=tuple(command))
        for name, values in made.items()
    ]


def said(history: History, since: int = 0) -> list[str]:
    """Return one line for each changed key."""
    return [
        f"{key}: {before!r} → {after!r}"
        + (f", after step {change.step} of {change.stage}" if change.stage else "")
        for change in history.changes[since:]
        for key, (before, after) in change.values.items()
    ]


def differing(prepared: Prepared, index: int, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return the values, in the run and now, of the settings on which stage ``index`` depends and which differ."""
    settings = prepared.settings
    old, new = flat(load_settings(folder / "resolved.toml")), flat(settings)
    absolute = flat(with_absolute_paths(settings, prepared.base_dir))  # as in resolved.toml
    other = [key for key in {**new, **old} if old.get(key) not in (new.get(key), absolute.get(key))]
    return {key: (old.get(key), new.get(key)) for key in other if _counts(key, settings, index)}


def num_lost_steps(stage: Path) -> int:
    """Return the number of steps that a stage has logged but not saved in any checkpoint; 0 if it has one."""
    logged = stage / "metrics.jsonl"
    if has_begun(stage) or not logged.exists():
        return 0
    return len({row["step"] for row in rundir.read_jsonl(logged) if row.get("step")})


def difference(prepared: Prepared, index: int, folder: Path) -> str:
    """Say what differs between the begun stage ``index`` in ``folder`` and the recipe, and what to do."""
    settings, stage = prepared.settings, prepared.settings.stages[index]
    where = stage_folder(folder, index, stage)
    again = f"{rundir.ELSEWHERE}, or delete {where} to train the stage again"
    for key, (old, new) in differing(prepared, index, folder).items():
        remedy = f"pass --change {key}={json.dumps(new)} to change it from here on, " if _may(key) else ""
        return f"{where} was begun with {key} = {old!r}, but the recipe has {new!r}; {remedy}{again}"
    history = read_history(folder)
    for earlier in settings.stages[: index + 1]:
        for name in (*earlier.data_names, *earlier.watched_data.values()):
            if history.content.get(name, prepared.content[name]) != prepared.content[name]:
                return f"{where} was begun with other rows of data.{name}; restore them, or {again}"
        if history.code.get(earlier.name, code := prepared.code[earlier.name]) != code:
            return f"{where} was begun with other code of stages.{earlier.name} ({', '.join(code)}); restore it, or {again}"
    if history.model_content not in (None, prepared.model_content):
        return f"{where} was begun with other files of model.path = {settings.model.path!r}; restore them, or {again}"
    return f"{where} was begun with other data, or by a version of truestep with other settings; {again}"


def _may(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in CHANGEABLE) and not key.endswith(".optimizer.kind")


def _counts(key: str, settings: Settings, index: int) -> bool:
    """Return whether the stage's result depends on a setting."""
    top, *path = key.split(".")
    stages = settings.stages[: index + 1]
    if top == "stages":
        return (
            path[0] in [s.name for s in stages]
            and path[1] not in OUTSIDE_RESULTS
            and path[-1] != "max_running"
        )
    if top == "compute":
        return path[0] not in OUTSIDE_COMPUTE
    is_dev = top == "evaluate" and path[0] == "sampling" and path[-1] != "max_running"
    return top in ("seed", "model", "chat") or (is_dev and any(s.dev.data for s in stages))
