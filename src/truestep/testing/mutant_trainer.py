"""A reference trainer with replaceable parts. It is correct unless a part is replaced.

One process simulates all ranks, each with a model and a recorder. A correct step is plain SGD on the mean
over all trained tokens of its window. Only the mutants import this module, because it needs torch.

Shapes: P parameters, K micro-batches of a rank, D ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from truestep.audit.environments.in_process import subject_module
from truestep.audit.measure.cases import build
from truestep.audit.measure.observations import Observation, load
from truestep.audit.subjects import CASES

LEARNING_RATE = 0.5
harness = subject_module("harness")


@dataclass(frozen=True)
class Window:
    """The micro-batches between two optimizer steps, and the tokens that the trainer counts as trained."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]  # rank, micro-batch, row number
    tokens: dict[int, float]  # row → tokens
    lengths: dict[int, int]
    asked: int  # the configured accumulation
    stepped: bool  # False: forward and backward only

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def num_micro(self) -> int:
        return len(self.rows[0])

    @property
    def places(self) -> list[tuple[int, int]]:
        """(rank, number) of every micro-batch."""
        return [(rank, k) for rank in range(self.num_ranks) for k in range(self.num_micro)]

    @property
    def all_rows(self) -> list[int]:
        return [row for rank in self.rows for micro in rank for row in micro]

    def of_micro(self, rank: int, k: int) -> float:
        return sum(self.tokens[row] for row in self.rows[rank][k])

    def of_rank(self, rank: int) -> float:
        return sum(self.of_micro(rank, k) for k in range(self.num_micro))

    @property
    def total(self) -> float:
        return sum(self.of_rank(rank) for rank in range(self.num_ranks))

    def slots(self, rank: int, k: int) -> int:
        """Return the number of rows times the padded width."""
        return len(self.rows[rank][k]) * max(self.lengths[row] for row in self.rows[rank][k])


@dataclass(kw_only=True)
class Replica:
    """The model and the optimizer state of one rank."""

    spec: Any
    model: nn.Module
    parameters: list[Tensor]
    theta: Tensor  # P: the optimizer's parameters, at least float32
    memory: dict[str, Tensor] = field(default_factory=dict)
    rate: float = 1.0  # share of the learning rate

    def publish(self) -> None:
        """Copy the optimizer's parameters into the model."""
        with torch.no_grad():
            parts = self.theta.split([p.numel() for p in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))

    def move(self, direction: Tensor) -> None:
        """Take one step against ``direction``, in the optimizer and in the model."""
        self.theta = self.theta - LEARNING_RATE * self.rate * direction
        self.publish()


# Windows of micro-batches, numbered over all epochs, and whether a step follows.
Plan = list[tuple[list[int], bool]]
Gradients = list[list[Tensor]]  # rank, micro-batch: P
Combine = Callable[[Gradients, int], list[Tensor]]
Limit = Callable[[Gradients, Combine, int, float], list[Tensor]]
# The model's input; line and first column of each row.
Layout = tuple[dict[str, Tensor], list[tuple[int, int]]]


def aligned(num: int, size: int, epochs: int) -> Plan:
    """Plan ``num`` micro-batches per epoch in windows of ``size``. An epoch's last window may be short."""
    starts = [(epoch * num, first) for epoch in range(epochs) for first in range(0, num, size)]
    return [(list(range(at + first, at + min(first + size, num))), True) for at, first in starts]


def pad_right(spec: Any, rows: Sequence[int]) -> Layout:
    ids = [spec.rows[row]["ids"] for row in rows]
    mask = harness.padded([[1] * len(line) for line in ids], 0)
    inputs = model_inputs(spec, harness.padded(ids, 0), attention_mask=mask)
    return inputs, [(line, 0) for line in range(len(rows))]


