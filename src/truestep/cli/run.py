"""The commands ``truestep run | sft | rl | eval RECIPE``."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truestep.cli.output import PlainConsole, echo

if TYPE_CHECKING:
    from truestep.cli.progress import ConsoleReporter
    from truestep.pipeline.history import History
    from truestep.pipeline.prepare import Prepared
    from truestep.settings import Settings
    from truestep.train.parallel import Ranks

Recipe = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)]
_SET = "Override a setting of the recipe, such as seed=1 or data.NAME.limit=100. Can be repeated."
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET)]
_CHANGE = "Continue the run with another value from here on, such as stages.sft.steps=500. Can be repeated."
Change = Annotated[list[str] | None, typer.Option("--change", metavar="KEY=VALUE", help=_CHANGE)]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory.", show_default="runs/NAME-HASH")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the run directory.")]
_DRY_RUN = "Check the recipe, models and data, and print the plan; do not train."
DryRun = Annotated[bool, typer.Option("--dry-run", help=_DRY_RUN)]
_STRICT = (
    "Stop, after saving, at the first warning that a stage learns nothing or gets worse: all rewards are equal, the "
    "entropy has collapsed, ..."
)
Strict = Annotated[bool, typer.Option("--strict", help=_STRICT)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout instead of text.")]


def _verb(help_text: str, select: Callable[[Settings, Path], Settings]) -> Callable[..., None]:
    """Return a command that runs what ``select`` keeps of a recipe. Every command has the same options."""

    def command(
        recipe: Recipe,
        overrides: Set = None,
        change: Change = None,
        out: Out = None,
        resume: Resume = False,
        dry_run: DryRun = False,
        strict: Strict = False,
        as_json: Json = False,
    ) -> None:
        from truestep.settings import load_settings

        settings = select(load_settings(recipe, overrides or ()), recipe)
        how = {"resume": resume, "dry_run": dry_run, "strict": strict, "as_json": as_json}
        execute(settings, recipe, out, change=change or (), **how)

    command.__doc__ = help_text
    return command


def only(settings: Settings, kind: str, recipe: Path) -> Settings:
    from truestep.errors import UserError

    if not (stages := tuple(s for s in settings.stages if s.kind == kind)):
        raise UserError(f'{recipe} has no stage of kind {kind}; add [[stages]] with kind = "{kind}"')
    return settings.model_copy(update={"stages": stages})


def only_evaluation(settings: Settings, recipe: Path) -> Settings:
    from truestep.errors import UserError

    if not settings.evaluate.data:
        raise UserError(f'{recipe}: evaluate.data is empty; set evaluate.data = ["..."]')
    evaluation = settings.evaluate.model_copy(update={"before": True})
    return settings.model_copy(update={"stages": (), "evaluate": evaluation})


run = _verb("Run all stages of a recipe, and evaluate before, between and after them.", lambda s, recipe: s)
sft = _verb("Run only the sft stages of a recipe.", lambda s, recipe: only(s, "sft", recipe))
rl = _verb(
    "Run only the rl stages of a recipe, starting from model.path.", lambda s, recipe: only(s, "rl", recipe)
)


@dataclass(frozen=True, kw_only=True)
class How:
    """How a recipe is run; the options that ``truestep run`` and ``truestep.train`` share."""

    change: Sequence[str] = ()
    resume: bool = False
    dry_run: bool = False
    strict: bool = False

    @property
    def continues(self) -> bool:
        return self.resume or bool(self.change)


def folder_of(settings: Settings, out: Path | None) -> Path:
    from truestep.settings import settings_hash

    return out or Path("runs") / f"{settings.name}-{settings_hash(settings)[:8]}"


def execute(settings: Settings, recipe: Path, out: Path | None, *, as_json: bool = False, **how: Any) -> None:
    """Check the recipe, print its plan, run it and write the report. Stdout ends with the run directory."""
    from truestep.cli.progress import ConsoleReporter, announce

    announce(f"truestep {' '.join(sys.argv[1:2])}: loading torch, checking the model and data of {recipe}")
    from truestep import signals
    from truestep.device import world
    from truestep.train.parallel import Ranks, join

    asked, folder, (rank, world_size) = How(**how), folder_of(settings, out), world()
    reporter = ConsoleReporter(quiet=rank != 0)
    if asked.dry_run and settings.declared:
        show_declared(settings, recipe, folder, reporter, as_json)
        return
    ranks = Ranks(rank=rank, world_size=world_size) if asked.dry_run else join()
    prepared, rows = checked(settings, recipe.parent, folder, asked, ranks, reporter)
    if asked.dry_run:
        plan: dict[str, Any] = {"recipe": str(recipe), "run_dir": str(folder), "stages": rows}
        plan |= {"notes": prepared.notes, "overlap": prepared.overlap or None}
        if changes := prepared.history.changes:
            plan["changes"] = [one.model_dump(mode="json", exclude={"command"}) for one in changes]
        echo(json.dumps(plan) if as_json else str(folder))
        return
    try:
        summary = trained(prepared, folder, asked, ranks, reporter)
    except signals.Interrupted as stop:
        # A change that was made already is not made again.
        words = [word for word in sys.argv[1:] if word != "--resume"]
        several = ["torchrun", f"--nproc-per-node={ranks.world_size}", "-m"] if ranks.world_size > 1 else []
        again = shlex.join([*several, "truestep", *words, "--resume"])
        reporter.say(f"{stop}; all finished work is saved. Continue with: {again}")
        raise typer.Exit(128 + stop.signum) from None
    if rank == 0:
        show(folder, summary, folder / "report.html", as_json)


def checked(
    settings: Settings, base_dir: Path, folder: Path, how: How, ranks: Ranks, reporter: ConsoleReporter
) -> tuple[Prepared, Sequence[Mapping[str, Any]]]:
    """Check everything that a run needs, and say what follows from the settings. Return the prepared run and the
    rows of its plan. Raises UserError."""
    from truestep.data.overlap import overlap_lines
    from truestep.pipeline.history import continued, said
    from truestep.pipeline.prepare import prepare
    from truestep.pipeline.run import check_begun_stages, check_run_folder
    from truestep.pipeline.sizes import batch_table

    if ranks.channel is not None:
        ranks.channel.speak = partial(_last_words, reporter, folder)
        ranks.channel.advice = partial(advice, folder)
    if ranks.rank == 0:
        check_run_folder(settings, folder, resume=how.continues)  # before any data is read
    history = _history(settings, folder, how.change, ranks, dry_run=how.dry_run)
    prepared = prepare(continued(settings, history, how.change), base_dir=base_dir, history=history)
    prepared.notes += [f"changed: {line}" for line in said(history)]
    if how.dry_run:
        check_begun_stages(prepared, folder)
    rows = batch_table(prepared, ranks.world_size)
    if ranks.rank == 0 and (
        how.dry_run or how.change or not (folder / "resolved.toml").exists()
    ):  # otherwise it was said before
        _print_rows(rows, reporter)
        for note in (*prepared.notes, *overlap_lines(prepared.overlap)):
            reporter.say(note)
    return prepared, rows


def trained(
    prepared: Prepared, folder: Path, how: How, ranks: Ranks, reporter: ConsoleReporter
) -> dict[str, Any]:
    """Run a prepared run, write its page, and return its summary on rank 0. After a signal, raises Interrupted; the
    finished work is saved."""
    from truestep import signals
    from truestep.errors import UserError
    from truestep.pipeline.run import lost_steps, open_run_folder
    from truestep.pipeline.run import run as run_pipeline
    from truestep.report.html import write_report
    from truestep.rundir import locked
    from truestep.train.parallel import leave

    is_first = ranks.rank == 0
    if how.continues and is_first and not (folder / "resolved.toml").exists():
        reporter.say(f"nothing to resume in {folder}; starting a new run there")
    with locked(folder) if is_first else contextlib.nullcontext():
        open_run_folder(prepared, folder, resume=how.continues, rank=ranks.rank)
        for said in lost_steps(prepared, folder) if is_first else ():
            reporter.say(said)
        try:
            with signals.deferred(partial(reporter.place, "stage"), is_alone=ranks.world_size == 1):
                summary = run_pipeline(prepared, folder, ranks=ranks, reporter=reporter, is_strict=how.strict)
        except BaseException as error:
            reporter.close()
            if isinstance(error, signals.Interrupted):
                leave()
            if is_first:
                with contextlib.suppress(OSError, UserError):  # the run ends with its own error
                    write_report(folder)
            raise
        finally:
            reporter.close()
        leave()
        if is_first:
            write_report(folder)
    return summary


def _history(
    settings: Settings, folder: Path, change: Sequence[str], ranks: Ranks, *, dry_run: bool
) -> History:
    """Return the history of the run in the folder, with the changes that are asked for. Rank 0 reads it for all."""
    from truestep.pipeline.history import History, changed
    from truestep.redaction import redact_command

    def own() -> History:
        return changed(settings, folder, change, redact_command(["truestep", *sys.argv[1:]]))

    if dry_run:
        return own()
    made = own().model_dump(mode="json") if ranks.rank == 0 else None
    return History.model_validate(ranks.exchange(made)[0])


def _last_words(reporter: ConsoleReporter, folder: Path, text: str) -> None:
    """Print and record why a run on several ranks ends, from a thread."""
    from truestep.evaluate.files import end_summary

    reporter.close()
    echo(f"error: {text}", err=True)
    end_summary(folder, "failed", text)


def advice(folder: Path) -> str:
    """Say what is left of a run that lost a rank, and how to go on."""
    from truestep.checkpoint.manifest import list_checkpoints

    found = [
        path for stage in sorted(folder.glob("stages/*/checkpoints")) for path in list_checkpoints(stage)
    ]
    last = f"its last checkpoint is {found[-1]}" if found else "it has no checkpoint yet"
    return f"{last}: start it again with --resume"


def show_declared(settings: Settings, recipe: Path, folder: Path, reporter: Any, as_json: bool) -> None:
    """Print the plan of a recipe with ``[declared]`` lengths, which needs no weights and no data."""
    from truestep.pipeline.paper_plan import declared_plan

    plan = declared_plan(settings, recipe.parent, str(recipe))
    shown = [{**row, "flops_full": f"{row['flops_full']:.3g}"} for row in plan["stages"]]
    by_kind = {"gib", "host_gib", "server_gib"}
    _print_rows([{k: _listed(v) for k, v in row.items() if k not in by_kind} for row in shown], reporter)
    for row in shown:
        held = {"device": row["gib"], "host": row["host_gib"], "vLLM's card": row["server_gib"]}
        kinds = "; ".join(f"{place}: {_listed(found)}" for place, found in held.items() if found)
        reporter.say(f"{row['stage']}, GiB by kind. {kinds}")
    reporter.say(
        "memory is predicted, and speed assumed for one H100 SXM (docs/how-to/gpu.md): neither was measured on a GPU"
    )
    model = plan["model"]
    reporter.say(
        f"{model['path']}: {model['num_parameters']:,} parameters, context {model['context_length']}, RoPE theta "
        f"{model['rope_theta']:g}; {plan['flops_paper_formula']:.3g} FLOPs by the paper's formula "
        f"({plan['flops_full']:.3g} by the fuller count) on "
        f"{plan['num_gpus']} GPUs; from [declared], without weights and data"
    )
    document = {"recipe": str(recipe), "run_dir": str(folder), **plan}
    echo(json.dumps(document) if as_json else str(folder))


def _listed(value: Any) -> Any:
    return ", ".join(f"{key} {one:,}" for key, one in value.items()) if isinstance(value, dict) else value


def _print_rows(rows: Sequence[Mapping[str, Any]], reporter: Any) -> None:
    from rich.table import Table

    if rows and not reporter.quiet:
        table = Table(title="what will be trained")
        for column in ("", *[str(row["stage"]) for row in rows]):
            table.add_column(column)
        for key in [k for k in rows[0] if k != "stage"]:
            table.add_row(key, *[str(row[key]) for row in rows])
        reporter.console.print(table)


def show(folder: Path, summary: Any, report: Path, as_json: bool) -> None:
    from truestep.rundir import model_of

    model = {"trained_model": str(model_of(folder))} if summary["stages"] else {}
    if as_json:
        echo(json.dumps({"run_dir": str(folder), "report": str(report), **model, **summary}))
        return

    from truestep.report.tables import score_table, terminal_table

    if rows := score_table(folder):
        console = PlainConsole()
        console.print(terminal_table(rows, title=summary["name"], width=console.width))
    lines = [f"report: {report}", *(f"model: {path}" for path in model.values()), str(folder)]
    echo("\n".join(lines))
