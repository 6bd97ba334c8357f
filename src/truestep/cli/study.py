"""The commands ``truestep study STUDY.toml`` and ``truestep study flops RECIPES``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from truestep.cli.evaluation import option
from truestep.cli.output import PlainConsole, echo
from truestep.cli.run import Json

_PATHS = 'A study (TOML file); or "flops", then the recipes (files or folders) to count FLOPs for.'
_FORM = "STUDY.toml | flops RECIPE..."
Paths = Annotated[list[str], typer.Argument(metavar=_FORM, help=_PATHS, show_default=False)]
_KEEP = "Also keep compact results in this folder. Cells (an arm with a seed) found there are not run again."
_WORKERS = "How many cells run at the same time."
_ENGINE = "What runs the cells: local (child processes) or ray (a Ray cluster)."
_DRY_RUN = "Check the study and print its plan with estimates; run nothing."
Out = Annotated[Path | None, option("--out", "The study directory.", "runs/study-NAME")]
Keep = Annotated[Path | None, option("--results", _KEEP)]
Workers = Annotated[int | None, option("--workers", _WORKERS, "the study's", min=1)]
EngineName = Annotated[str, option("--engine", _ENGINE)]
DryRun = Annotated[bool, option("--dry-run", _DRY_RUN)]


def study(
    paths: Paths,
    dry_run: DryRun = False,
    as_json: Json = False,
    out: Out = None,
    results: Keep = None,
    engine: EngineName = "local",
    workers: Workers = None,
) -> None:
    """Train every arm of a study with every seed and compare the arms, or count the FLOPs of recipes.

    An interrupted study continues if the same command is run again.
    """
    if paths[0] == "flops":
        flops([Path(p) for p in paths[1:]], as_json)
        return
    from truestep import rundir
    from truestep.cli.progress import ConsoleReporter, announce
    from truestep.errors import UserError

    if len(paths) != 1:
        raise UserError(f"study: expected one study file, got {len(paths)}; run them one after the other")
    path = Path(paths[0])
    announce(f"truestep study: checking {path} and its data")
    from truestep.data.overlap import overlap_lines
    from truestep.study import cell_runner, engines, inputs, processes

    declared, checked = inputs.checked_study(path, engine)
    if workers is not None:
        declared = declared.model_copy(update={"workers": workers})
    folder = out or Path("runs") / f"study-{declared.name}"
    for name, place in (("--out", folder), ("--results", results)):
        if place and place.exists() and not place.is_dir():
            raise UserError(f"{name} {place} is a file; pass a folder")
    if results and results.resolve() == folder.resolve():
        raise UserError(f"--results and --out are the same folder, {results}; pass a different one")
    say = ConsoleReporter().say
    runner = cell_runner.Runner(
        study=declared, where=path, out=folder, launch=processes.start, workers=declared.workers, results=results,
        say=say,
    )  # fmt: skip
    cell_runner.check_base(runner)
    for note in (*checked.prepared.notes, *overlap_lines(checked.prepared.overlap)):
        say(note)
    if dry_run:
        show_plan(declared, checked, path, folder, as_json)
        return
    launched = engines.engine(engine, declared, say)
    runner = replace(runner, launch=launched.launch, gpus=launched.gpus, stop=launched.stop)
    # A run's own process removes what was left in its directory; an earlier one may still be at work there.
    with rundir.locked(folder, apart="run"):
        launched.check(folder)
        shutil.copy(path, folder / "study.toml")
        finish(runner, as_json, {**rundir.provenance(declared.seeds[0]), "trainer_audit": trainer_verdict()})


def _print_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]
) -> None:
    """Print a table of plain text. Columns are right-aligned and not wrapped, except those whose index is in
    ``left``. An interval starts a new line, so that it is not broken."""
    from rich.table import Table
    from rich.text import Text

    from truestep.report.tables import visible

    table = Table(title=Text(title) if title else None)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if i in left else "right", overflow="fold")
        table.columns[-1].no_wrap = i not in left
    for row in rows:
        table.add_row(*(Text(visible(cell).replace(" [", "\n[")) for cell in row))
    PlainConsole().print(table)


def flops(paths: list[Path], as_json: bool) -> None:
    from truestep.errors import UserError
    from truestep.study.budget import flops_table, sentences

    if not paths:
        raise UserError("study flops: no recipe is given; pass files or folders, for example recipes/paper")
    table = flops_table(paths)
    if as_json:
        echo(json.dumps(table))
        return
    rows = [(a["name"], f"{a['flops_paper_formula']:.3g}", f"{a['flops_full']:.3g}") for a in table["arms"]]
    _print_table("", ("recipe", "FLOPs, the paper's formula", "FLOPs, fuller count"), rows, left=(0,))
    for line in sentences(table):
        echo(line)


def trainer_verdict() -> str:
    """Return the verdict of an audit of truestep's own step, which is audited like any framework's."""
    import sys

    from truestep.audit import subjects as registry
    from truestep.audit.environments.launch import audit_one
    from truestep.audit.present.words import found_in_words, row_of

    (subject,) = (s for s in registry.TABLE if s.name == "truestep")
    finding = audit_one(subject, subject.configurations[0], Path(sys.executable))
    words = found_in_words(row_of(finding))
    return f"{finding.verdict}: {words}" if words else str(finding.verdict)


def finish(runner: Any, as_json: bool, stamp: dict[str, Any]) -> None:
    """Run the cells, write all results, and print their folder. The exit code is 3 if a cell has failed."""
    from truestep import rundir
    from truestep.report.study import write_study
    from truestep.study.cell_runner import base_identity
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
        saved = f"interrupted: {len(found)} cells are finished and saved"
        runner.say(f"{saved}. To continue, run the same command again.")
        raise typer.Exit(128 + runner.signum)
    tuning, base = tuning_cost(runner, runner.study.arms), base_identity(runner)
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
    """Write a cell with one short line per key, so that its diff under version control is readable."""
    from truestep import rundir

    texts = {k: json.dumps(v, ensure_ascii=False) for k, v in rundir.stamped(cell).items()}
    lines = ",\n".join(f" {json.dumps(k)}: {text}" for k, text in texts.items())
    rundir.write_atomic(path, f"{{{lines}\n}}\n")


def show_plan(study: Any, checked: Any, path: Path, folder: Path, as_json: bool) -> None:
    from truestep.cli.progress import in_words
    from truestep.errors import count as counted
    from truestep.report.study_tables import left_out
    from truestep.study.estimate import estimate

    plan = {**estimate(study, checked), "study": str(path), "study_dir": str(folder)}
    if as_json:
        echo(json.dumps(plan))
        return
    heads = ["arm", "stages", "cells", "trials", "FLOPs\n(fuller)", "CPU\nseconds", "GiB"]
    rows = [
        [r["arm"], " ".join(r["stages"]), str(r["cells"]), str(r["trials"]), f"{r['flops_full']:.2e}",
         str(r["cpu_seconds_per_cell"]), f"{r['gib']:.2f}"]
        for r in plan["arms"]
    ]  # fmt: skip
    _print_table(f"{study.name}: estimated cost of each cell", heads, rows, left=(0, 1))
    matched: dict[str, list[str]] = {}
    for r in plan["arms"]:
        matched.setdefault(r["matched"], []).append(r["arm"])
    for what, arms in matched.items():
        if what:
            echo(f"{what}: {', '.join(arms)}")
    for line in left_out(plan):
        echo(line)
    seconds = sum(row["cpu_seconds"] for row in plan["arms"])
    echo(
        f"{counted(plan['cells'], 'cell')} and {counted(plan['trials'], 'trial')}, {plan['flops_full']:.2e} FLOPs (fuller "
        f"count), {in_words(seconds)} of CPU time, {in_words(seconds / study.workers)} with "
        f"{counted(study.workers, 'worker')}, {plan['gib']:.1f} GiB"
    )
    ranks, gpus = (max(row[key] for row in plan["arms"]) for key in ("ranks", "gpus"))
    if (ranks, gpus) != (1, 0):
        echo(
            f"a cell uses up to {ranks} ranks and {gpus} GPUs; {study.workers} cells run at once if they are free"
        )
    echo(str(folder))


def show(folder: Path, table: dict[str, Any], page: Path, as_json: bool) -> None:
    if as_json:
        echo(json.dumps({"study_dir": str(folder), "report": str(page), **table}))
        return
    from truestep.report.study_tables import contrast_table, left_out, method_table

    head, rows = method_table(table)
    hidden = ("FLOPs (fuller)", "Trials: FLOPs", "Checkpoint", "Marks")
    kept = [i for i, h in enumerate(head) if h not in hidden]
    shown = [[row[i] for i in kept] for row in rows]
    _print_table(table["name"], [head[i] for i in kept], shown, left=(0,))
    for arm in table["arms"]:
        if arm["marks"]:
            echo(f"{arm['name']}: {'; '.join(arm['marks'])}")
    for line in left_out(table):
        echo(line)
    for row in contrast_table(table)[1]:
        echo(f"{row[0]}: {row[1]} points, p {row[3]}, Holm {row[4]}: {row[-1]}")
    for cell, why in table["failures"].items():
        echo(f"failed: {cell}: {why}")
    echo(f"report: {page}\n{folder}")
