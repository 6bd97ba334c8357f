"""``truestep run``: base → stage → stage …, an evaluation after each, every part resumable and skipped when
done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from truestep import rundir
from truestep.checkpoint.export import export_hf, model_card
from truestep.checkpoint.store import list_checkpoints, load_latest
from truestep.device import keep_free_memory, make_deterministic, set_threads
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.grade.score import Grader
from truestep.pipeline.evaluation import comparisons, score_rows
from truestep.pipeline.prepare import Prepared, base_identity, evaluation_identity, stage_identity
from truestep.pipeline.stages import Session, evaluate, make_stage, open_model, stage_folder
from truestep.pipeline.track import open_trackers
from truestep.progress import Reporter
from truestep.records import RecordError
from truestep.settings import Settings, StageSettings, load_settings
from truestep.signals import Interrupted
from truestep.train.loop import StageRun, load_parameters, run_stage, summed
from truestep.train.parallel import Ranks, full, is_sharded


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where the run lies and what its summary says."""

    folder: Path
    summary: Mapping[str, Any]


def check_run_folder(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Raises UserError if the run directory is taken, or, with --resume, another run's. Writes nothing."""
    if rundir.holds_run(folder, resume=resume):
        _require_same_stages(settings, load_settings(folder / "resolved.toml"), folder)


def open_run_folder(prepared: Prepared, folder: Path, *, resume: bool, rank: int) -> None:
    """Make the run directory, or join an existing one with --resume.

    Raises UserError, before anything is written, where it is taken or holds stages of other settings or
    data. Rank 0 alone looks: to the others, what it has just made would seem to be taken.
    """
    if rank != 0:
        return
    settings = prepared.settings
    check_run_folder(settings, folder, resume=resume)
    for index, stage in enumerate(settings.stages):
        _require_identity(stage_folder(folder, index, stage), stage_identity(prepared, index))
    rundir.open_run(folder, settings.model_dump(mode="json"))


def _require_identity(stage: Path, identity: str) -> None:
    """A stage that is done, or has been begun, was made by these settings from this data."""
    found = [rundir.read_json(stage / "done.json")["identity"]] if (stage / "done.json").exists() else []
    for checkpoint in list_checkpoints(stage / "checkpoints")[-1:]:
        with contextlib.suppress(
            ValueError, KeyError, TypeError, OSError
        ):  # a damaged one is passed over when loading
            found.append(rundir.read_json(checkpoint / "manifest.json")["state"]["identity"])
    for other in found:
        if other != identity:
            raise UserError(
                f"{stage}: was made with other settings or data (identity {other}, now {identity}): "
                "write another --out, or delete that folder to train the stage again"
            )


def _require_same_stages(new: Settings, old: Settings, folder: Path) -> None:
    for index, (a, b) in enumerate(zip(new.stages, old.stages, strict=False)):
        if a.name != b.name:
            raise UserError(
                f"{folder}: stage {index + 1} is called {b.name!r} there and {a.name!r} here: write another --out"
            )


def run(prepared: Prepared, folder: Path, *, ranks: Ranks, reporter: Reporter) -> RunResult:
    """Do what is not yet done of a prepared run. Raises Interrupted with everything saved."""
    settings = prepared.settings
    set_threads(settings.compute.threads)
    make_deterministic()
    keep_free_memory()
    if ranks.rank == 0:
        rundir.write_json(folder / "provenance.json", rundir.provenance(settings.seed))
    with Grader() as grader:
        trackers = open_trackers(settings.trackers, folder, settings.name) if ranks.rank == 0 else []
        session = Session(
            prepared=prepared, folder=folder, grader=grader, ranks=ranks, reporter=reporter, trackers=trackers
        )
        try:
            _stages(session)
        except Interrupted:
            if ranks.rank == 0:
                _summarize(session, "interrupted")
            raise
    summary = _summarize(session, "done") if ranks.rank == 0 else {}
    return RunResult(folder=folder, summary=summary)


def _stages(session: Session) -> None:
    prepared, ranks = session.prepared, session.ranks
    settings = prepared.settings
    path, identity = settings.model.path, base_identity(prepared)
    if settings.evaluate.before:
        _evaluate(session, "base", path, identity)
    ledger = Ledger()
    for index, stage in enumerate(settings.stages):
        identity = stage_identity(prepared, index)
        done = _done(session, index, stage, identity)
        if done is None:
            done = _train(session, index, path, ledger, identity)
        else:
            session.reporter.say(f"{stage.name}: done already, skipped")
        ledger = Ledger.from_json(done["ledger_after"]) if ranks.rank == 0 else Ledger()
        session.steps_before += int(done["steps"])
        path = str(stage_folder(session.folder, index, stage) / "export")
        ranks.barrier()
        _evaluate(session, stage.name, path, identity)


def _evaluate(session: Session, checkpoint: str, path: str, identity: str) -> None:
    """On rank 0; the others wait."""
    if session.ranks.rank == 0 and session.prepared.settings.evaluate.data:
        evaluate(
            session, checkpoint, path, lambda name: evaluation_identity(session.prepared, identity, name)
        )
        _summarize(session, "running")
    session.ranks.barrier()


def _done(session: Session, index: int, stage: StageSettings, identity: str) -> dict[str, Any] | None:
    folder = stage_folder(session.folder, index, stage)
    _require_identity(folder, identity)
    return rundir.read_json(folder / "done.json") if (folder / "done.json").exists() else None


def _train(session: Session, index: int, path: str, before: Ledger, identity: str) -> dict[str, Any]:
    """Train, export, and leave done.json: from then on the stage is skipped."""
    stage = session.prepared.settings.stages[index]
    began = time.perf_counter()
    run_ = make_stage(session, index, path, before)
    latest = load_latest_step(run_)
    if latest:
        session.reporter.say(f"{stage.name}: resumed at step {latest}/{run_.num_steps}")
    session.reporter.begin(f"{stage.name} ({stage.kind})", run_.num_steps, latest)
    ledger = run_stage(run_)
    if run_.best:
        best = load_latest(
            run_.folder / "best",
            rank=session.ranks.rank,
            world_size=session.ranks.world_size,
            warn=session.reporter.say,
        )
        if best is None or best.step != run_.best["step"]:
            raise RecordError(
                f"{run_.folder / 'best'} does not hold step {run_.best['step']}, the best on the dev set"
            )
        load_parameters(run_.policy, best)
    own = Ledger(**{k: v - before.to_json()[k] for k, v in ledger.to_json().items()})
    totals = [summed(part, session.ranks) for part in (own, ledger)]
    shape = run_.policy.shape
    done = {
        "identity": identity,
        "name": stage.name,
        "kind": stage.kind,
        "method": run_.method.name,
        "steps": run_.num_steps,
        "seconds": time.perf_counter() - began,
        "data": stage.data,
        "tokens": totals[0].to_json(),
        "flops_paper": totals[0].paper_flops(shape),
        "flops_full": totals[0].full_flops(shape),
        "ledger_after": totals[1].to_json(),
        "best": run_.best,
        "shape": asdict(shape),
    }
    _export(session, index, run_, done)
    if session.ranks.rank == 0:
        rundir.write_json(run_.folder / "done.json", done)
    return done


def load_latest_step(run_: StageRun) -> int:
    """The step a stage will resume from (0 at a fresh start), without loading its tensors."""
    pointer = run_.folder / "checkpoints" / "latest"
    text = pointer.read_text().strip() if pointer.exists() else ""
    return int(text.rpartition("_")[2]) if text.rpartition("_")[2].isdigit() else 0


@torch.no_grad()
def _export(session: Session, index: int, run_: StageRun, done: Mapping[str, Any]) -> None:
    """The stage's model as a Hugging Face folder; gathered to rank 0's memory where it is sharded."""
    weights = {
        name.removeprefix("model."): full(p.detach()).cpu() for name, p in run_.policy.named_parameters()
    }
    if session.ranks.rank != 0:
        return
    model = run_.policy.model
    if is_sharded(run_.policy):
        model = open_model(session, session.prepared.settings.model.path).model
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    card = model_card(
        session.prepared.settings.name,
        session.prepared.settings.model.path,
        [*_stage_rows(session, index), _stage_row(session, done)],
        score_rows(*_evaluated(session)),
        rundir.provenance(session.prepared.settings.seed),
    )
    export_hf(run_.folder / "export", model, session.prepared.tokenizer, card=card)


def _stage_row(session: Session, done: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "kind", "method", "data", "steps", "flops_paper", "flops_full", "seconds", "tokens")
    return {
        **{k: done[k] for k in kept},
        "seed": session.prepared.settings.seed,
        "flops": done["flops_paper"],
    }


def _stage_rows(session: Session, before: int | None = None) -> list[dict[str, Any]]:
    rows = []
    for index, stage in enumerate(session.prepared.settings.stages[:before]):
        path = stage_folder(session.folder, index, stage) / "done.json"
        if path.exists():
            rows.append(_stage_row(session, rundir.read_json(path)))
    return rows


def _evaluated(session: Session) -> tuple[Path, list[str], tuple[str, ...]]:
    """Where the evaluations are, of which checkpoints, on what."""
    settings = session.prepared.settings
    return (
        session.folder / "evaluations",
        ["base", *(s.name for s in settings.stages)],
        settings.evaluate.data,
    )


def _summarize(session: Session, status: str) -> dict[str, Any]:
    settings = session.prepared.settings
    shapes = [rundir.read_json(p)["shape"] for p in sorted(session.folder.glob("stages/*/done.json"))]
    summary = {
        "name": settings.name,
        "seed": settings.seed,
        "status": status,
        "model": {"path": rundir.redact(settings.model.path), **(shapes[0] if shapes else {})},
        "stages": _stage_rows(session),
        "scores": score_rows(*_evaluated(session)),
        "comparisons": comparisons(*_evaluated(session)),
        "content": {"model": session.prepared.model_content, **session.prepared.content},
        "overlap": session.prepared.overlap or None,
        "notes": session.prepared.notes,
    }
    rundir.write_json(session.folder / "summary.json", summary)
    return summary