def model_inputs(spec: Any, lines: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model's forward pass. The ``plain`` model takes only tokens."""
    return {"input_ids": lines} if spec.options["arch"] == "plain" else {"input_ids": lines, **others}


def trained(spec: Any, row: int) -> list[float]:
    """Return each token's weight as a target, from the case's mask. The first token is not predicted."""
    return [0.0, *map(float, spec.rows[row]["trained"][1:])]


def token_mean(window: Window, rank: int, k: int, row: int) -> float:
    """Return the factor of a row's summed loss: 1 / N for N trained tokens in the window; 0 if N is 0."""
    return 1 / window.total if window.total else 0.0


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, reduction="none")


def add_all(gradients: Gradients, index: int) -> list[Tensor]:
    """Combine the micro-batches' gradients into one gradient for each rank's optimizer in step ``index``."""
    return everywhere(gradients, [g for rank in gradients for g in rank])


def everywhere(gradients: Gradients, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of ``parts``, once for every rank."""
    return [torch.stack([*parts, torch.zeros_like(gradients[0][0])]).sum(0)] * len(gradients)


def clip(gradient: Tensor, largest: float) -> Tensor:
    return gradient * min(1.0, largest / max(1e-12, float(gradient.norm())))


def clip_sum(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Clip the whole step's gradient once."""
    return [clip(g, largest) for g in combine(gradients, index)]


def sgd(replica: Replica, gradient: Tensor, index: int) -> None:
    if factor := replica.spec.case["momentum"]:
        gradient = gradient + factor * replica.memory.get("asked", torch.zeros_like(gradient))
        replica.memory["asked"] = gradient
    replica.move(gradient)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The parts of a step. A fault replaces one or two of them."""

    plan: Callable[[int, int, int], Plan] = aligned
    order: Callable[[list[list[list[int]]]], list[list[list[int]]]] = list  # rank, micro-batch, rows
    prepare: Callable[[Replica, int], None] = lambda replica, seed: None
    layout: Callable[[Any, Sequence[int]], Layout] = pad_right
    targets: Callable[[Any, int], list[float]] = trained
    shift: int = 1
    nll: Callable[[Tensor, Tensor], Tensor] = nll
    share: Callable[[Window, int, int, int], float] = token_mean
    combine: Combine = add_all
    limit: Limit = clip_sum
    # Step, K, D → ticks of the schedule before the step.
    ticks: Callable[[int, int, int], float] = lambda index, num_micro, num_ranks: index
    # What resuming after some steps does to a replica; returns the step where its schedule continues.
    resume: Callable[[Replica, int], int] = lambda replica, at: at
    update: Callable[[Replica, Tensor, int], None] = sgd


@dataclass(frozen=True)
class Mutant:
    """A trainer in one configuration. ``names`` are the codes of its fault, if it has one."""

    id: str
    fault: str
    description: str
    names: frozenset[str]
    trainer: Trainer
    accumulation: int = 4
    world_size: int = 1
    seed: int = 0
    arch: str = "plain"
    dtype: str = "float32"
    cases: tuple[str, ...] = CASES


def observe(mutant: Mutant, folder: Path) -> dict[str, Observation]:
    """Train the mutant on every case and return what the recorders saw, by the name of the case."""
    seen = {}
    for name in mutant.cases:
        case = build(name, world_size=mutant.world_size, accumulation=mutant.accumulation, seed=mutant.seed)
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        _train(mutant, place, case.to_json())
        seen[name] = load(place, case, learning_rate=LEARNING_RATE)
    return seen


def _train(mutant: Mutant, folder: Path, case: dict[str, Any]) -> None:
    trainer, replicas, recorders = mutant.trainer, [], []
    for rank in range(mutant.world_size):
        raw = {"options": {"arch": mutant.arch, "dtype": mutant.dtype}, "learning_rate": LEARNING_RATE}
        spec = harness.Spec(folder, case, raw)
        spec.rank, spec.world_size = rank, mutant.world_size
        model = harness.tiny_model(spec)
        parameters = harness.parameters_of(model)
        theta = harness.flat(parameters).to(torch.promote_types(spec.dtype, torch.float32))
        replica = Replica(spec=spec, model=model.to(spec.dtype), parameters=parameters, theta=theta)
        trainer.prepare(replica, mutant.seed)
        # In bfloat16 the parameters are the optimizer's float32 ones, not the model's rounded copies.
        held = (lambda replica=replica: replica.theta.double()) if mutant.dtype == "bfloat16" else None
        recorders.append(harness.Recorder(spec, model, held))
        replicas.append(replica)
        model.train()
    logged: dict[str, list[float]] = recorders[0].logged
    at, missed = case["resume_after"], 0
    for index, window in enumerate(_windows(trainer, [replica.spec for replica in replicas])):
        for recorder, replica in zip(recorders, replicas, strict=True):
            if at and index == at:
                recorder.resume(replica.model, recorder.snapshot)
                missed = at - trainer.resume(replica, at)
            ticks = trainer.ticks(index - missed, case["accumulation"], mutant.world_size)
            replica.rate = max(0.0, 1 - ticks / case["steps"]) if case["decay"] else 1.0
        loss, combined = _run(trainer, replicas, window, index)
        if not window.stepped:
            continue
        for replica, gradient in zip(replicas, combined, strict=True):
            trainer.update(replica, gradient, index)
        logged["loss"].append(loss)
        logged["learning_rate"].append(LEARNING_RATE)
    for recorder in recorders:
        recorder.finish()


def _windows(trainer: Trainer, specs: list[Any]) -> list[Window]:
    batches = trainer.order([spec.batches() for spec in specs])
    spec, num = specs[0], len(batches[0])
    tokens = {row: sum(trainer.targets(spec, row)) for row in range(len(spec.rows))}
    lengths = {row: len(spec.rows[row]["ids"]) for row in range(len(spec.rows))}
    windows = []
    for chosen, stepped in trainer.plan(num, spec.accumulation, spec.epochs):
        rows = tuple(tuple(tuple(rank[i % num]) for i in chosen) for rank in batches)
        windows.append(Window(rows, tokens, lengths, spec.accumulation, stepped))
    return windows


def _run(trainer: Trainer, replicas: list[Replica], window: Window, index: int) -> tuple[float, list[Tensor]]:
    """Run a window forward and backward; return its loss and the gradient for each rank's optimizer."""
    loss, gradients = 0.0, []
    for rank, replica in enumerate(replicas):
        pairs = [_backward(trainer, replica, window, rank, k) for k in range(window.num_micro)]
        loss += sum(value for value, _ in pairs)
        gradients.append([gradient for _, gradient in pairs])
    if largest := replicas[0].spec.case["max_grad_norm"]:
        return loss, trainer.limit(gradients, trainer.combine, index, largest)
    return loss, trainer.combine(gradients, index)


def _backward(trainer: Trainer, replica: Replica, window: Window, rank: int, k: int) -> tuple[float, Tensor]:
    """Return a micro-batch's loss, and its gradient in the optimizer's precision."""
    rows = window.rows[rank][k]
    inputs, places = trainer.layout(replica.spec, rows)
    logits, ids = harness.logits_of(replica.model(**inputs)), inputs["input_ids"]
    losses = []
    for row, (line, start) in zip(rows, places, strict=True):
        weights = trainer.targets(replica.spec, row)[: ids.shape[1] - start]
        where = torch.arange(max(1, trainer.shift), len(weights)) + start
        values = trainer.nll(logits[line, where - trainer.shift].to(replica.theta.dtype), ids[line, where])
        factor = trainer.share(window, rank, k, row)
        mask = torch.tensor(weights[max(1, trainer.shift) :]).to(values.dtype)
        losses.append((values * mask * factor).sum())
    loss = torch.stack(losses).sum()
    parts = torch.autograd.grad(loss, replica.parameters)
    return float(loss.detach()), torch.cat([part.reshape(-1) for part in parts]).to(replica.theta.dtype)
