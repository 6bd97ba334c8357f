"""``truestep run``: base → stage → stage …, an evaluation after each; what is done already is skipped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from truestep import rundir
from truestep.checkpoint.export import export_hf, model_card
from truestep.checkpoint.store import latest_step, list_checkpoints
from truestep.device import keep_free_memory, make_deterministic, set_threads
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.grade.score import Grader
from truestep.pipeline.evaluation import score_rows
from truestep.pipeline.identity import base_identity, evaluation_identity, stage_identity
from truestep.pipeline.models import Session, open_model
from truestep.pipeline.prepare import Prepared
from truestep.pipeline.stages import evaluate, make_stage, stage_folder
from truestep.pipeline.summary import evaluated, stage_row, stage_rows, summarize
from truestep.pipeline.track import open_trackers
from truestep.progress import Reporter
from truestep.settings import Settings, StageSettings, load_settings
from truestep.signals import Interrupted
from truestep.train.checkpoints import load_best, summed
from truestep.train.loop import StageSpec, run_stage
from truestep.train.parallel import Ranks, full, is_sharded


@dataclass(frozen=True, kw_only=True)
class RunResult:
    folder: Path
    summary: Mapping[str, Any]


def check_run_folder(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Raises UserError if the run directory is taken, or with --resume another run's. Writes nothing."""
    if rundir.holds_run(folder, resume=resume):
        _require_same_stages(settings, load_settings(folder / "resolved.toml"), folder)


def open_run_folder(prepared: Prepared, folder: Path, *, resume: bool, rank: int) -> None:
    """Make the run directory, or continue an existing one with --resume. Raises UserError, before anything is
    written, if it is taken or has stages of other settings or data. Only rank 0 checks: the others would take
    the directory that it has just made for another run's."""
    if rank != 0:
        return
    settings = prepared.settings
    check_run_folder(settings, folder, resume=resume)
    for index, stage in enumerate(settings.stages):
        _require_identity(stage_folder(folder, index, stage), stage_identity(prepared, index))
    rundir.open_run(folder, settings.model_dump(mode="json"))


def _require_identity(stage: Path, identity: str) -> None:
    """Raises UserError if a stage that is done or begun was made with other settings or data."""
    found = [rundir.read_json(stage / "done.json")["identity"]] if (stage / "done.json").exists() else []
    for checkpoint in list_checkpoints(stage / "checkpoints")[-1:]:
        # a damaged checkpoint is passed over when loading
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            found.append(rundir.read_json(checkpoint / "manifest.json")["state"]["identity"])
    for other in found:
        if other != identity:
            raise UserError(
                f"{stage}: was made with other settings or data (identity {other}, now {identity}); "
                f"{rundir.ELSEWHERE}, or delete that folder to train the stage again"
            )


def _require_same_stages(new: Settings, old: Settings, folder: Path) -> None:
    for index, (a, b) in enumerate(zip(new.stages, old.stages, strict=False)):
        if a.name != b.name:
            names = f"{b.name!r} there and {a.name!r} here"
            raise UserError(f"{folder}: stage {index + 1} is called {names}; {rundir.ELSEWHERE}")


def run(prepared: Prepared, folder: Path, *, ranks: Ranks, reporter: Reporter) -> RunResult:
    """Do what is not yet done of a prepared run. Raises Interrupted with everything saved."""
    settings = prepared.settings
    threads = set_threads(settings.compute.threads)
    make_deterministic()
    keep_free_memory()
    if ranks.rank == 0:
        provenance = {**rundir.provenance(settings.seed), "threads": threads}
        rundir.write_json(folder / "provenance.json", provenance)
    with Grader() as grader:
        trackers = open_trackers(settings.trackers, folder, settings.name) if ranks.rank == 0 else []
        session = Session(
            prepared=prepared, folder=folder, grader=grader, ranks=ranks, reporter=reporter, trackers=trackers
        )
        try:
            _stages(session)
        except Interrupted:
            if ranks.rank == 0:
                summarize(session, "interrupted")
            raise
    summary = summarize(session, "done") if ranks.rank == 0 else {}
    return RunResult(folder=folder, summary=summary)


