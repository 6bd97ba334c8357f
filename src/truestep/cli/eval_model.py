"""``truestep eval MODEL`` and ``truestep eval RECIPE``: pinned benchmarks, or a recipe's own data sets."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truestep.cli.evaluation import option, show, words_of
from truestep.cli.progress import ConsoleReporter, announce
from truestep.cli.run import Json, Resume

if TYPE_CHECKING:
    from truestep.settings import Settings

_MODEL = "A model (folder, hub id, or its name on a server), or a recipe (.toml)."
_TEMPLATES = "Comma-separated prompt templates: paper, qwen, plain, completion, brief, odd."
_DATA = "Folder with ID.jsonl, .parquet or .csv of each benchmark."
_ENGINE = "torch, vllm, or the URL of an OpenAI-compatible endpoint."
_OWN = "each benchmark's"
What = Annotated[str, typer.Argument(help=_MODEL, metavar="MODEL", show_default=False)]
Benchmarks = Annotated[str, option("--benchmarks", "Comma-separated ids; truestep eval list shows them all.")]
Data = Annotated[str, option("--data", _DATA, "the Hugging Face hub")]
Limit = Annotated[int | None, option("--limit", "Problems of each benchmark.", "all", min=1)]
Samples = Annotated[int | None, option("--samples", "Samples of each problem.", _OWN, min=1)]
Prompts = Annotated[str, option("--prompts", _TEMPLATES, _OWN)]
FewShot = Annotated[int | None, option("--few-shot", "Worked examples before each problem.", "0", min=0)]
Engine = Annotated[str, option("--engine", _ENGINE, "torch")]
_SET = "Change any other setting: --set temperature=0. May be repeated."
_DRY_RUN = "Check everything, count tokens and memory, and sample nothing."
Set = Annotated[list[str] | None, option("--set", _SET, False)]
Out = Annotated[Path | None, option("--out", "The run directory.", "runs/NAME-HASH")]
DryRun = Annotated[bool, option("--dry-run", _DRY_RUN)]


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
    """Evaluate a model on benchmarks, or a training recipe's model on the recipe's own data sets."""
    announce(f"truestep eval: reading {model} and the benchmarks")
    given: dict[str, Any] = {
        "benchmarks": words_of(benchmarks), "folder": data, "limit": limit, "samples_per_problem": samples,
        "prompts": words_of(prompts), "few_shot": few_shot, "engine": engine,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value not in (None, "", [])}
    raw, base_dir = _raw(model, overrides), Path(model).parent if model.endswith(".toml") else Path()
    table = raw.get("evaluate", {})
    if model.endswith(".toml") and not ({"benchmarks"} & {*raw, *table, *given}):
        _own_sets(Path(model), given, overrides, out, resume=resume, dry_run=dry_run, as_json=as_json)
        return
    limits = raw.pop("limits", None) or table.get("limits")
    if limits:  # a recipe's, for the benchmarks and without the limit of the command line
        named = given.get("benchmarks", limits)
        table = table | {"limits": {k: v for k, v in limits.items() if k in named and limit is None}}
    from truestep.evaluate.jobs import evaluation_settings

    raw.pop("evaluate", None)  # the options come last: they go before the recipe's keys
    settings = evaluation_settings({**raw, "evaluate": table | given}, model)
    _execute(settings, base_dir, out, resume=resume, dry_run=dry_run, as_json=as_json)


def _raw(model: str, overrides: list[str] | None) -> dict[str, Any]:
    from truestep.settings import override, read_recipe

    if model.endswith(".toml"):
        return read_recipe(model, overrides or ())
    return override({"model": {"path": model}}, overrides or ())


def _own_sets(
    recipe: Path, given: dict[str, Any], overrides: list[str] | None, out: Path | None, **more: bool
) -> None:
    """A training recipe: its own evaluation sets."""
    from truestep.cli.run import execute, only_evaluation
    from truestep.errors import UserError
    from truestep.settings import load_settings

    if given:
        own = f"{recipe} names no benchmarks, so its own data sets are evaluated"
        raise UserError(f"{next(iter(given))}: {own}: pass --benchmarks, or leave this option out")
    execute(only_evaluation(load_settings(recipe, overrides or ()), recipe), recipe, out, **more)


def _execute(
    settings: Settings, base_dir: Path, out: Path | None, *, resume: bool, dry_run: bool, as_json: bool
) -> None:
    from truestep import rundir, signals
    from truestep.cli.eval_engines import opened, plan_of
    from truestep.evaluate.jobs import make_jobs
    from truestep.evaluate.suite import make_plans, run_suite
    from truestep.grade.score import Grader
    from truestep.report.evaluation import write_evaluation_report
    from truestep.settings import settings_hash

    folder = out or Path("runs") / f"{settings.name}-{settings_hash(settings)[:8]}"
    reporter = ConsoleReporter()
    if not dry_run:
        _check_folder(settings, folder, resume=resume)
        if resume and not folder.exists():
            reporter.say(f"{folder} does not exist yet: starting there")
    jobs = make_jobs(settings, base_dir)
    with opened(settings) as (adapter, content):
        if dry_run:
            plan = plan_of(settings, jobs, adapter)
            typer.echo(json.dumps({"run_dir": str(folder), **plan}) if as_json else _plan_text(plan, folder))
            return
        ready = [(job, adapter.ready(job, settings.evaluate.few_shot)) for job in jobs]
        plans = make_plans(settings, ready, folder, content)
        rundir.open_run(folder, settings.model_dump(mode="json"))
        rundir.write_json(folder / "provenance.json", rundir.provenance(settings.seed))
        try:
            with signals.deferred(), Grader() as grader:
                summary = run_suite(
                    settings, ready, plans, adapter=adapter, judge=grader.judge, folder=folder,
                    reporter=reporter, check_stop=signals.check,
                )  # fmt: skip
        except signals.Interrupted as stop:
            reporter.close()
            words = [word for word in sys.argv[1:] if word != "--resume"]
            command = shlex.join(["truestep", *words, "--resume"])
            reporter.say(f"{stop}; every finished sample is saved. To continue: {command}")
            raise typer.Exit(128 + stop.signum) from None
        finally:
            reporter.close()
    show(folder, summary, write_evaluation_report(folder), as_json)


def _check_folder(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Raises UserError if the run directory is taken by something else. Writes nothing."""
    from truestep import rundir
    from truestep.errors import UserError
    from truestep.evaluate.jobs import changed, evaluation_settings
    from truestep.settings import read_recipe

    if not rundir.holds_run(folder, resume=resume):
        return
    raw = read_recipe(folder / "resolved.toml")
    if not (raw.get("benchmarks") or raw.get("evaluate", {}).get("benchmarks")):
        raise UserError(f"{folder} holds a training run, not an evaluation: {rundir.ELSEWHERE}")
    for key, was, now in changed(evaluation_settings(raw, str(folder)), settings):
        values = f"{rundir.redact(str(was))}; now {rundir.redact(str(now))}"
        mixed = f"{folder} was started with another {key} ({values}), and samples of both must not be mixed"
        raise UserError(f"{mixed}: {rundir.ELSEWHERE}")


def _plan_text(plan: dict[str, Any], folder: Path) -> str:
    """The dry run as text."""
    lines = [
        f"{j['data']:<16} {j['prompt']:<12} {j['problems']:>6} problems {j['samples']:>7} samples "
        f"{j['prompt_tokens']:>9} prompt tokens, at most {j['generated_tokens_at_most']} generated"
        for j in plan["jobs"]
    ]
    total = plan["total"]
    if "memory_bytes_at_most" in total:
        lines.append(f"memory: at most about {total['memory_bytes_at_most'] / 2**30:.1f} GiB")
    if "hours_if_all_run_to_the_limit" in total:
        hours = total["hours_if_all_run_to_the_limit"]
        lines.append(f"time: {hours} h if every completion runs to its limit, at this machine's matrix rate")
    return "\n".join([*lines, *plan["notes"], str(folder)])
