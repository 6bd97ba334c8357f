"""The main loop of a stage: take data, update, publish, evaluate, log and save, until the stage is done.

The state is an immutable value. A step takes a state and returns the next one; between steps, the loop saves,
stops and logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from truestep import signals
from truestep.device import peak_memory_bytes
from truestep.flops import Ledger
from truestep.rollout.engine import Engine
from truestep.settings import StageSettings
from truestep.signals import Interrupted
from truestep.train import ahead, checkpoints
from truestep.train.checkpoints import Earlier, TrainState, summed
from truestep.train.engine_test import GapTest, SelfTest
from truestep.train.logs import StageLogs
from truestep.train.memory import learn
from truestep.train.metrics import checked
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.source import DemonstrationSource, RolloutSource
from truestep.train.step import NonFiniteError
from truestep.train.undo import Undo
from truestep.train.update import Updater
from truestep.train.validation import counted, has_stalled
from truestep.train.watch import WorthlessError
from truestep.train.weight_sync import publish

Measure = Callable[[int], float]  # step → score on the dev set, or validation loss


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One training stage, with its policy, data and updates. ``identity`` is the hash of everything that the
    result depends on. A checkpoint with a different identity is refused, unless it is one of the ``earlier`` ones,
    from before a change of settings that was made at its step."""

    name: str
    folder: Path
    settings: StageSettings
    identity: str
    earlier: Mapping[str, Earlier] = field(default_factory=dict)
    policy: Policy
    source: DemonstrationSource | RolloutSource
    updater: Updater
    num_steps: int
    engine: Engine | None = None
    gaps: GapTest | None = None  # the updater's observer of what the engine sampled
    dev_score: Measure | None = None
    validation_loss: Measure | None = None
    ranks: Ranks = field(default_factory=Ranks)
    ledger: Ledger = field(default_factory=Ledger)  # the run's work before this stage
    on_step: Callable[[int, Mapping[str, float], float], None] = lambda step, metrics, seconds: None
    warn: Callable[[str], None] = print
    stop_reason: Callable[[], str] = lambda: ""  # why the stage must stop after this step; "": it goes on

    @cached_property
    def logs(self) -> StageLogs:
        return StageLogs(self.folder)


def run_stage(spec: StageSpec) -> TrainState:
    """Train until ``num_steps`` steps are done, from the newest checkpoint if there is one.

    Raises Interrupted or WorthlessError after saving what is done. Held by: tests/contract/test_resume.py"""
    state = saved = checkpoints.restore(spec)
    spec.ranks.barrier()  # they have read their files from the disk
    saved_at = time.monotonic()
    if spec.engine is not None:
        prove_engine(spec, spec.engine, state.step)
    undo = Undo(tuple(spec.updater.optimizers.values()), spec.ranks)
    try:
        while not is_done(spec, state) or state.unlogged is not None:
            if state.unlogged is None:
                _stop_together(spec)
                # A step may be dropped in the middle if the state before it is on the disk or in memory.
                state = train(spec, state, undo, may_drop=state is saved or undo.is_ready())
                signals.release()
            state = finish(spec, state)
            signals.release()
            reason, is_last = spec.stop_reason(), is_done(spec, state)
            if is_last or _must_save(spec, state.step, time.monotonic() - saved_at) or reason:
                checkpoints.save(spec, state)
                saved, saved_at = state, time.monotonic()
            if reason:
                raise WorthlessError(reason)
    except Interrupted:
        signals.hold()
        spec.source.drop()
        if state is not saved:
            undo.put_back()
            checkpoints.save(spec, state)
        raise
    except NonFiniteError as error:
        raise checkpoints.rescued(spec, error) from error
    finally:
        spec.source.drop()
        signals.release()
    return state


def prove_engine(spec: StageSpec, engine: Engine, version: int) -> None:
    """Give the engine the weights, and say what proves at every update that it has them. An engine whose bits
    cannot be compared is tested first."""
    receipt = publish(spec.policy, engine, version, spec.ranks)
    if receipt.is_received:
        right = SelfTest(spec.policy, engine, spec.updater.scorer, version).run(spec.warn)
        if spec.gaps is not None:
            spec.gaps.right = right
    spec.warn(f"{spec.name}: at every update, {receipt.proof}")
    if isinstance(spec.source, RolloutSource) and spec.source.is_ahead:
        spec.warn(
            f"{spec.name}: rollout_ahead = 1: engine and trainer are compared when they have the same weights, not on "
            "the older samples of an update"
        )


