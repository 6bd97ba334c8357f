"""``truestep run``: runs the stages of a recipe in order, evaluates after each, and skips finished parts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from truestep import rundir
from truestep.checkpoint.export import NOT_EVALUATED, export_hf, model_card
from truestep.checkpoint.manifest import newest_state
from truestep.checkpoint.store import latest_step
from truestep.checkpoint.tensors import Streamed
from truestep.device import keep_free_memory, make_deterministic, set_threads
from truestep.errors import UserError, count, verb
from truestep.evaluate.compare import compare
from truestep.evaluate.files import ended, read_results, read_samples, results_file, samples_file, score_row
from truestep.flops import Ledger
from truestep.grade.score import Grader
from truestep.model.lora import save_adapter
from truestep.pipeline import shown
from truestep.pipeline.code import with_absolute_paths
from truestep.pipeline.evaluation import evaluate_checkpoint
from truestep.pipeline.history import difference, differing, num_lost_steps, stage_folder, write_history
from truestep.pipeline.models import Session, base_identity, earlier_identities, stage_identity
from truestep.pipeline.prepare import Prepared
from truestep.pipeline.sizes import num_steps
from truestep.pipeline.stages import make_stage, strict_reason
from truestep.pipeline.systems import system_of
from truestep.pipeline.track import Trackers, open_trackers
from truestep.progress import Reporter
from truestep.settings import RlSettings, Settings, SftSettings, load_settings, table_of
from truestep.signals import Interrupted
from truestep.train.checkpoints import load_best, summed
from truestep.train.loop import StageSpec, run_stage
from truestep.train.parallel import Ranks
from truestep.train.watch import WorthlessError
from truestep.train.weight_sync import Gathered

# What is read again of done.json, with its type.
DONE: dict[str, Any] = {
    "identity": str, "name": str, "kind": str, "method": str, "steps": int, "seconds": int | float, "data": str,
    "tokens": dict, "flops_paper": int | float, "flops_full": int | float, "ledger_after": dict, "shape": dict, "best": dict,
}  # fmt: skip


def check_run_folder(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Raise UserError if the folder is in use or, with --resume, has a different run. Writes nothing."""
    held = rundir.holds_run(folder, resume=resume)
    old = load_settings(folder / "resolved.toml").stages if held else ()
    for index, (a, b) in enumerate(zip(settings.stages, old, strict=False)):
        if a.name != b.name:
            names = f"{b.name!r} in this folder but {a.name!r} in the recipe"
            raise UserError(f"{folder}: stage {index + 1} is called {names}; {rundir.ELSEWHERE}")


def open_run_folder(prepared: Prepared, folder: Path, *, resume: bool, rank: int) -> None:
    """Make the run directory, or continue one with --resume. Raises UserError, before it writes anything, if
    the directory is in use or has stages with different settings or data. Only rank 0 checks and writes."""
    if rank != 0:
        return
    settings = prepared.settings
    check_run_folder(settings, folder, resume=resume)
    check_begun_stages(prepared, folder)
    write_history(folder, prepared)
    for index, stage in enumerate(settings.stages):
        done = stage_folder(folder, index, stage) / "done.json"
        if done.exists() and read_done(done.parent)["identity"] != stage_identity(prepared, index):
            done.unlink()  # the stage was changed after it had ended, so it goes on
    rundir.open_run(folder, table_of(with_absolute_paths(settings, prepared.base_dir)))


def check_begun_stages(prepared: Prepared, folder: Path) -> None:
    """Raise UserError if a stage that has begun in the folder cannot be continued with these settings and data."""
    for index in range(len(prepared.settings.stages)):
        _require_identity(prepared, index, folder)
        _require_steps(prepared, index, folder)


def _require_identity(prepared: Prepared, index: int, folder: Path) -> None:
    """Raise UserError if a begun stage was made with different settings or data, other than by a change."""
    stage = stage_folder(folder, index, prepared.settings.stages[index])
    found = []
    if (stage / "done.json").exists():
        done = read_done(stage)
        found.append((done["identity"], done["steps"]))
    if state := newest_state(stage / "checkpoints"):
        found.append((state["identity"], state["step"]))
    identity, earlier = stage_identity(prepared, index), earlier_identities(prepared, index)
    for other, step in found:
        if other != identity and (other not in earlier or earlier[other].step != step):
            raise UserError(difference(prepared, index, folder))
    if num_lost_steps(stage):  # without a checkpoint, only the run's settings say how it was begun
        changed = prepared.history.last()
        if any(changed.get(key) != new for key, (_, new) in differing(prepared, index, folder).items()):
            raise UserError(difference(prepared, index, folder))


