"""``truestep eval MODEL`` and ``truestep eval RECIPE``: a model on pinned benchmarks, or a recipe's own data
sets."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truestep.cli.run import Json, Resume

if TYPE_CHECKING:
    from truestep.evaluate.plan import EvaluationSettings, Job

What = Annotated[
    str, typer.Argument(help="A model (folder, hub id, served name) or a recipe (.toml).", metavar="MODEL")
]
Benchmarks = Annotated[
    str,
    typer.Option(
        "--benchmarks", help="Comma-separated ids from `truestep eval list`.", show_default="the recipe's"
    ),
]
Data = Annotated[
    str, typer.Option("--data", help="Folder with ID.jsonl, ID.parquet or ID.csv.", show_default="the hub")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Problems of each benchmark.", show_default="all")
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Samples of each problem.", show_default="each benchmark's"),
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        help="Comma-separated templates: paper, qwen, plain, completion, brief, odd.",
        show_default="each benchmark's",
    ),
]
FewShot = Annotated[
    int | None,
    typer.Option("--few-shot", min=0, help="Worked examples before each problem.", show_default="0"),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine", help="torch, vllm, or the URL of an OpenAI-compatible endpoint.", show_default="torch"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override any other setting, such as temperature=0 or max_new_tokens=512. Can be repeated.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="The run directory.", show_default="runs/eval-MODEL-HASH")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, and count tokens and memory; generate nothing.")
]


def evaluate(
    model: What,
    benchmarks: Benchmarks = "",
    data: Data = "",
    limit: Limit = None,
    samples: Samples = None,
    prompts: Prompts = "",
    few_shot: FewShot = None,
    engine: Engine = "",
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on benchmarks; or the model of a recipe on the recipe's own data sets."""
    given: dict[str, Any] = {
        "benchmarks": _words(benchmarks),
        "data": data,
        "limit": limit,
        "samples": samples,
        "prompts": _words(prompts),
        "few_shot": few_shot,
        "engine": engine,
    }
    given = {key: value for key, value in given.items() if value not in (None, "", [])}
    raw, base_dir = {"model": {"path": model}}, Path()
    if model.endswith(".toml"):
        raw, base_dir = _recipe(model, overrides), Path(model).parent
        if "benchmarks" not in raw and "benchmarks" not in given:
            _own_sets(Path(model), given, overrides, out, resume=resume, dry_run=dry_run, as_json=as_json)
            return
    if limits := raw.get(
        "limits"
    ):  # a recipe's, for the benchmarks and without the limit of the command line
        kept = (
            {}
            if limit is not None
            else {k: v for k, v in limits.items() if k in given.get("benchmarks", limits)}
        )
        raw = raw | {"limits": kept}
    settings = _settings(raw | given, overrides, where=model)
    _execute(settings, base_dir, out, resume=resume, dry_run=dry_run, as_json=as_json)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _recipe(path: str, overrides: list[str] | None) -> dict[str, Any]:
    from truestep.settings import read_recipe

    return read_recipe(path, overrides or ())


def _settings(raw: dict[str, Any], overrides: list[str] | None, where: str) -> EvaluationSettings:
    from truestep.evaluate.plan import EvaluationSettings
    from truestep.settings import override, parse

    if "benchmarks" not in raw:
        from truestep.errors import UserError

        raise UserError(
            f"{where}: what on? write --benchmarks gsm8k,math500 (truestep eval list names them all)"
        )
    return parse(EvaluationSettings, override(raw, overrides or ()), where=where)


def _own_sets(
    recipe: Path, given: dict[str, Any], overrides: list[str] | None, out: Path | None, **more: bool
) -> None:
    """A training recipe: its own evaluation sets."""
    from truestep.cli.run import execute, only_evaluation
    from truestep.errors import UserError
    from truestep.settings import load_settings

    if given:
        option = next(iter(given)).replace("_", "-")
        raise UserError(
            f"--{option}: {recipe} evaluates its own data sets: write --benchmarks, or leave it out"
        )
    execute(only_evaluation(load_settings(recipe, overrides or ()), recipe), recipe, out, **more)


