"""The actions of ``truestep eval MODEL`` and ``truestep eval RECIPE``, from the settings to the report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import typer

from truestep import rundir, signals
from truestep.cli.evaluation import show
from truestep.cli.output import echo
from truestep.cli.progress import ConsoleReporter, in_words, size_in_words
from truestep.cli.run import execute, only_evaluation
from truestep.errors import UserError
from truestep.evaluate.files import end_summary
from truestep.evaluate.jobs import Job, changed, check_overrides, evaluation_settings, make_jobs, remarks
from truestep.evaluate.model_adapters import EndpointAdapter, ModelAdapter, TokenAdapter
from truestep.evaluate.suite import make_plans, run_suite
from truestep.grade.score import Grader
from truestep.records import Problem, Score
from truestep.report.evaluation import write_evaluation_report
from truestep.rewards.scorer import Grade, RewardScorer, sources
from truestep.rollout.engine import Engine
from truestep.rollout.engine_endpoint import EndpointEngine, connect
from truestep.settings import Settings, load_settings, override, read_recipe, settings_hash


def evaluate(model: str, given: dict[str, Any], sets: Sequence[str], out: Path | None, **how: bool) -> None:
    """Evaluate a model or a recipe. ``given`` contains the options that say what to evaluate, as keys of
    ``[evaluate]``. ``sets`` contains the values of --set. A recipe without benchmarks uses its own data."""
    is_recipe, path = model.endswith(".toml"), Path(model)
    raw = read_recipe(model, sets) if is_recipe else override({"model": {"path": model}}, sets)
    check_overrides(sets)
    table = raw.pop("evaluate", {})  # merged below with the options, which override it
    if is_recipe and "benchmarks" not in {*raw, *table, *given}:
        if given:
            own = f"{path} names no benchmarks, so its own data sets are evaluated"
            raise UserError(f"{next(iter(given))}: {own}; pass --benchmarks, or remove this option")
        execute(only_evaluation(load_settings(path, sets), path), path, out, change=(), **how)
        return
    # The limits of a recipe apply only to the benchmarks in use, and only without --limit.
    if limits := raw.pop("limits", None) or table.get("limits"):
        named = given.get("benchmarks", limits)
        table = table | {"limits": {k: v for k, v in limits.items() if k in named and "limit" not in given}}
    settings = evaluation_settings({**raw, "evaluate": table | given}, model)
    _execute(settings, path.parent if is_recipe else Path(), out, **how)


def folder_of(settings: Settings, out: Path | None) -> Path:
    return out or Path("runs") / f"{settings.name}-{settings_hash(settings)[:8]}"


def _execute(
    settings: Settings, base_dir: Path, out: Path | None, *, resume: bool, dry_run: bool, as_json: bool
) -> None:
    folder, reporter = folder_of(settings, out), ConsoleReporter()
    if dry_run:
        jobs = make_jobs(settings, base_dir)
        with opened(settings) as (adapter, _), scorers_of(settings, base_dir, folder):
            plan = plan_of(settings, jobs, adapter)
        echo(json.dumps({"run_dir": str(folder), **plan}) if as_json else _plan_text(plan, folder))
        return
    try:
        summary = evaluated(settings, base_dir, folder, resume=resume, reporter=reporter)
    except signals.Interrupted as stop:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        command = shlex.join(["truestep", *words, "--resume"])
        reporter.say(f"{stop}; every finished sample is saved. To continue: {command}")
        raise typer.Exit(128 + stop.signum) from None
    show(folder, summary, folder / "report.html", as_json)


def evaluated(
    settings: Settings, base_dir: Path, folder: Path, *, resume: bool, reporter: ConsoleReporter
) -> dict[str, Any]:
    """Evaluate, write the run directory and its page, and return the summary. Raises Interrupted after a signal."""
    _check_folder(settings, folder, resume=resume)
    if resume and not folder.exists():
        reporter.say(f"nothing to resume in {folder}; starting a new evaluation there")
    jobs = make_jobs(settings, base_dir)
    with ExitStack() as stack:
        adapter, content = stack.enter_context(opened(settings))
        stack.enter_context(rundir.locked(folder))
        _check_folder(settings, folder, resume=resume)  # another process may have used it in the meantime
        code = "".join(source.sha256 for source in sources(settings.evaluate.scorers, base_dir).values())
        plans, notes = make_plans(settings, jobs, adapter, folder, content, code)
        try:
            with signals.deferred(reporter.place), Grader() as grader, ExitStack() as inner:
                scorers = inner.enter_context(scorers_of(settings, base_dir, folder, grader.score_many))
                if settings.evaluate.scorers:
                    plans = [(job, replace(plan, reward=scorers.each)) for job, plan in plans]
                rundir.open_run(folder, settings.model_dump(mode="json"))
                rundir.write_json(folder / "provenance.json", rundir.provenance(settings.seed))
                summary = run_suite(
                    settings, plans, notes, adapter=adapter, judge=grader.judge, folder=folder,
                    reporter=reporter, check_stop=signals.check,
                )  # fmt: skip
        except signals.Interrupted:
            end_summary(folder, "interrupted")
            raise
        except BaseException as error:
            end_summary(folder, "failed", error)
            raise
        finally:
            reporter.close()
        write_evaluation_report(folder)
    return summary


def _none(pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
    return []


def scorers_of(settings: Settings, base_dir: Path, folder: Path, grade: Grade = _none) -> RewardScorer:
    """Return the scorers of an evaluation. Entering them loads their functions, also in a dry run. A sample that a
    function cannot score is counted, and never stops an evaluation, however many there are."""
    entries = [e.model_copy(update={"max_failure_share": 1.0}) for e in settings.evaluate.scorers]
    return RewardScorer(entries, grade=grade, base=base_dir, folder=folder / "scorers")


def _check_folder(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Raise UserError if the folder contains a different run or other files. Nothing is written."""
    if not rundir.holds_run(folder, resume=resume):
        return
    raw = read_recipe(folder / "resolved.toml")
    if not (raw.get("benchmarks") or raw.get("evaluate", {}).get("benchmarks")):
        raise UserError(f"{folder} contains a training run, not an evaluation; {rundir.ELSEWHERE}")
    for key, was, now in changed(evaluation_settings(raw, str(folder)), settings):
        values = f"{rundir.redact(str(was))}, now {rundir.redact(str(now))}"
        mixed = f"{folder} was started with a different {key} ({values}), and the samples must not be mixed"
        raise UserError(f"{mixed}; {rundir.ELSEWHERE}")