def lost_steps(prepared: Prepared, folder: Path) -> list[str]:
    """Return a sentence for each stage that ended before its first checkpoint, and so starts again."""
    found = []
    for index, stage in enumerate(prepared.settings.stages):
        if num := num_lost_steps(stage_folder(folder, index, stage)):
            steps = f"its {count(num, 'finished step')} {verb(num, 'are')} lost"
            found.append(f"{stage.name} ended before its first checkpoint and starts again; {steps}")
    return found


def _require_steps(prepared: Prepared, index: int, folder: Path) -> None:
    """Raise UserError if a stage has done more steps than it has now."""
    stage = prepared.settings.stages[index]
    done = latest_step(stage_folder(folder, index, stage) / "checkpoints")
    if done and isinstance(stage, SftSettings | RlSettings):
        steps = stage.steps
        if isinstance(stage, SftSettings):
            steps = num_steps(stage, [len(prepared.demonstrations[name]) for name in stage.data_names])
        if steps < done:
            key = f"stages.{stage.name}.steps"
            raise UserError(
                f"{key} = {steps}, but {count(done, 'step')} {verb(done, 'are')} done; set {done} or more, or {rundir.ELSEWHERE}"
            )


def read_done(stage: Path) -> dict[str, Any]:
    """Return a finished stage's done.json. Raises UserError if it is damaged or not one."""
    done = rundir.read_json(stage / "done.json")
    if not isinstance(done, dict) or (
        lacking := [key for key in DONE if not isinstance(done.get(key), DONE[key])]
    ):
        what = f"has no valid {lacking[0]}" if isinstance(done, dict) else "is not a JSON object"
        raise UserError(f"{stage / 'done.json'} {what}; {rundir.AGAIN}")
    return done


def run(
    prepared: Prepared, folder: Path, *, ranks: Ranks, reporter: Reporter, is_strict: bool = False
) -> dict[str, Any]:
    """Run what is left of a prepared run. Return its summary on rank 0. Raises Interrupted after saving, and, if
    the run is strict, WorthlessError."""
    settings = prepared.settings
    threads = set_threads(settings.compute.threads)
    make_deterministic()
    keep_free_memory()
    if ranks.rank == 0:
        rundir.write_json(folder / "provenance.json", {**_stamp(prepared), "threads": threads})
    ranks.barrier()  # rank 0 has opened the run directory
    with Grader() as grader:
        given = (settings, folder, prepared.base_dir, prepared.history.changes, reporter.say)
        trackers = open_trackers(*given) if ranks.rank == 0 else Trackers()
        session = Session(
            prepared=prepared, folder=folder, grader=grader, ranks=ranks, reporter=reporter, trackers=trackers,
            is_strict=is_strict,
        )  # fmt: skip
        if ranks.rank == 0:
            summarize(session, "running")
        try:
            _stages(session)
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            if ranks.rank == 0:
                with contextlib.suppress(
                    OSError, UserError
                ):  # the run ends with its own error, not with this one
                    summarize(session, status, error)
            trackers.finish(status)
            raise
        trackers.finish("done")
    return summarize(session, "done") if ranks.rank == 0 else {}


def _stamp(prepared: Prepared) -> dict[str, Any]:
    """Return the provenance, with the changes that were made after the run had begun."""
    changes = [change.model_dump(mode="json") for change in prepared.history.changes]
    return rundir.provenance(prepared.settings.seed) | ({"changes": changes} if changes else {})


def _stages(session: Session) -> None:
    prepared, ranks = session.prepared, session.ranks
    settings = prepared.settings
    path, ledger, steps_before = settings.model.path, Ledger(), 0
    if settings.evaluate.before:
        _evaluate(session, "base", path, base_identity(prepared), 0)
    for index, stage in enumerate(settings.stages):
        folder, identity = stage_folder(session.folder, index, stage), stage_identity(prepared, index)
        if (folder / "done.json").exists():
            done = read_done(folder)
            marks = {n: e for n, e in done.get("files", {}).items() if n.startswith("export/")}
            rundir.verify_files(folder, marks, f"restore it, or {rundir.train_again(folder)}")
            rundir.verify_export(folder / "export")  # it is a result, even if no later stage reads it
            session.reporter.say(f"{stage.name}: already done, skipped")
            session.warned.extend(done.get("warnings", []))
            session.trackers.catch_up(stage.name, steps_before, folder)
        else:
            done = _train(session, index, path, ledger, steps_before)
        ledger = Ledger(**done["ledger_after"]) if ranks.rank == 0 else Ledger()
        steps_before += int(done["steps"])
        path = str(folder / "export")
        ranks.barrier()
        _evaluate(session, stage.name, path, identity, steps_before)
        if ranks.rank == 0:
            _complete_card(session, index, done)
            _warn_if_worse(session, stage.name)
        if reason := strict_reason(session):
            raise WorthlessError(reason)


