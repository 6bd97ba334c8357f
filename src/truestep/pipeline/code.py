"""The files that a recipe names: hashes of its own code, and absolute paths. torch is not imported, because a
study needs the hashes before any run."""

from __future__ import annotations

from pathlib import Path

from truestep.data.files import absolute_source
from truestep.model.packaged import PACKAGED
from truestep.rewards.scorer import sources
from truestep.settings import RlSettings, Settings, StageSettings
from truestep.user_code import find_source


def code_of(stage: StageSettings, base_dir: Path) -> dict[str, str]:
    """Return the hashes of the recipe's own code that a stage runs, by the code's name in the recipe."""
    found = {}
    method = getattr(stage, "method", "")
    if ":" in method:
        found[method] = find_source(method, base_dir, what="method").sha256
    if isinstance(stage, RlSettings):
        entries = sources(stage.reward_entries, base_dir)
        found |= {name: source.sha256 for name, source in entries.items() if source.sha256}
    return found


def with_absolute_code(settings: Settings, base_dir: Path) -> Settings:
    """Return the settings with absolute paths of methods, rewards and trackers. Modules (PACKAGE.MODULE:NAME) stay as
    they are."""

    def code(named: str) -> str:
        place, _, function = named.rpartition(":")
        return (
            f"{(base_dir / Path(place).expanduser()).resolve()}:{function}"
            if place.endswith(".py")
            else named
        )

    def stage(s: StageSettings) -> StageSettings:
        changed: dict[str, object] = {"method": code(s.method)} if hasattr(s, "method") else {}
        if isinstance(s, RlSettings):
            rewards = tuple(r.model_copy(update={"function": code(r.function)}) for r in s.rewards)
            changed |= {"reward": code(s.reward), "rewards": rewards}
        return s.model_copy(update=changed)

    trackers = tuple(map(code, settings.trackers))
    return settings.model_copy(update={"stages": tuple(map(stage, settings.stages)), "trackers": trackers})


def with_absolute_paths(settings: Settings, base_dir: Path) -> Settings:
    """Return the settings with absolute paths of the files and folders that they name, so that they mean the same
    in any folder."""
    data = {
        name: d.model_copy(update={"source": absolute_source(d, base_dir)})
        for name, d in settings.data.items()
    }
    name = settings.model.path
    is_file = name not in ("tiny", *PACKAGED) and Path(name).exists()
    model = (
        settings.model.model_copy(update={"path": str(Path(name).absolute())}) if is_file else settings.model
    )
    return with_absolute_code(settings, base_dir).model_copy(update={"model": model, "data": data})
