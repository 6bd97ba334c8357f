"""The main path: take data → assemble → step → publish → log → checkpoint → evaluate, until the stage is
done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from truestep import rundir, signals
from truestep.checkpoint.store import Checkpoint, list_checkpoints, load_latest, save_checkpoint
from truestep.device import peak_memory_bytes
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.objective.methods import Method
from truestep.objective.schedule import Schedule
from truestep.records import StepReport
from truestep.rollout.engine import Engine
from truestep.settings import StageSettings
from truestep.signals import Interrupted
from truestep.train.buffers import Memory, first_memory
from truestep.train.controllers import learn
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import Ranks, is_sharded, local
from truestep.train.policy import Policy
from truestep.train.publish import publish
from truestep.train.source import Source, StepData
from truestep.train.step import StepPlan
from truestep.train.update import Optimizers, Updater

DevScore = Callable[[int], float]  # step → score on the dev set


@dataclass(kw_only=True)
class StageRun:
    """One training stage, assembled: everything the loop touches. ``identity`` is the hash of all that its
    result depends on; a checkpoint of another identity is refused."""

    name: str
    folder: Path
    settings: StageSettings
    identity: str
    policy: Policy
    method: Method
    source: Source
    num_steps: int
    learning_rate: Schedule  # of the optimizer update, 0-based
    temperature: float
    max_length: int
    engine: Engine | None = None
    reference: Policy | None = None  # the stage's start, frozen, where the method asks for it
    dev_score: DevScore | None = None
    ranks: Ranks = field(default_factory=Ranks)
    ledger: Ledger = field(default_factory=Ledger)  # the run's, before this stage; grows
    check_stop: Callable[[], None] = signals.check
    on_step: Callable[[int, Mapping[str, float], float], None] = lambda step, metrics, seconds: None
    warn: Callable[[str], None] = print
    best: dict[str, float] = field(default_factory=dict)  # step and score of the best dev checkpoint


def run_stage(run: StageRun) -> Ledger:
    """Train until ``num_steps`` are done, from the newest checkpoint if there is one; returns the run's
    ledger.

    Raises Interrupted after saving the last completed step. Held by: tests/contract/test_resume.py
    """
    updater = _updater(run)
    start, memory = _restore(run, updater.optimizers)
    if run.engine is not None:
        publish(run.policy, run.engine, start)
    step = saved = start
    try:
        for step in range(start, run.num_steps):
            began = time.perf_counter()
            _stop_together(run)
            data, ledger, rollout_seconds = _take(run, updater, step, memory)
            done_updates = updater.update(data, step)
            reports = done_updates.reports
            memory = learn(run.method, data.memory, step, data.controls, done_updates.statistics, reports)
            run.ledger = run.ledger + ledger + done_updates.ledger
            proof = publish(run.policy, run.engine, step + 1) if run.engine is not None else None
            metrics = _metrics(run, reports, data, None if proof is None else proof.difference)
            if done_updates.buffered is not None:
                metrics |= {
                    f"buffer/{key}": getattr(done_updates.buffered, key) for key in ("loss", "grad_norm")
                }
            metrics |= {f"statistics/{name}": value for name, value in done_updates.statistics.items()}
            done = step + 1
            if run.dev_score is not None and (
                done % run.settings.dev.every_steps == 0 or done == run.num_steps
            ):
                metrics["dev/score"] = run.dev_score(done)
                _keep_best(run, done, metrics["dev/score"])
            seconds = time.perf_counter() - began
            _log(run, done, metrics, data, seconds, rollout_seconds)
            if done % run.settings.save_every == 0 or done == run.num_steps:
                _save(run, updater.optimizers, memory, done)
                saved = done
            run.on_step(done, metrics, seconds)
            step = done
    except Interrupted:
        if step > saved:
            _save(run, updater.optimizers, memory, step)
        raise
    return run.ledger


def _stop_together(run: StageRun) -> None:
    """Between two steps all ranks learn whether any of them was asked to stop, and stop at the same step."""
    asked = int(run.ranks.max([float(signals.pending())])[0])
    if asked:
        raise Interrupted(asked)
    if run.ranks.world_size == 1:
        run.check_stop()


def _updater(run: StageRun) -> Updater:
    plan = StepPlan(
        step=0,
        terms=run.method.terms,
        learning_rate=0.0,
        temperature=run.temperature,
        max_length=run.max_length,
        ranks=run.ranks,
        sharded=is_sharded(run.policy),
        rescue_folder=run.folder,
        check_stop=run.check_stop
        if run.ranks.world_size == 1
        else lambda: None,  # one rank must not leave the others
    )
    optimizer = MasterOptimizer(run.policy, run.settings.optimizer)
    buffer = run.method.buffer
    second = None
    if buffer is not None:
        own = run.settings.optimizer.model_copy(
            update={"lr": buffer.lr, "max_grad_norm": buffer.max_grad_norm}
        )
        second = MasterOptimizer(run.policy, own, beside=optimizer)
    return Updater(
        policy=run.policy,
        reference=run.reference,
        method=run.method,
        settings=run.settings,
        optimizers=Optimizers(main=optimizer, buffer=second),
        learning_rate=run.learning_rate,
        updates_per_step=run.source.updates_per_step,
        plan=plan,
    )


def _take(run: StageRun, updater: Updater, step: int, memory: Memory) -> tuple[StepData, Ledger, float]:
    """The step's data, the work it took to sample them, and the seconds."""
    began = time.perf_counter()
    if run.engine is not None:
        run.engine.take_cost()  # what an interrupted rollout had cost is not this step's
    data = run.source.take(step, memory, updater.entropy_of)
    ledger = data.ledger
    if run.engine is not None:
        cost = run.engine.take_cost()
        ledger = ledger + Ledger(
            prompt_tokens=cost.prefill_tokens,
            generated_pairs=cost.pairs,
            generated_pass_tokens=cost.prefill_tokens + cost.decode_tokens,
        )
    return data, ledger, time.perf_counter() - began