def _warn_if_worse(session: Session, stage: str) -> None:
    """Warn if the stage's checkpoint is worse than the one before it, by an interval that leaves out 0."""
    for row in comparisons(session):
        if row["to"] == stage and row["high"] < 0:
            text = (
                f"{stage} made the model worse on {row['data']}: {100 * row['difference']:+.1f} points "
                f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}] from {row['from']}"
            )
            session.warned.append({"stage": stage, "kind": "worse", "step": None, "text": text})
            session.reporter.say(f"warning: {text}")


def _evaluate(session: Session, checkpoint: str, path: str, identity: str, step: int) -> None:
    """Evaluate after a step of the run, on all ranks, which wait until rank 0 has written the summary."""
    if session.prepared.settings.evaluate.data:
        evaluate_checkpoint(session, checkpoint, path, identity)
        if session.ranks.rank == 0:
            session.evaluated.append(checkpoint)
            rows = summarize(session, "running")["scores"]
            session.trackers.score(step, checkpoint, [row for row in rows if row["checkpoint"] == checkpoint])
    session.ranks.barrier()


def _train(session: Session, index: int, path: str, before: Ledger, steps_before: int) -> dict[str, Any]:
    """Train and export a stage, and write its done.json, which makes later runs skip the stage."""
    began = time.perf_counter()
    with ExitStack() as stack:
        spec = make_stage(session, index, path, before, steps_before, stack)
        latest = latest_step(spec.folder / "checkpoints")
        if latest:
            session.reporter.say(f"{spec.name}: continuing after step {latest}/{spec.num_steps}")
        session.reporter.say(shown.stage_line(spec))
        kind, measured = spec.settings.kind, spec.settings.watched_data
        what = spec.name if spec.name == kind else f"{spec.name} ({kind})"
        session.reporter.begin(what, spec.num_steps, latest, shown.head(kind, measured))
        state = run_stage(spec)
    if state.step < spec.num_steps:
        watch, stall = spec.settings.early_stopping.watch, state.stall
        more, least = 2 * spec.settings.early_stopping.patience, spec.settings.early_stopping.min_change
        by = f" by more than {least:g} (min_change)" if least else ""
        session.reporter.say(
            f"{spec.name}: ended early after step {state.step}/{spec.num_steps}: {watch} was measured "
            f"{count(round(stall['since']), 'time')} without a value better than {stall['best']:.6g}{by}; "
            f"to go on, pass --change stages.{spec.name}.early_stopping.patience={more} (0: never ends early)"
        )
    if state.best:
        load_best(spec, state)
    step, why = shown.exported(spec, state.step, state.best)
    session.reporter.say(f"{spec.name}: exports step {step} of {spec.num_steps}, {why}")
    own = Ledger(**{k: v - vars(before)[k] for k, v in vars(state.ledger).items()})
    totals = [summed(part, session.ranks) for part in (own, state.ledger)]
    shape = spec.policy.shape
    done = {
        "identity": spec.identity, "name": spec.name, "kind": spec.settings.kind,
        "method": spec.updater.method.name, "steps": state.step, "seconds": time.perf_counter() - began,
        "data": "+".join(spec.settings.data_names), "tokens": asdict(totals[0]),
        "flops_paper": totals[0].paper_flops(shape), "flops_full": totals[0].full_flops(shape),
        "ledger_after": asdict(totals[1]), "best": dict(state.best), "shape": shape.to_json(),
        "exported": {"step": step, "why": why}, **(_cost(spec) if session.ranks.rank == 0 else {}),
        "warnings": [warning for warning in session.warned if warning["stage"] == spec.name],
    }  # fmt: skip
    if state.step < spec.num_steps:
        done["ended_early"] = {"planned_steps": spec.num_steps, **state.stall}
    _export(session, index, spec, done, path)
    if session.ranks.rank == 0:
        mark = rundir.record_files(spec.folder, [spec.folder / "export" / rundir.EXPORT_MARK])
        done["files"] = {**spec.logs.seal(), **mark}
        rundir.write_json(spec.folder / "done.json", done)
    return done


def _cost(spec: StageSpec) -> dict[str, float]:
    """Return the trained tokens per second of all steps, and the largest memory of this process in bytes."""
    tokens = sum(row[f"{spec.name}/num_tokens"] for row in rundir.read_jsonl(spec.folder / "metrics.jsonl"))
    timings = rundir.read_jsonl(spec.folder / "timings.jsonl")
    seconds = sum(row["seconds"] for row in timings)
    return {
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in timings), default=0),
    }