def _plan_text(plan: dict[str, Any], folder: Path) -> str:
    """Return the plan of a dry run as text."""
    lines = [
        f"{j['data']:<16} {j['prompt']:<12} {j['problems']:>6} problems {j['samples']:>7} samples "
        f"{j['prompt_tokens']:>9} prompt tokens, at most {j['generated_tokens_at_most']} generated"
        for j in plan["jobs"]
    ]
    total = plan["total"]
    if "memory_bytes_at_most" in total:
        lines.append(f"memory: at most about {size_in_words(total['memory_bytes_at_most'])}")
    if (hours := total.get("hours_if_all_run_to_the_limit")) is not None:
        lines.append(
            f"time: {in_words(3600 * hours)} of matrix products if every completion runs to its limit; the start and the "
            "overhead of every decoding step are not estimated, and take most of a small model's time"
        )
    return "\n".join([*lines, *plan["notes"], str(folder)])


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[ModelAdapter, str]]:
    """Yield the adapter that turns jobs into samples, and a hash of the model ("" for an endpoint)."""
    with ExitStack() as stack:
        if settings.evaluate.is_endpoint:
            client = stack.enter_context(connect(settings.evaluate.engine))
            engine = EndpointEngine(client, settings.model.path, settings.evaluate.sampling.max_running)
            yield EndpointAdapter(engine=engine), ""
            return
        if (name := settings.evaluate.engine) not in ENGINES:
            names = ", ".join(ENGINES)
            raise UserError(f'engine = "{name}": expected {names}, or the URL of an endpoint')
        from truestep.checkpoint.export import exported_system, special_tokens_of
        from truestep.data.chat import check_special_tokens, stop_token_ids
        from truestep.data.templates import choose_template
        from truestep.model.load import load_tokenizer, model_content, resolve
        from truestep.pipeline.prepare import context_and_eos

        context, eos = context_and_eos(settings)
        tokenizer = load_tokenizer(settings.model)
        if (
            settings.chat.template != "model"
        ):  # without one, benchmarks are sent as plain text, and a note says so
            choose_template(tokenizer, settings.chat.template, settings.model.path)
        folder = Path(resolve(settings.model))
        allowed = tuple(dict.fromkeys((*settings.chat.special_tokens, *special_tokens_of(folder))))
        if allowed:
            chat = settings.chat.model_copy(update={"special_tokens": allowed})
            check_special_tokens(tokenizer, chat, stop_token_ids(tokenizer, eos))
        open_engine = ENGINES[name]
        adapter = TokenAdapter(
            tokenizer=tokenizer, context_length=context, model_eos=eos,
            open_engine=cache(lambda: stack.enter_context(open_engine(settings, context))),
            pinned_limit=settings.evaluate.sampling.max_new_tokens == "benchmark", special_tokens=allowed,
            trained_system=exported_system(folder),
        )  # fmt: skip
        yield adapter, model_content(settings.model)


