"""A stage's state on disk: checkpoints, the best dev checkpoint, and the batch of a failed step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truestep.checkpoint.layout import Checkpoint
from truestep.checkpoint.manifest import list_checkpoints
from truestep.checkpoint.store import load_latest, save_checkpoint
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.records import RecordError
from truestep.train.layout import computed, needed_rows, saved_weights, share_of
from truestep.train.memory import Memory, first_memory
from truestep.train.parallel import Ranks, is_sharded, local
from truestep.train.policy import Policy
from truestep.train.source import RolloutSource
from truestep.train.step import NonFiniteError
from truestep.train.validation import is_better
from truestep.train.waiting import Sampled, Whole, gathered

if TYPE_CHECKING:
    from truestep.train.loop import StageSpec


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state of a stage after ``step`` steps, without weights and optimizer. ``ledger`` is the run's work
    on this rank, ``best`` the step and value of the best checkpoint, ``stall`` what early stopping counts, ``unlogged`` what
    must be logged, and ``waiting`` this rank's groups of the next step if they are sampled already."""

    step: int = 0
    memory: Memory = field(default_factory=Memory)
    ledger: Ledger = field(default_factory=Ledger)
    best: Mapping[str, float] = field(default_factory=dict)
    stall: Mapping[str, float] = field(default_factory=dict)
    unlogged: Mapping[str, Any] | None = None
    waiting: Sampled | None = None


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """A checkpoint from before a change of settings. ``keeps_best`` is whether its best value still counts, which it
    does not if something else is measured now."""

    step: int
    keeps_best: bool


def summed(ledger: Ledger, ranks: Ranks) -> Ledger:
    """Sum the work over all ranks (a collective)."""
    total = ranks.sum([float(count) for count in vars(ledger).values()])
    return Ledger(**{kind: int(count) for kind, count in zip(vars(ledger), total, strict=True)})


def save(spec: StageSpec, state: TrainState) -> None:
    """Save everything that the stage needs to continue from here."""
    tensors = {name: o.state_tensors() for name, o in spec.updater.optimizers.items()}
    tensors["memory"] = state.memory.tensors()
    _save(spec, state, "checkpoints", tensors, spec.settings.keep_checkpoints)


def keep_best(spec: StageSpec, state: TrainState, key: str, value: float) -> TrainState:
    """Save the weights if ``value`` (of the metric ``key``) is the best so far, because the stage exports its best."""
    name = key.partition("/")[2]  # score or loss
    if name in state.best and not is_better(key, value, state.best[name]):
        return state
    best = {"step": state.step, name: value}
    _save(spec, replace(state, best=best, waiting=None), "best", {}, 1)
    return replace(state, best=best)


def _save(
    spec: StageSpec, state: TrainState, folder: str, tensors: Mapping[str, Mapping[str, Tensor]], keep: int
) -> None:
    waiting = None if state.waiting is None else gathered(state.waiting, spec.ranks)
    if waiting is not None:
        tensors = {**tensors, "waiting": waiting.tensors()}
    own = {name: computed(spec.policy, t) for name, t in spec.policy.named_parameters()}
    groups = {"parameters": {**saved_weights(spec.policy), **own}, **tensors}
    parts = {group: {n: local(t.detach()) for n, t in found.items()} for group, found in groups.items()}
    shares = {
        group: {name: share for name, t in found.items() if (share := share_of(t)) is not None}
        for group, found in groups.items()
    }
    header = {
        "step": state.step,
        "memory": state.memory.state(),
        "identity": spec.identity,
        "ledger": asdict(summed(state.ledger, spec.ranks)),
        "best": dict(state.best),
        "stall": dict(state.stall),
        "unlogged": state.unlogged,
        "threads": torch.get_num_threads(),
        "layout": _layout(spec),
        "logs": spec.logs.seal() if spec.ranks.rank == 0 else {},
    }
    if waiting is not None:
        header["waiting"] = waiting.state()
    ranks = spec.ranks
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    checkpoint = Checkpoint(step=state.step, tensors=parts, state=header, shares=shares)
    save_checkpoint(spec.folder / folder, checkpoint, keep=keep, **place, gather=ranks.gather)


def _layout(spec: StageSpec) -> str:
    """Return the number of ranks, and how the model is on them, in words."""
    ranks = spec.ranks.world_size
    split = "shards of the model" if is_sharded(spec.policy) else "copies of the model"
    return f"{ranks} ranks with {split}" if ranks > 1 else "1 rank"