@torch.no_grad()
def _export(session: Session, index: int, spec: StageSpec, done: Mapping[str, Any], path: str) -> None:
    """Export the stage's model as a Hugging Face folder. The tensors of a sharded model are gathered one at a time.
    Adapters are merged into it, and exported beside it."""
    model, settings, lora = spec.policy.model, session.prepared.settings, spec.settings.lora
    weights = Gathered(spec.policy, merges=True)
    if lora.rank:
        own = Gathered(spec.policy)
        trained = {name: own[name].cpu() for name in own if own.data[name].requires_grad}
        if session.ranks.rank == 0:
            save_adapter(spec.folder / "adapter", model, trained, lora, rundir.redact(path))
    if session.ranks.rank != 0:
        for name in weights:
            weights[name]  # a collective, if it is sharded
        return
    problems = (p for name in spec.settings.data_names for p in session.prepared.problems[name])
    export_hf(
        spec.folder / "export", model, session.prepared.tokenizer, card=_card(session, index, done),
        special_tokens=settings.chat.special_tokens, system=system_of(problems, settings.chat.system),
        weights=Streamed({name: weights.empty(name) for name in weights}, weights.__getitem__),
    )  # fmt: skip


def _card(session: Session, index: int, done: Mapping[str, Any]) -> str:
    """Return the model card of a stage's export, with only its own scores."""
    settings, rows = session.prepared.settings, [*stage_rows(session, index), stage_row(session, done)]
    scores = [score for score in score_rows(session) if score["checkpoint"] == done["name"]]
    weights = shown.weights(done)
    return model_card(settings.name, settings.model.path, rows, scores, _stamp(session.prepared), weights)


def _complete_card(session: Session, index: int, done: Mapping[str, Any]) -> None:
    """Write the scores of a stage's export, which are known only after the export, into its model card."""
    path = stage_folder(session.folder, index, session.prepared.settings.stages[index]) / "export/README.md"
    if done["name"] in session.evaluated and path.is_file() and NOT_EVALUATED in path.read_text("utf-8"):
        rundir.write_atomic(path, _card(session, index, done))


def stage_row(session: Session, done: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "kind", "method", "data", "steps", "flops_paper", "flops_full", "seconds", "tokens")
    # Older versions wrote no "exported", and no memory.
    more = {key: done[key] for key in ("exported", "tokens_per_second", "peak_memory_bytes") if key in done}
    row = {key: done[key] for key in kept} | more
    return row | {"seed": session.prepared.settings.seed, "flops": done["flops_paper"]}


def stage_rows(session: Session, before: int | None = None) -> list[dict[str, Any]]:
    stages = session.prepared.settings.stages[:before]
    folders = [stage_folder(session.folder, index, stage) for index, stage in enumerate(stages)]
    return [stage_row(session, read_done(path)) for path in folders if (path / "done.json").exists()]


def _checkpoints(session: Session) -> list[Path]:
    """Return the folders of the evaluations, in the order of the checkpoints."""
    return [session.folder / "evaluations" / name for name in session.evaluated]


def score_rows(session: Session) -> list[dict[str, Any]]:
    """Return the score of every checkpoint on every data set that has results."""
    sets = session.prepared.settings.evaluate.data
    paths = [(c.name, d, results_file(c, d)) for c in _checkpoints(session) for d in sets]
    return [score_row(d, read_results(path), checkpoint=c) for c, d, path in paths if path.exists()]


def comparisons(session: Session) -> list[dict[str, Any]]:
    """Compare each checkpoint with the previous one, paired by problem."""
    rows = []
    for before, after in pairwise(_checkpoints(session)):
        for name in session.prepared.settings.evaluate.data:
            if all(results_file(c, name).exists() for c in (before, after)):
                a, b = (read_samples(samples_file(c, name)) for c in (before, after))
                row = {"from": before.name, "to": after.name, "data": name, **compare(a, b).to_json()}
                rows.append(row)
    return rows


def summarize(session: Session, status: str, error: BaseException | None = None) -> dict[str, Any]:
    """Write and return summary.json, which lists what the run has done, for the report and the exports. A run
    that failed has the first line of its error."""
    prepared, settings = session.prepared, session.prepared.settings
    shapes = [read_done(p.parent)["shape"] for p in sorted(session.folder.glob("stages/*/done.json"))]
    model = {key: value for key, value in shapes[0].items() if "backward" not in key} if shapes else {}
    summary = {
        "name": settings.name, "seed": settings.seed, "status": status,
        "model": {"path": rundir.redact(settings.model.path), **model},
        "stages": stage_rows(session), "scores": score_rows(session), "comparisons": comparisons(session),
        "content": {"model": prepared.model_content, **prepared.content},
        "code": {name: code for name, code in prepared.code.items() if code},
        "overlap": prepared.overlap or None, "notes": prepared.notes, "warnings": session.warned,
    } | ended(status, error or "")  # fmt: skip
    rundir.write_json(session.folder / "summary.json", summary)
    return summary