@contextmanager
def _torch(settings: Settings, context: int) -> Iterator[Engine]:
    import torch

    from truestep.device import compute_device, make_deterministic, set_threads
    from truestep.model.load import load_model
    from truestep.rollout.engine_torch import TorchEngine
    from truestep.train.policy import Policy

    set_threads(settings.compute.threads)
    make_deterministic()
    dtype = getattr(torch, settings.compute.dtype)
    policy = Policy(load_model(settings.model, dtype=dtype, device=compute_device(), seed=settings.seed))
    running = settings.evaluate.sampling.max_running
    yield TorchEngine(policy.model, max_running=running, packs=policy.packs and policy.plain_head)


@contextmanager
def _vllm(settings: Settings, context: int) -> Iterator[Engine]:
    from truestep.model.load import resolve
    from truestep.rollout.engine_vllm import serve
    from truestep.rollout.vllm_server import VllmServer

    source, running = resolve(settings.model), settings.evaluate.sampling.max_running
    if source == "tiny":
        raise UserError('engine = "vllm": the built-in model has no model folder; use engine = "torch"')
    dtype = settings.compute.dtype
    server = VllmServer(model=source, dtype=dtype, context_length=context, max_running=running)
    with serve(server) as engine:
        yield engine


ENGINES: dict[str, Callable[[Settings, int], AbstractContextManager[Engine]]] = {
    "torch": _torch,
    "vllm": _vllm,
}


def figures(settings: Settings) -> tuple[int, int, int]:
    """Return the number of parameters, bytes per parameter and bytes per cached token. Loads no weights."""
    from truestep.model.select import empty_model

    model = empty_model(settings.model)
    config, width = model.config, 4 if settings.compute.dtype == "float32" else 2
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_bytes = 2 * heads * size * config.num_hidden_layers * width
    return sum(p.numel() for p in model.parameters()), width, cache_bytes


def plan_of(settings: Settings, jobs: list[Job], adapter: ModelAdapter) -> dict[str, Any]:
    """Return the plan for --dry-run. Every prompt is built and counted, but no weights are loaded. The plan
    has upper bounds for tokens and, if the model runs on this machine, for memory and FLOPs."""
    ready = [adapter.ready(job, settings.evaluate.few_shot) for job in jobs]
    rows: list[dict[str, Any]] = [
        {
            "data": job.benchmark.id, "prompt": job.template.id, "problems": len(job.problems),
            "samples": len(job.problems) * job.samples, "prompt_tokens": made.num_prompt_tokens,
            "generated_tokens_at_most": len(job.problems) * job.samples * made.max_new_tokens,
        }
        for job, made in zip(jobs, ready, strict=True)
    ]  # fmt: skip
    counted = ("samples", "prompt_tokens", "generated_tokens_at_most")
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in counted}
    if not settings.evaluate.is_endpoint:
        num_parameters, bytes_per_parameter, cache_bytes = figures(settings)
        tokens = total["prompt_tokens"] + total["generated_tokens_at_most"]
        total["flops_at_most"] = 2 * num_parameters * tokens
        longest = max(made.max_new_tokens + made.num_prompt_tokens / len(made.prompts) for made in ready)
        most = min(settings.evaluate.sampling.max_running, max(row["samples"] for row in rows))
        weights = num_parameters * bytes_per_parameter
        total["memory_bytes_at_most"] = round(weights + cache_bytes * longest * most)
    if settings.evaluate.engine == "torch":
        import torch

        from truestep.device import matmul_rate

        seconds = total["flops_at_most"] / matmul_rate(getattr(torch, settings.compute.dtype))
        total["hours_if_all_run_to_the_limit"] = round(seconds / 3600, 5)
    notes = remarks(settings, jobs) + [note for made in ready for note in made.notes]
    return {"jobs": rows, "total": total, "notes": notes}