def _stages(session: Session) -> None:
    prepared, ranks = session.prepared, session.ranks
    settings = prepared.settings
    path, identity = settings.model.path, base_identity(prepared)
    if settings.evaluate.before:
        _evaluate(session, "base", path, identity)
    ledger, steps_before = Ledger(), 0
    for index, stage in enumerate(settings.stages):
        done = _done(session, index, stage)
        if done is None:
            done = _train(session, index, path, ledger, steps_before)
        else:
            session.reporter.say(f"{stage.name}: already done, skipped")
        ledger = Ledger(**done["ledger_after"]) if ranks.rank == 0 else Ledger()
        steps_before += int(done["steps"])
        path = str(stage_folder(session.folder, index, stage) / "export")
        ranks.barrier()
        _evaluate(session, stage.name, path, stage_identity(prepared, index))


def _evaluate(session: Session, checkpoint: str, path: str, identity: str) -> None:
    """On rank 0; the others wait."""
    if session.ranks.rank == 0 and session.prepared.settings.evaluate.data:
        evaluate(session, checkpoint, path, partial(evaluation_identity, session.prepared, identity))
        summarize(session, "running")
    session.ranks.barrier()


def _done(session: Session, index: int, stage: StageSettings) -> dict[str, Any] | None:
    folder = stage_folder(session.folder, index, stage)
    _require_identity(folder, stage_identity(session.prepared, index))
    return rundir.read_json(folder / "done.json") if (folder / "done.json").exists() else None


def _train(session: Session, index: int, path: str, before: Ledger, steps_before: int) -> dict[str, Any]:
    """Train, export, and write done.json, with which the stage is skipped."""
    began = time.perf_counter()
    with ExitStack() as stack:
        spec = make_stage(session, index, path, before, steps_before, stack)
        latest = latest_step(spec.folder / "checkpoints")
        if latest:
            session.reporter.say(f"{spec.name}: resumed at step {latest}/{spec.num_steps}")
        session.reporter.begin(f"{spec.name} ({spec.settings.kind})", spec.num_steps, latest)
        state = run_stage(spec)
    if state.best:
        load_best(spec, state)
    own = Ledger(**{k: v - vars(before)[k] for k, v in vars(state.ledger).items()})
    totals = [summed(part, session.ranks) for part in (own, state.ledger)]
    shape = spec.policy.shape
    done = {
        "identity": spec.identity,
        "name": spec.name,
        "kind": spec.settings.kind,
        "method": spec.updater.method.name,
        "steps": spec.num_steps,
        "seconds": time.perf_counter() - began,
        "data": spec.settings.data,
        "tokens": asdict(totals[0]),
        "flops_paper": totals[0].paper_flops(shape),
        "flops_full": totals[0].full_flops(shape),
        "ledger_after": asdict(totals[1]),
        "best": dict(state.best),
        "shape": asdict(shape),
    }
    _export(session, index, spec, done)
    if session.ranks.rank == 0:
        rundir.write_json(spec.folder / "done.json", done)
    return done


@torch.no_grad()
def _export(session: Session, index: int, spec: StageSpec, done: Mapping[str, Any]) -> None:
    """The stage's model as a Hugging Face folder; a sharded one is gathered in rank 0's memory."""
    parameters = spec.policy.named_parameters()
    weights = {name.removeprefix("model."): full(p.detach()).cpu() for name, p in parameters}
    if session.ranks.rank != 0:
        return
    model, settings = spec.policy.model, session.prepared.settings
    if is_sharded(spec.policy):
        model = open_model(session, settings.model.path).model
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    rows, scores = [*stage_rows(session, index), stage_row(session, done)], score_rows(*evaluated(session))
    stamp = rundir.provenance(settings.seed)
    card = model_card(settings.name, settings.model.path, rows, scores, stamp)
    export_hf(spec.folder / "export", model, session.prepared.tokenizer, card=card)
