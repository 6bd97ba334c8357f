"""``truestep method check``, which tests relations that every method must satisfy, whatever its objective.

The method trains a tiny model in float64 on generated problems, with the source, updater and loop of a run.
The update must be the same however a step is split, packed, ordered, or divided between two processes. A
resumed run must be bit-identical to an uninterrupted one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from truestep import rundir
from truestep.device import set_threads
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.grade.score import Grader
from truestep.pipeline.models import Session
from truestep.pipeline.prepare import find_method, prepare
from truestep.pipeline.run import open_run_folder, run
from truestep.pipeline.stages import make_stage, optimizers_of
from truestep.progress import Reporter
from truestep.records import Origin, TrainSequence
from truestep.settings import Settings, parse_settings, table_of
from truestep.train.loop import StageSpec
from truestep.train.memory import first_memory, learn
from truestep.train.parallel import Ranks
from truestep.train.source import StepData

LIMIT = 1e-9  # relative, in float64: a different order of summation changes the update by about 1e-13
STEPS = 4
TOKENS = 4096
Change = Callable[[Sequence[TrainSequence]], list[TrainSequence]]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A checked relation. ``error`` is the largest relative difference between two updates or two runs."""

    name: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


def recipe(method: str, options: Mapping[str, object], *, samples: bool) -> dict[str, object]:
    """Return a recipe that trains about 10,000 parameters on solved sums, with this method. The reward is a
    coin flip, so that groups have mixed rewards."""
    stage: dict[str, object] = {
        "kind": "rl" if samples else "sft", "name": "check", "data": "sums", "steps": STEPS,
        "tokens_per_microbatch": TOKENS, "method": method, "method_options": options, "save_every": 1,
        "keep_checkpoints": STEPS, "optimizer": {"lr": 0.05, "kind": "sgd", "weight_decay": 0.0},
    }  # fmt: skip
    if samples:
        sampling = {"max_new_tokens": 64}
        stage |= {"prompts_per_step": 4, "samples_per_prompt": 6, "reward": "random", "sampling": sampling}
    else:
        stage |= {"sequences_per_step": 16}
    tiny = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    return {
        "name": "method-check", "model": {"path": "tiny", "tiny": tiny},
        "compute": {"dtype": "float64", "threads": 1},
        "data": {"sums": {"source": "procedural:addition", "limit": 24}}, "stages": [stage],
    }  # fmt: skip


def check_method(
    method: str, options: Mapping[str, object], *, base_dir: Path, folder: Path, reporter: Reporter
) -> Iterator[Relation]:
    """Check the relations one by one, in an empty ``folder``. Raises UserError if the method is invalid."""
    samples = find_method(method, options, base_dir).plan is not None
    place, _, name = method.rpartition(":")
    absolute = f"{(base_dir / place).resolve()}:{name}" if place.endswith(".py") else method
    settings = parse_settings(recipe(absolute, options, samples=samples), where=method)
    set_threads(1)
    yield from _updates(settings, base_dir, folder / "updates", reporter)
    yield _ranks(settings, base_dir, folder, reporter)
    yield _resumed(settings, base_dir, folder, reporter)


def _updates(settings: Settings, base_dir: Path, folder: Path, reporter: Reporter) -> Iterator[Relation]:
    """Compare every step's updates with those from a different packing, order or set of micro-batches."""
    prepared = prepare(settings, base_dir=base_dir)
    errors = {"micro-batches": 0.0, "shared prompts": 0.0, "order": 0.0, "empty micro-batch": 0.0}
    moved = 0.0
    with Grader() as grader, ExitStack() as stack:
        session = Session(prepared=prepared, folder=folder, grader=grader, ranks=Ranks(), reporter=reporter)
        spec = make_stage(session, 0, settings.model.path, Ledger(), 0, stack)
        policy, memory = spec.policy, first_memory(spec.updater.method)
        for step in range(STEPS):
            data = spec.source.take(step, memory)
            base = _update(spec, data, step)
            moved = max(moved, float(base.norm()))
            longest = max((len(s.token_ids) for part in data.minibatches for s in part), default=1)
            found = {
                "micro-batches": _update(spec, data, step, limit=longest),
                "order": _update(spec, _changed(data, lambda part: list(reversed(part))), step),
                "empty micro-batch": _update(spec, _changed(data, _with_untrained), step),
            }
            policy.packs = False
            found["shared prompts"] = _update(spec, data, step)
            policy.packs = True
            for name, other in found.items():
                errors[name] = max(errors[name], float((other - base).norm() / base.norm().clamp(min=1e-30)))
            done = spec.updater.update(data, step)
            memory = learn(spec.updater.method, data.memory, step, data.controls, done.seen)
            if spec.engine is not None:
                spec.engine.publish(dict(policy.model.named_parameters()), step + 1)
    if moved == 0:
        raise UserError(
            f"{spec.updater.method.name}: no step changes a parameter, so nothing can be compared"
        )
    yield from (Relation(name=name, error=error, limit=LIMIT) for name, error in errors.items())


