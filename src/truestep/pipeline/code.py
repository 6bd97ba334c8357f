"""Hashes of a recipe's own code. torch is not imported, because a study needs the hashes before any run."""

from __future__ import annotations

from pathlib import Path

from truestep.rewards.scorer import sources
from truestep.settings import RlSettings, StageSettings
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