def train(spec: StageSpec, state: TrainState, undo: Undo, *, may_drop: bool) -> TrainState:
    """Take one step: get its data, make its optimizer updates, and give the new weights to the engine."""
    began, source, waiting, waited = time.perf_counter(), spec.source, None, 0.0
    beside = source if isinstance(source, RolloutSource) and source.is_ahead else None
    data = source.take(state.step, state.memory) if beside is None else ahead.begin(spec, beside, state)
    if spec.engine is not None and beside is None:
        spec.engine.rest()
    sampled = time.perf_counter()
    updates = spec.updater.update(data, state.step, may_drop=may_drop)
    if updates.later_seconds is not None:
        undo.learn(updates.later_seconds)
    memory = learn(spec.updater.method, data.memory, state.step, data.controls, updates.seen)
    found, done = updates.metrics, state.step + 1
    if beside is not None:
        found, updated = ahead.as_change(found), time.perf_counter()
        waiting = ahead.collected(spec, beside, state.step)
        waited = time.perf_counter() - updated
    metrics = {**found, **data.metrics}
    if spec.engine is not None:
        publish(spec.policy, spec.engine, done, spec.ranks)
    rollout = sampled - began + waited  # beside the training: only the time in which the training waited
    times = {"rollout_seconds": rollout, "train_seconds": time.perf_counter() - began - rollout}
    unlogged = {"metrics": metrics, "rows": list(data.rows), "times": times}
    ledger = state.ledger + data.ledger + updates.ledger
    return replace(state, step=done, memory=memory, ledger=ledger, unlogged=unlogged, waiting=waiting)


def finish(spec: StageSpec, state: TrainState) -> TrainState:
    """Compute what is measured after the step, and write its log lines. A resumed run does both again."""
    unlogged, began = state.unlogged, time.perf_counter()
    assert unlogged is not None
    metrics, times = dict(unlogged["metrics"]), dict(unlogged["times"])
    for key, measure, settings in (
        ("dev/score", spec.dev_score, spec.settings.dev),
        ("validation/loss", spec.validation_loss, spec.settings.validation),
    ):
        if measure is not None and (state.step % settings.every_steps == 0 or state.step == spec.num_steps):
            metrics[key] = measure(state.step)
            if settings.select_best:
                state = checkpoints.keep_best(spec, state, key, metrics[key])
    state = replace(state, stall=counted(spec.settings.early_stopping, state.stall, metrics))
    shape, work = spec.policy.shape, summed(state.ledger, spec.ranks)
    metrics |= {f"work/{kind}": float(count) for kind, count in vars(work).items()}
    metrics |= {"flops_paper": work.paper_flops(shape), "flops_full": work.full_flops(shape)}
    metrics = checked(metrics)
    seconds = sum(times.values()) + time.perf_counter() - began
    signals.hold()  # until the state says that the lines are written
    if spec.ranks.rank == 0:
        named = {f"{spec.name}/{key}": value for key, value in metrics.items()}
        timings = {"seconds": seconds, **times, "peak_memory_bytes": peak_memory_bytes()}
        spec.logs.append("metrics.jsonl", [{"step": state.step, **named}])
        spec.logs.append("rollouts.jsonl", unlogged["rows"])
        spec.logs.append("timings.jsonl", [{"step": state.step, **timings}])
    spec.on_step(state.step, metrics, seconds)
    return replace(state, unlogged=None)


def is_done(spec: StageSpec, state: TrainState) -> bool:
    """Return whether all steps are done, or the stage ends early."""
    return state.step >= spec.num_steps or has_stalled(spec.settings.early_stopping, state.stall)


def _must_save(spec: StageSpec, step: int, seconds: float) -> bool:
    """Return whether a checkpoint is due after this step. ``seconds`` have passed since the last one. If time
    decides, rank 0's clock decides for all ranks (a collective)."""
    minutes = spec.settings.save_every_minutes
    if step % spec.settings.save_every == 0:
        return True
    if minutes == 0:
        return False
    return bool(spec.ranks.max([float(spec.ranks.rank == 0 and seconds >= 60 * minutes)])[0])


def _stop_together(spec: StageSpec) -> None:
    """Raise Interrupted on every rank, between the same two steps, if any rank received a signal to stop."""
    spec.ranks.stop_point()
