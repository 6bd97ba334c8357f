"""``truestep study STUDY.toml`` and ``truestep study flops RECIPES``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Paths = Annotated[
    list[str],
    typer.Argument(help="A study: one TOML file. Or: flops RECIPES, files or folders.", show_default=False),
]
Out = Annotated[Path | None, typer.Option("--out", help="The study directory [default: runs/study-NAME].")]
Keep = Annotated[
    Path | None,
    typer.Option("--results", help="A folder of compact results: read first, written at the end."),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Cells at once [default: the study's].")
]
EngineName = Annotated[str, typer.Option("--engine", help="local | ray")]


def study(
    paths: Paths,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document alone.")] = False,
    out: Out = None,
    results: Keep = None,
    engine: EngineName = "local",
    workers: Workers = None,
) -> None:
    """Compare arms over seeds, resumable at every step; or count the FLOPs of recipes."""
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