def restore(spec: StageSpec) -> TrainState:
    """Load the newest valid checkpoint and return its state, or the initial state if there is none. Log files
    are cut to what they contained then, so that nothing is written twice. Raises UserError if they have changed.

    The number of ranks may differ from that of the saved run. Weights, masters and moments are read by rows; the
    memory is the same on all ranks; data and random numbers depend only on the step and the seed; and the work
    of all ranks is continued by rank 0. Held by: tests/contract/test_elastic.py"""
    folder = spec.folder / "checkpoints"
    state = TrainState(memory=first_memory(spec.updater.method), ledger=spec.ledger)
    if (found := _newest(spec, folder)) is not None:
        header = found.state
        earlier = spec.earlier.get(header["identity"])
        if header["identity"] != spec.identity and (earlier is None or earlier.step != found.step):
            raise UserError(
                f"{folder}: the newest intact checkpoint (step {found.step}) has different settings or data; restore a newer "
                "one from a backup, pass a different --out, or delete the folder"
            )
        if "logs" not in header:
            raise UserError(
                f"{folder}: the checkpoints are from an older version of truestep; use that version"
            )
        if (threads := torch.get_num_threads()) != header["threads"]:
            spec.warn(
                f"the checkpoint was made with {header['threads']} threads, but this run has {threads}; the resumed "
                "run will not be bit-identical to an uninterrupted one"
            )
        if (layout := _layout(spec)) != header.get("layout", layout):
            spec.warn(
                f"the checkpoint was saved by {header['layout']}, and this run has {layout}; the resumed run will "
                "equal an uninterrupted one only up to rounding"
            )
        load_parameters(spec.policy, found)
        for name, optimizer in spec.updater.optimizers.items():
            optimizer.load_state_tensors(found.tensors[name])
        state = TrainState(
            step=found.step,
            memory=Memory.load(header["memory"], found.tensors["memory"]),
            ledger=Ledger(**header["ledger"]) if spec.ranks.rank == 0 else Ledger(),
            best=dict(header["best"]),
            stall=dict(header.get("stall", {})),
            unlogged=header.get("unlogged"),
        )
        if earlier is not None and not earlier.keeps_best:
            state = replace(state, best={}, stall={})
        if "waiting" in header and isinstance(spec.source, RolloutSource):
            waiting = Whole.load(header["waiting"], found.tensors["waiting"])
            state = replace(state, waiting=spec.source.restored(waiting))
    if spec.ranks.rank == 0:
        best = list_checkpoints(spec.folder / "best")
        if best and best[-1].name != f"step_{int(state.best.get('step', -1)):08d}":
            shutil.rmtree(spec.folder / "best")  # made by steps that are about to be redone
        spec.logs.restore({} if found is None else found.state["logs"])
    return state


def _newest(spec: StageSpec, folder: Path) -> Checkpoint | None:
    ranks, rows = spec.ranks, needed_rows(spec.policy)
    return load_latest(folder, rank=ranks.rank, gather=ranks.gather, rows_of=rows, warn=spec.warn)


def load_best(spec: StageSpec, state: TrainState) -> None:
    """Load the weights of the best dev checkpoint into the policy."""
    best = _newest(spec, spec.folder / "best")
    if best is None or best.step != state.best["step"]:
        raise RecordError(f"{spec.folder / 'best'} does not contain step {state.best['step']}, the best one")
    load_parameters(spec.policy, best)


@torch.no_grad()
def load_parameters(policy: Policy, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's parameters and buffers into the policy. Raises UserError if the models differ."""
    saved, own = checkpoint.tensors["parameters"], saved_weights(policy)
    if set(saved) != set(own):
        different = sorted(set(saved) ^ set(own))[:2]
        raise UserError(f"the checkpoint contains a different model's parameters ({different} ...)")
    for name, parameter in own.items():
        local(parameter).copy_(saved[name])


def rescued(spec: StageSpec, error: NonFiniteError) -> NonFiniteError:
    """Save the error's batches, so that the cause can be found. Return the error with the file's path."""
    from safetensors.torch import save_file

    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, batch in enumerate(error.batches)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        return error
    spec.folder.mkdir(parents=True, exist_ok=True)
    path = spec.folder / f"nonfinite-rank-{spec.ranks.rank}.safetensors"
    save_file(tensors, path)
    return NonFiniteError(f"{error}; the batch is saved in {path}", error.batches)
