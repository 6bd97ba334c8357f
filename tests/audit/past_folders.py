"""Folders of past runs, made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from truestep.audit.postmortem import answers
from truestep.audit.postmortem.measured import MEASURED
from truestep.audit.present.past import answer_row


def place(package: str, *kinds: str, key: str = "") -> int:
    """The index of a measured fault."""
    (found,) = [
        i
        for i, m in enumerate(MEASURED)
        if m.package == package
        and set(kinds) == set(m.kinds)
        and (not key or key in {n.key for n in m.needs})
    ]
    return found


OFFLOAD = place("deepspeed", "kept_first_and_last")
BOUNDARY = place("deepspeed", "kept_last")
MEANS = place("transformers", "micro_mean")
SUMS = place("transformers", "micro_mean", "accumulation_missing")
OWN = place("transformers", "rank_mean")
OPENRLHF = place("openrlhf", "micro_mean", "not_finite_after_empty")
Z2 = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def write(folder: Path, **files: Any) -> Path:
    """``ds__json={...}`` becomes ds.json; a text is written as it is."""
    for name, value in files.items():
        path = folder / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def freeze(*pins: str) -> str:
    """As of a whole environment."""
    others = [f"package-{i}==1.{i}" for i in range(10)]
    return "\n".join(["# pip freeze", "torch==2.6.0+cu124", *others, *pins, "mine @ file:///src/mine"])


def look_back(folder: Path) -> list[Any]:
    """The answers, with their reasons in words."""
    return [SimpleNamespace(**answer_row(answer)) for answer in answers.look_back(folder)]


def offload(folder: Path) -> Any:
    return look_back(folder)[OFFLOAD]


def deepspeed(version: str = "0.18.9", zero: Any = Z2, accumulation: Any = 4) -> dict[str, Any]:
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation}
    return {"freeze__txt": f"deepspeed=={version}\n", "ds__json": {**config, "zero_optimization": zero}}


STATE = {"best_metric": None, "global_step": 12, "log_history": [{"loss": 1.0, "grad_norm": 0.3}]}
