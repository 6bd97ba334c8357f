"""Runs of one stage of a few steps, all from the same model that a short SFT has made."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_runs import go, prepared, write_recipe

from truestep.objective.methods import METHODS

RECIPE = """
name = "method"

[model]
path = "{path}"

[compute]
threads = 1

[data.train]
source = "train.jsonl"

[[stages]]
kind = "{kind}"
data = "train"
steps = {steps}
tokens_per_microbatch = 96
save_every = 2
method = "{method}"
method_options = {options}
optimizer = {{ lr = 5e-3 }}
{more}
"""
RL = """prompts_per_step = 4
samples_per_prompt = 4
sampling = { max_new_tokens = 3, max_running = 8 }"""
SFT = "sequences_per_step = 8"
# What makes a row's own machinery work within a few steps.
OPTIONS: dict[str, dict[str, float | str | bool]] = {
    "relift": {"buffer_size": 3, "buffer_lr": 1e-3},
    "exgrpo": {"replay_start": 0.0},
    "sasr": {"warmup_steps": 1},
    "super_rl": {"learned_weights": True, "sigma_rate": 0.1},
    "uft": {"prefix_steps": 1000},
}


def start(folder: Path) -> str:
    """The model folder that all runs start from: it solves some problems, and not others."""
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text().replace('[evaluate]\ndata = ["test"]', "[evaluate]\ndata = []"))
    go(prepared(recipe, "stages.rl.steps=1"), folder / "run")
    return str(folder / "run/stages/01-sft/export")


def recipe_of(
    folder: Path, model: str, method: str, *, steps: int = 2, solutions: bool = True, more: str = ""
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"q{i}", "problem": f"{i}+{j}", "answer": str(j % 2), "checker": "exact"}
        | ({"solution": str(j % 2)} if solutions else {})
        for i, j in ((i, (i * 7) % 4) for i in range(12))
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = METHODS[method]().plan is not None
    options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in OPTIONS.get(method, {}).items())
    text = RECIPE.format(
        path=model,
        kind="rl" if samples else "sft",
        steps=steps,
        method=method,
        options="{" + options + "}",
        more=(RL if samples else SFT) + "\n" + more,
    )
    path = folder / "run.toml"
    path.write_text(text)
    return path
