"""``truestep eval MODEL`` and ``truestep eval RECIPE``: pinned benchmarks, or a recipe's own data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from truestep.cli.evaluation import option, words_of
from truestep.cli.progress import announce
from truestep.cli.run import Json, Resume

_MODEL = "A model (folder, hub id, or its name on a server), or a recipe (.toml)."
_IDS = "Comma-separated ids; truestep eval list shows them all."
_TEMPLATES = "Comma-separated prompt templates: paper, qwen, plain, completion, brief, odd."
_DATA = "Folder with ID.jsonl, .parquet or .csv of each benchmark."
_ENGINE = "torch, vllm, or the URL of an OpenAI-compatible endpoint."
_OWN = "each benchmark's"
_SET = "Change any other setting: --set temperature=0. May be repeated."
_DRY_RUN = "Check everything, count tokens and memory, and sample nothing."


def evaluate(
    model: Annotated[str, typer.Argument(help=_MODEL, metavar="MODEL", show_default=False)],
    benchmarks: Annotated[str, option("--benchmarks", _IDS)] = "",
    data: Annotated[str, option("--data", _DATA, "the Hugging Face hub")] = "",
    limit: Annotated[int | None, option("--limit", "Problems of each benchmark.", "all", min=1)] = None,
    samples: Annotated[int | None, option("--samples", "Samples of each problem.", _OWN, min=1)] = None,
    prompts: Annotated[str, option("--prompts", _TEMPLATES, _OWN)] = "",
    few_shot: Annotated[
        int | None, option("--few-shot", "Worked examples before each problem.", "0", min=0)
    ] = None,
    engine: Annotated[str, option("--engine", _ENGINE, "torch")] = "",
    overrides: Annotated[list[str] | None, option("--set", _SET, False)] = None,
    out: Annotated[Path | None, option("--out", "The run directory.", "runs/NAME-HASH")] = None,
    resume: Resume = False,
    dry_run: Annotated[bool, option("--dry-run", _DRY_RUN)] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on benchmarks, or a training recipe's model on the recipe's own data sets."""
    announce(f"truestep eval: reading {model} and the benchmarks")
    from truestep.cli import eval_actions

    given: dict[str, Any] = {
        "benchmarks": words_of(benchmarks), "folder": data, "limit": limit, "samples_per_problem": samples,
        "prompts": words_of(prompts), "few_shot": few_shot, "engine": engine,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value not in (None, "", [])}
    how = {"resume": resume, "dry_run": dry_run, "as_json": as_json}
    eval_actions.evaluate(model, given, overrides or (), out, **how)
