"""What ``truestep study STUDY.toml`` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import typer


def run_study(
    path: Path,
    out: Path | None,
    results: Path | None,
    *,
    engine: str,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Check, plan, run what is missing, analyse, report; the last line of stdout is the study directory."""
    from truestep.cli.progress import ConsoleReporter, announce

    announce(f"truestep study: checking {path} and its data")
    from truestep import rundir
    from truestep.errors import UserError
    from truestep.study import launch, nodes, plan
    from truestep.study.audited import trainer_verdict

    reporter = ConsoleReporter()
    study = plan.load_study(path)
    if workers is not None:
        study = study.model_copy(update={"workers": workers})
    folder = out or Path("runs") / f"study-{study.name}"
    for name, place in (("--out", folder), ("--results", results)):
        if place and place.exists() and not place.is_dir():
            raise UserError(f"{name} {place}: is a file: name a folder")
    if results and results.resolve() == folder.resolve():
        raise UserError(f"--results {results} is --out as well: name a folder of its own")
    plan.check_disjoint(study, path.parent)
    if study.base:
        nodes.base_recipe(path, study)
    if dry_run:
        show_plan(study, path, folder, as_json)
        return
    runner = nodes.Runner(
        study=study, where=path, out=folder, launch=launch.engine(engine, study.workers), workers=study.workers,
        results=results, say=reporter.say,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / "study.toml")
    finish(runner, as_json, {**rundir.provenance(study.seeds[0]), "trainer_audit": trainer_verdict()})


def finish(runner: Any, as_json: bool, stamp: dict[str, Any]) -> None:
    """Run the cells, write everything, and say where it is; exit code 3 where a cell has failed."""
    from truestep import rundir
    from truestep.report.study import write_study
    from truestep.study.nodes import base_identity
    from truestep.study.run import run_cells, tuning_cost
    from truestep.study.table import results as tabulate

    found = run_cells(runner)
    places = {runner.out: "compact"} | ({runner.results: "."} if runner.results else {})
    for folder, compact in places.items():
        rundir.write_json(folder / "provenance.json", stamp)
        for kind, made in (("cells", found), ("trials", runner.trials)):
            for name, cell in made.items():
                write_cell(folder / compact / kind / f"{name}.json", cell)
    if runner.stopped.is_set():
        runner.say(f"interrupted: {len(found)} cells are done and kept. Go on with the same command.")
        raise typer.Exit(130)
    tuning = tuning_cost(runner, runner.study.arms)
    base = base_identity(runner)
    table = tabulate(runner.study, found, tuning=tuning, failures=runner.failures, base=base)
    for folder in places:
        rundir.write_json(folder / "results.json", table)
    page = write_study(runner.out, found)
    if runner.results:
        for name in ("table.md", "table.csv", "table.tex"):
            shutil.copy(runner.out / name, runner.results / name)
    show(runner.out, table, page, as_json)
    if runner.failures:
        raise typer.Exit(3)


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """One short line a key: small, and still a readable difference under version control."""
    from truestep import rundir

    lines = [
        f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in cell.items()
    ]
    rundir.write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def show_plan(study: Any, path: Path, folder: Path, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from truestep.study.estimate import estimate

    plan = {**estimate(study, path.parent), "study": str(path), "study_dir": str(folder)}
    if as_json:
        typer.echo(json.dumps(plan))
        return
    table = Table(title=f"{study.name}: what it would take (estimates)")
    columns = ("arm", "stages", "cells", "trials", "FLOPs a cell", "CPU s a cell", "GiB", "")
    for name in columns:
        table.add_column(name, justify="left" if name in ("arm", "stages", "") else "right")
    for row in plan["arms"]:
        table.add_row(row["arm"], " ".join(row["stages"]), str(row["cells"]), str(row["trials"]),
                      f"{row['flops_full']:.2e}", str(row["cpu_seconds_per_cell"]), f"{row['gib']:.2f}",
                      row["matched"])  # fmt: skip
    Console(highlight=False).print(table)
    for control, reason in plan["controls_off"].items():
        typer.echo(f"control {control} is off: {reason}")
    typer.echo(f"{plan['cells']} cells and {plan['trials']} trials, {plan['flops_full']:.2e} FLOPs, "
               f"{plan['cpu_hours']:.1f} CPU hours, {plan['hours']:.1f} hours with {study.workers} workers, "
               f"{plan['gib']:.1f} GiB")  # fmt: skip
    typer.echo(str(folder))


def show(folder: Path, table: dict[str, Any], page: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"study_dir": str(folder), "report": str(page), **table}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from truestep.report.study_tables import contrast_table, method_table
    from truestep.report.tables import visible

    head, rows = method_table(table)
    kept = [i for i, h in enumerate(head) if h not in ("FLOPs (fuller)", "Trials: FLOPs", "Checkpoint")]
    shown = Table(title=Text(table["name"]))
    for i in kept:
        shown.add_column(Text(head[i]), justify="left" if i in (0, kept[-1]) else "right")
    for row in rows:
        shown.add_row(*(Text(visible(row[i])) for i in kept))
    Console(highlight=False).print(shown)
    for row in contrast_table(table)[1]:
        typer.echo(visible(f"{row[0]}: {row[1]} points, p {row[3]}, Holm {row[4]}: {row[-1]}"))
    for cell, why in table["failures"].items():
        typer.echo(visible(f"failed: {cell}: {why}"))
    typer.echo(f"report: {page}")
    typer.echo(str(folder))