def _metrics(
    run: StageRun, reports: Sequence[StepReport], data: StepData, probe: float | None
) -> dict[str, float]:
    """One row: means over the step's updates, the largest where a maximum is meant."""
    row: dict[str, float] = {
        "loss": sum(r.loss for r in reports) / len(reports),
        "grad_norm": sum(r.grad_norm for r in reports) / len(reports),
        "learning_rate": reports[-1].learning_rate,
        "num_tokens": float(sum(r.num_tokens for r in reports)),
    }
    for key in {k for r in reports for k in r.metrics}:
        values = [r.metrics[key] for r in reports if key in r.metrics]
        row[key] = max(values) if key.endswith("_max") else sum(values) / len(values)
    row |= data.metrics
    if probe is not None:
        row["publish/probe_difference"] = probe
    shape = run.policy.shape
    work = summed(run.ledger, run.ranks)
    row |= {f"work/{kind}": float(count) for kind, count in work.to_json().items()}
    return {
        **dict(sorted(row.items())),
        "flops_paper": work.paper_flops(shape),
        "flops_full": work.full_flops(shape),
    }


def _log(
    run: StageRun,
    done: int,
    metrics: Mapping[str, float],
    data: StepData,
    seconds: float,
    rollout_seconds: float,
) -> None:
    if run.ranks.rank != 0:
        return
    rundir.append_jsonl(
        run.folder / "metrics.jsonl", [{"step": done, **{f"{run.name}/{k}": v for k, v in metrics.items()}}]
    )
    rundir.append_jsonl(run.folder / "rollouts.jsonl", data.rows)
    rundir.append_jsonl(
        run.folder / "timings.jsonl",
        [
            {
                "step": done,
                "seconds": seconds,
                "rollout_seconds": rollout_seconds,
                "train_seconds": seconds - rollout_seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        ],
    )


def _state(run: StageRun, memory: Memory, done: int) -> dict[str, Any]:
    return {
        "step": done,
        "memory": memory.state(),
        "identity": run.identity,
        "ledger": summed(run.ledger, run.ranks).to_json(),
        "best": run.best,
        "threads": torch.get_num_threads(),
    }


def summed(ledger: Ledger, ranks: Ranks) -> Ledger:
    """The work of all ranks (a collective)."""
    raw = ledger.to_json()
    return Ledger(
        **{k: int(v) for k, v in zip(raw, ranks.sum([float(v) for v in raw.values()]), strict=True)}
    )


def _save(run: StageRun, optimizers: Optimizers, memory: Memory, done: int) -> None:
    parameters = {name: local(p.detach()) for name, p in run.policy.named_parameters()}
    tensors = {"parameters": parameters, **optimizers.state_tensors(), "memory": memory.tensors()}
    save_checkpoint(
        run.folder / "checkpoints",
        Checkpoint(step=done, tensors=tensors, state=_state(run, memory, done)),
        keep=run.settings.keep_checkpoints,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        barrier=run.ranks.barrier,
    )


def _keep_best(run: StageRun, done: int, score: float) -> None:
    """Remember the best dev checkpoint's weights, where the stage exports the best and not the last."""
    if run.settings.dev.select_best and score > run.best.get("score", float("-inf")):
        run.best = {"step": done, "score": score}
        parameters = {name: local(p.detach()) for name, p in run.policy.named_parameters()}
        save_checkpoint(
            run.folder / "best",
            Checkpoint(step=done, tensors={"parameters": parameters}, state=_state(run, Memory(), done)),
            keep=1,
            rank=run.ranks.rank,
            world_size=run.ranks.world_size,
            barrier=run.ranks.barrier,
        )


def _restore(run: StageRun, optimizers: Optimizers) -> tuple[int, Memory]:
    """Load the newest valid checkpoint; log files go back to its step, so that nothing is written twice."""
    folder, memory = run.folder / "checkpoints", first_memory(run.method)
    found = load_latest(folder, rank=run.ranks.rank, world_size=run.ranks.world_size, warn=run.warn)
    step = 0
    if found is not None:
        if found.state["identity"] != run.identity:
            raise UserError(
                f"{folder}: its checkpoints belong to other settings (identity {found.state['identity']}, now "
                f"{run.identity}): write another --out, or delete the folder"
            )
        if found.state["threads"] != torch.get_num_threads():
            run.warn(
                f"the checkpoint was made with {found.state['threads']} threads, now {torch.get_num_threads()}: "
                "the run goes on, but is not bit for bit the uninterrupted one"
            )
        load_parameters(run.policy, found)
        optimizers.load_state_tensors(found.tensors)
        memory = Memory.load(found.state["memory"], found.tensors["memory"])
        run.ledger = Ledger.from_json(found.state["ledger"]) if run.ranks.rank == 0 else Ledger()
        run.best = dict(found.state["best"])
        step = found.step
    if run.ranks.rank == 0:
        _forget_later_best(run)
        for name in ("metrics.jsonl", "rollouts.jsonl", "timings.jsonl"):
            rundir.truncate_jsonl(run.folder / name, step)
    return step, memory


def _forget_later_best(run: StageRun) -> None:
    """A best checkpoint that the restored state does not know of comes from steps that are about to be
    redone."""
    found = list_checkpoints(run.folder / "best")
    if found and found[-1].name != f"step_{int(run.best.get('step', -1)):08d}":
        shutil.rmtree(run.folder / "best")


@torch.no_grad()
def load_parameters(policy: Policy, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's parameters into the policy. Raises UserError where it is another model's."""
    saved = checkpoint.tensors["parameters"]
    own = dict(policy.named_parameters())
    if set(saved) != set(own):
        raise UserError(
            f"the checkpoint holds another model's parameters ({sorted(set(saved) ^ set(own))[:2]} ...)"
        )
    for name, parameter in own.items():
        local(parameter).copy_(saved[name])
