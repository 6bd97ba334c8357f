"""``truestep study flops``, which compares the FLOPs of recipes before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.pipeline.paper_plan import flops_of, read_declared, stage_work
from truestep.settings import RlSettings, Settings, SftSettings, load_settings

COUNTS = {"flops_paper_formula": "the paper's formula", "flops_full": "the fuller count"}


def flops_table(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the FLOPs of every recipe in these files and folders, by both counts, and compare SFT-then-RL
    with RL-only recipes for the same model. Raises UserError if there are no recipes.

    Source: arXiv:2604.23747, table 6 (6ND per demonstration token, 8ND per rollout token)
    Held by: tests/study/test_paper_recipes.py"""
    arms: list[dict[str, Any]] = []
    loaded: dict[str, tuple[Settings, Path]] = {}
    files = [file for path in paths for file in (sorted(path.glob("*.toml")) if path.is_dir() else [path])]
    if not files:
        raise UserError(
            f"{', '.join(map(str, paths))}: there is no recipe (.toml); pass a folder with recipes, or recipe files"
        )
    for path in files:
        settings = load_settings(path)
        if not settings.declared:
            raise UserError(f"{path} has no [declared] lengths; add them, or pass other recipes")
        loaded[settings.name] = settings, path
        arms.append({
            "name": settings.name, "model": settings.model.path, "kinds": [s.kind for s in settings.stages],
            **flops_of(settings, path.parent, str(path)),
        })  # fmt: skip
    return {"arms": arms, "claims": [claim for arm in arms for claim in _claims(arm, arms, loaded)]}


def _claims(
    arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], loaded: Mapping[str, tuple[Settings, Path]]
) -> list[dict[str, Any]]:
    """Compare an SFT-then-RL arm's FLOPs with each RL-only arm's, and find the RL steps where they match."""
    if arm["kinds"] != ["sft", "rl"]:
        return []
    settings, path = loaded[arm["name"]]
    sft, rl = settings.stages
    assert isinstance(sft, SftSettings)
    assert isinstance(rl, RlSettings)
    samples = stage_work(rl, read_declared(settings, str(path))).rollout_tokens
    only_sft = flops_of(settings.model_copy(update={"stages": (sft,)}), path.parent, str(path))
    claims = []
    for other in arms:
        if other["model"] != arm["model"] or other["kinds"] != ["rl"]:
            continue
        row: dict[str, Any] = {"arm": arm["name"], "against": other["name"], "steps": rl.steps}
        for key in COUNTS:
            a, b, start = arm[key], other[key], only_sft[key]
            steps = max(0.0, (b - start) / ((a - start) / rl.steps))
            row[key] = {"ratio": a / b, "fewer": a < b, "equal_at_steps": steps}
        row["own_tokens_per_prompt"] = samples / (rl.steps * rl.prompts_per_step)
        claims.append(row)
    return claims


def sentences(table: Mapping[str, Any]) -> list[str]:
    """Return the claims in words, one line each."""
    lines = []
    for claim in table["claims"]:
        parts = []
        for found, name in ((claim[key], name) for key, name in COUNTS.items()):
            word, steps = "fewer" if found["fewer"] else "more", f"{found['equal_at_steps']:.0f} RL steps"
            parts.append(f"{found['ratio']:.2f}x by {name} ({word}; the same at {steps})")
        lines.append(f"{claim['arm']} compared with {claim['against']}: " + ", ".join(parts))
    return lines
