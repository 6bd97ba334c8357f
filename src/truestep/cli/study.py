"""``truestep study STUDY.toml`` and ``truestep study flops RECIPES``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from truestep.cli.run import Json

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="STUDY.toml | flops RECIPE...",
        help="The study, a TOML file; or the word flops and recipes (files or folders) to count.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="The study directory.", show_default="runs/study-NAME")
]
Keep = Annotated[
    Path | None,
    typer.Option(
        "--results", help="Also keep compact results in this folder; cells found there are not run again."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="How many cells run at the same time.", show_default="the study's"),
]
EngineName = Annotated[
    str, typer.Option("--engine", help="What runs the cells: local (child processes) or ray (a Ray cluster).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the study and print its plan with estimates; run nothing.")
]


def study(
    paths: Paths,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Out = None,
    results: Keep = None,
    engine: EngineName = "local",
    workers: Workers = None,
) -> None:
    """Train every arm of a study with every seed and compare them (resumable); or count the FLOPs of
    recipes."""
    if paths[0] == "flops":
        flops([Path(p) for p in paths[1:]], as_json)
        return
    from truestep.cli.study_actions import run_study
    from truestep.errors import UserError

    if len(paths) != 1:
        raise UserError(f"study: expected one study file, got {len(paths)}: run them one after the other")
    run_study(Path(paths[0]), out, results, engine=engine, workers=workers, dry_run=dry_run, as_json=as_json)


def flops(paths: list[Path], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from truestep.errors import UserError
    from truestep.study.budget import flops_table, sentences

    if not paths:
        raise UserError("study flops: expected recipes: write truestep study flops recipes/paper")
    table = flops_table(paths)
    if as_json:
        typer.echo(json.dumps(table))
        return
    shown = Table()
    for heading in ("recipe", "FLOPs, the paper's formula", "FLOPs, fuller count"):
        shown.add_column(heading, justify="left" if heading == "recipe" else "right")
    for arm in table["arms"]:
        shown.add_row(arm["name"], f"{arm['flops_paper_formula']:.3g}", f"{arm['flops_full']:.3g}")
    Console(highlight=False).print(shown)
    for line in sentences(table):
        typer.echo(line)