def _update(spec: StageSpec, data: StepData, step: int, limit: int = TOKENS) -> Tensor:
    """Return how the step's updates change the parameters. The parameters are restored afterwards."""
    policy, updater = spec.policy, spec.updater
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    scorer = replace(updater.scorer, tokens_per_microbatch=limit)
    optimizers = optimizers_of(policy, spec.settings, updater.method)
    replace(updater, scorer=scorer, optimizers=optimizers).update(data, step)
    with torch.no_grad():
        moved = torch.cat([(p - start[name]).flatten() for name, p in policy.named_parameters()])
        for name, p in policy.named_parameters():
            p.copy_(start[name])
    return moved


def _changed(data: StepData, change: Change) -> StepData:
    buffered = None if data.buffered is None else change(data.buffered)
    return replace(data, minibatches=[change(part) for part in data.minibatches], buffered=buffered)


def _with_untrained(sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
    """Return the sequences and one more that has only context tokens."""
    if not sequences:
        return []
    first = sequences[0]
    none: tuple[float, ...] | None = None if first.behavior_logprobs is None else ()
    origin = (Origin.CONTEXT,) * len(first.origin)
    empty: dict[str, Any] = {"advantage": 0.0, "behavior_logprobs": none, "policy_version": -1}
    return [*sequences, replace(first, origin=origin, group=1 << 29, **empty)]


def difference(one: Path, other: Path) -> float:
    """Return the relative difference between the exported weights of two runs."""
    a, b = (load_file(run / "stages/01-check/export/model.safetensors") for run in (one, other))
    return max(float((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-30)) for n in a)


def run_in(
    settings: Settings, base_dir: Path, folder: Path, reporter: Reporter, resume: bool = False
) -> None:
    """Run a recipe of ``recipe`` in this process."""
    prepared = prepare(settings, base_dir=base_dir)
    open_run_folder(prepared, folder, resume=resume, rank=0)
    run(prepared, folder, ranks=Ranks(), reporter=reporter)


def _ranks(settings: Settings, base_dir: Path, folder: Path, reporter: Reporter) -> Relation:
    """Compare a run on two processes (gloo) with a run on one."""
    path = folder / "recipe.toml"
    rundir.write_atomic(path, rundir.to_toml(table_of(settings)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "truestep", "run", str(path), "--out", str(folder / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=folder)
    if done.returncode:
        tail = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        raise UserError("the run on two processes failed:\n" + "\n".join(tail))
    run_in(settings, base_dir, folder / "one", reporter)
    return Relation(name="two processes", error=difference(folder / "one", folder / "two"), limit=LIMIT)


def _resumed(settings: Settings, base_dir: Path, folder: Path, reporter: Reporter) -> Relation:
    """Resume the one-process run of ``_ranks`` from its second step, and compare the two results."""
    again = cut_back(folder / "one", folder / "again", STEPS // 2)
    run_in(settings, base_dir, again, reporter, resume=True)
    return Relation(name="resumed run", error=difference(folder / "one", again), limit=0.0)


def cut_back(run_dir: Path, target: Path, last: int) -> Path:
    """Copy a finished run of ``recipe``, as if it had been stopped after step ``last``."""
    shutil.copytree(run_dir, target)
    stage = target / "stages" / "01-check"
    (stage / "done.json").unlink()
    for step in range(last + 1, STEPS + 1):
        shutil.rmtree(stage / "checkpoints" / f"step_{step:08d}")
    return target