def _execute(
    settings: EvaluationSettings,
    base_dir: Path,
    out: Path | None,
    *,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from truestep.cli.progress import ConsoleReporter, announce

    announce(f"truestep eval: loading the benchmarks and the model {settings.model.path}")
    from truestep import signals
    from truestep.cli.eval_engines import opened, plan_of
    from truestep.evaluate.plan import default_name, make_jobs
    from truestep.evaluate.suite import make_plans
    from truestep.report.evaluation import write_evaluation_report

    folder = out or Path("runs") / default_name(settings)
    reporter = ConsoleReporter()
    if not dry_run:
        _check_folder(settings, folder, resume=resume)
        if resume and not folder.exists():
            reporter.say(f"nothing to resume in {folder}: starting there")
    jobs = make_jobs(settings, base_dir)
    with opened(settings) as (asker, content):
        if dry_run:
            plan = plan_of(settings, jobs, asker)
            typer.echo(json.dumps({"run_dir": str(folder), **plan}) if as_json else _plan_text(plan, folder))
            return
        ready = [
            (job, asker.ready(job, settings.few_shot)) for job in jobs
        ]  # what cannot be asked fails here
        plans = make_plans(settings, ready, folder, content)
        _open_folder(settings, folder)
        try:
            with signals.deferred():
                summary = _run(settings, ready, plans, asker, folder, reporter)
        except signals.Interrupted as stop:
            reporter.close()
            words = [word for word in sys.argv[1:] if word != "--resume"]
            reporter.say(
                f"{stop}; every sample is saved. Go on with: {shlex.join(['truestep', *words, '--resume'])}"
            )
            raise typer.Exit(128 + stop.signum) from None
        finally:
            reporter.close()
    _show(folder, summary, write_evaluation_report(folder), as_json)


def _run(
    settings: EvaluationSettings,
    ready: list[tuple[Job, Any]],
    plans: Any,
    asker: Any,
    folder: Path,
    reporter: Any,
) -> dict[str, Any]:
    from truestep import signals
    from truestep.evaluate.suite import Graders, run_suite
    from truestep.grade.score import Grader

    with Grader() as lenient, Grader(strict=True) as strict:
        return run_suite(
            settings,
            ready,
            plans,
            asker=asker,
            graders=Graders(lenient=lenient.score, strict=strict.score),
            folder=folder,
            reporter=reporter,
            check_stop=signals.check,
        )


def _check_folder(settings: EvaluationSettings, folder: Path, *, resume: bool) -> None:
    """Raises UserError where the run directory is taken by something else. Writes nothing."""
    from truestep import rundir
    from truestep.errors import UserError
    from truestep.evaluate.plan import EvaluationSettings, changed
    from truestep.settings import parse, read_recipe

    resolved = folder / "resolved.toml"
    if not resolved.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is no evaluation: write --out for another place")
        return
    if not resume:
        raise UserError(
            f"{folder} holds one already: write --resume to go on with it, or --out for another place"
        )
    raw = read_recipe(resolved)
    if "benchmarks" not in raw:
        raise UserError(f"{folder} holds a training run: write --out for another place")
    old = parse(EvaluationSettings, raw, where=str(resolved))
    if names := changed(old, settings):
        was, now = (rundir.redact(str(getattr(s, names[0]))) for s in (old, settings))
        raise UserError(
            f"{folder} was begun with another {names[0]} ({was}; now {now}): their samples cannot be mixed, write "
            "--out for another place"
        )


def _open_folder(settings: EvaluationSettings, folder: Path) -> None:
    from truestep import rundir
    from truestep.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_atomic(folder / "resolved.toml", rundir.to_toml(settings.model_dump(mode="json")))
        rundir.write_json(folder / "provenance.json", rundir.provenance(settings.seed))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}: write --out for another place"
        ) from None


def _plan_text(plan: dict[str, Any], folder: Path) -> str:
    """The dry run for people."""
    lines = [
        f"{j['benchmark']:<16} {j['prompt']:<12} {j['problems']:>6} problems {j['samples']:>7} samples "
        f"{j['prompt_tokens']:>9} prompt tokens, at most {j['generated_tokens_at_most']} generated"
        for j in plan["jobs"]
    ]
    total = plan["total"]
    if "memory_bytes_at_most" in total:
        lines.append(f"memory: at most about {total['memory_bytes_at_most'] / 2**30:.1f} GiB")
    if "hours_if_all_run_to_the_limit" in total:
        hours = total["hours_if_all_run_to_the_limit"]
        lines.append(f"time: {hours} h at this machine's matrix rate, if every completion ran to its limit")
    return "\n".join([*lines, *plan["notes"], str(folder)])


def _show(folder: Path, summary: dict[str, Any], report: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"run_dir": str(folder), "report": str(report), **summary}))
        return
    from truestep.report.evaluation import print_scores

    print_scores(summary)
    typer.echo(f"report: {report}")
    typer.echo(str(folder))
