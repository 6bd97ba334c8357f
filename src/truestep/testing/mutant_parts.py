"""Faulty parts that ``mutants`` injects into the reference trainer. This module needs torch. Shapes: as in
``mutants``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from truestep.seeding import Purpose, integer
from truestep.testing import mutant_trainer as trainer
from truestep.testing.mutant_trainer import Combine, Gradients, Layout, Limit, Plan, Replica, Window

Share = Callable[[Window, int, int, int], float]


def over(count: Callable[[Window, int, int, int], float]) -> Share:
    """Divide a row's loss by a wrong number of tokens. A number below 1 counts as 1."""
    return lambda window, rank, k, row: 1 / max(1.0, count(window, rank, k, row))


def scaled(factor: Callable[[Window], float]) -> Share:
    return lambda window, rank, k, row: factor(window) / window.total


micro_mean = over(lambda w, r, k, row: w.num_ranks * w.num_micro * max(1.0, w.of_micro(r, k)))
sum_of_means = over(lambda w, r, k, row: w.num_ranks * w.of_micro(r, k))
own_mean = over(lambda w, r, k, row: w.of_rank(r))


def one_row(factor: float, drawn: Any) -> Share:
    """Multiply the loss of one row of every step by ``factor``."""
    return lambda w, rank, k, row: (factor if row % drawn.stride == drawn.index else 1.0) / w.total


def kept(which: Callable[[int, int, int], bool]) -> Combine:
    """Count only the micro-batches for which ``which(rank, k, K)`` is true."""

    def combine(gradients: Gradients, index: int) -> list[Tensor]:
        parts = [g for r, rank in enumerate(gradients) for k, g in enumerate(rank) if which(r, k, len(rank))]
        return trainer.everywhere(gradients, parts)

    return combine


offload = kept(lambda rank, k, num: k in (0, num - 1))


def running_average(gradients: Gradients, index: int) -> list[Tensor]:
    buffers = [reduce(lambda buffer, g: (buffer + g) / 2, rank) for rank in gradients]
    return trainer.everywhere(gradients, buffers)


def unsynced(reduced: Callable[[int, int], bool]) -> Combine:
    """Use each rank's own gradients for the micro-batches for which ``reduced(k, K)`` is false."""

    def combine(gradients: Gradients, index: int) -> list[Tensor]:
        shared = [g for rank in gradients for k, g in enumerate(rank) if reduced(k, len(rank))]
        base = trainer.everywhere(gradients, shared)
        own = [[g for k, g in enumerate(rank) if not reduced(k, len(rank))] for rank in gradients]
        return [torch.stack([b, *parts]).sum(0) for b, parts in zip(base, own, strict=True)]

    return combine


local = unsynced(lambda k, num: False)


def clip_unasked(limit: Limit, largest: float) -> Combine:
    return lambda gradients, index: limit(gradients, trainer.add_all, index, largest)


def skip_if_empty(gradients: Gradients, index: int) -> list[Tensor]:
    parts = [g for rank in gradients for g in rank]
    return trainer.everywhere(gradients, parts if all(bool(g.any()) for g in parts) else [])


def in_bfloat16(gradients: Gradients, index: int) -> list[Tensor]:
    nothing = torch.zeros_like(gradients[0][0], dtype=torch.bfloat16)
    total = sum((g.bfloat16() for rank in gradients for g in rank), nothing)
    return trainer.everywhere(gradients, [total.to(gradients[0][0].dtype)])


def noisy(seed: int) -> Combine:
    def combine(gradients: Gradients, index: int) -> list[Tensor]:
        right = trainer.add_all(gradients, index)
        random = torch.Generator().manual_seed(integer(seed, Purpose.PROBE, index, "noise"))
        noise = torch.randn(right[0].shape, generator=random)
        return [g + 0.05 * g.norm() / noise.norm() * noise for g in right]

    return combine


Update = Callable[[Replica, Tensor, int], None]


def momentum(factor: float, *, nesterov: bool = False) -> Update:
    def update(replica: Replica, gradient: Tensor, index: int) -> None:
        buffer = gradient + factor * replica.memory.get("momentum", torch.zeros_like(gradient))
        replica.memory["momentum"] = buffer
        replica.move(gradient + factor * buffer if nesterov else buffer)

    return update


def decay(strength: float, *, matrices: bool = False) -> Update:
    def update(replica: Replica, gradient: Tensor, index: int) -> None:
        parts = [torch.full((p.numel(),), float(p.dim() > 1 or not matrices)) for p in replica.parameters]
        replica.move(gradient + strength * torch.cat(parts) * replica.theta)

    return update


def moved(change: Callable[[Tensor, int], Tensor]) -> Update:
    """Step along a changed gradient; ``change`` also gets the step's number."""
    return lambda replica, gradient, index: replica.move(change(gradient, index))


def stored_in_bfloat16(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.theta = (replica.theta - trainer.LEARNING_RATE * gradient).bfloat16().float()
    replica.publish()


def small_updates_lost(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.move(gradient * (trainer.LEARNING_RATE * gradient.abs() >= 2**-9 * replica.theta.abs()))


def never_published(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.theta = replica.theta - trainer.LEARNING_RATE * gradient


def from_the_step_before(replica: Replica, gradient: Tensor, index: int) -> None:
    stale = replica.memory.get("stale", replica.theta)
    replica.memory["stale"], replica.theta = replica.theta, stale
    replica.move(gradient)


def frozen(number: int) -> Update:
    """Do not move one tensor, as if the optimizer had a different tensor from the one that the model uses."""

    def update(replica: Replica, gradient: Tensor, index: int) -> None:
        lost = number % len(replica.parameters)
        held = [torch.full((p.numel(),), float(i != lost)) for i, p in enumerate(replica.parameters)]
        replica.move(gradient * torch.cat(held))

    return update


def tail_carried(num: int, size: int, epochs: int) -> Plan:
    """Keep the gradients of the rest of an epoch in the buffers until the next epoch's first step."""
    plan: Plan = []
    carried: list[int] = []
    for window, _ in trainer.aligned(num, size, epochs):
        carried = carried + window
        if len(window) == size:
            plan.append((carried, True))
            carried = []
    return [*plan, (carried, False)] if carried else plan


def counter_off_by_one(num: int, size: int, epochs: int) -> Plan:
    """Take a step after the first micro-batch, then after every ``size`` more. The last ones get no step."""
    ends = [*range(1, num * epochs + 1, size), num * epochs]
    places = list(range(num * epochs))
    windows = [places[first:last] for first, last in zip([0, *ends], ends, strict=False) if last > first]
    return [(window, window[-1] % size == 0) for window in windows]


Targets = Callable[[Any, int], list[float]]


def prompt_too(weight: float) -> Targets:
    return lambda spec, row: [0.0] + [float(on) or weight for on in spec.rows[row]["trained"][1:]]


def beside(shift: int, of: Callable[[float, float], float]) -> Targets:
    """Change each token's weight, depending on that of the previous or next token (``shift`` -1 or 1)."""

    def targets(spec: Any, row: int) -> list[float]:
        mask = trainer.trained(spec, row)
        neighbours = [*mask[1:], 0.0] if shift > 0 else [0.0, *mask[:-1]]
        return [0.0, *map(of, mask[1:], neighbours[1:])]

    return targets


one_token_early = beside(1, max)  # the last token of every prompt is trained as well
no_stop = beside(1, mul)  # the last token of every answer is masked
no_start = beside(-1, mul)  # the first token of every answer is masked
early = beside(1, lambda own, following: following)


def late(spec: Any, row: int) -> list[float]:
    """Train each token after a trained one, even the padding after the row (see ``followed``)."""
    return [0.0, *trainer.trained(spec, row)]


def followed(spec: Any, rows: Sequence[int]) -> Layout:
    """Pad every row on the right with at least one token."""
    inputs, places = trainer.pad_right(spec, rows)
    return {k: pad(v, (0, 1)) for k, v in inputs.items()}, places


def packed(*, restart: bool, isolated: bool) -> Callable[[Any, Sequence[int]], Layout]:
    """Put all rows of a micro-batch in one line. Unless ``isolated``, each row sees the rows before it."""

    def layout(spec: Any, rows: Sequence[int]) -> Layout:
        lengths = [len(spec.rows[row]["ids"]) for row in rows]
        starts = [sum(lengths[:i]) for i in range(len(rows))]
        line = torch.tensor([[t for row in rows for t in spec.rows[row]["ids"]]])
        places = torch.cat([torch.arange(n) for n in lengths]) if restart else torch.arange(sum(lengths))
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
        seen = (owner[:, None] == owner) if isolated else torch.ones(len(owner), len(owner), dtype=torch.bool)
        hidden = torch.where(seen.tril(), 0.0, torch.finfo(spec.dtype).min).to(spec.dtype)[None, None]
        inputs = trainer.model_inputs(spec, line, position_ids=places[None], attention_mask=hidden)
        return inputs, [(0, start) for start in starts]

    return layout


def pad_left(*, masked: bool) -> Callable[[Any, Sequence[int]], Layout]:
    """Pad on the left and count padding in the positions. Unless ``masked``, it is also attended to."""

    def layout(spec: Any, rows: Sequence[int]) -> Layout:
        right, _ = trainer.pad_right(spec, rows)
        shifts = [right["input_ids"].shape[1] - len(spec.rows[row]["ids"]) for row in rows]
        names = right if masked else ["input_ids"]
        pairs = {k: zip(right[k], shifts, strict=True) for k in names}
        inputs = {k: torch.stack([line.roll(n) for line, n in pairs[k]]) for k in names}
        return inputs, list(enumerate(shifts))

    return layout


def begun_twice(spec: Any, rows: Sequence[int]) -> Layout:
    """Put an extra begin token before every row."""
    inputs, places = trainer.pad_right(spec, rows)
    front = torch.ones(len(rows), 1, dtype=torch.int64)
    moved_places = [(line, start + 1) for line, start in places]
    return {k: torch.cat([front, v], 1) for k, v in inputs.items()}, moved_places


def dropping(share: float) -> Callable[[Replica, int], None]:
    """Apply dropout after the embedding, only in training."""

    def prepare(replica: Replica, seed: int) -> None:
        torch.manual_seed(integer(seed, Purpose.PROBE, replica.spec.rank, "dropout"))

        def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
            return dropout(out, share, training=module.training)

        replica.model.get_submodule("embed").register_forward_hook(hook)

    return prepare


def shifted_start(scale: float, *, ranks: bool, published: bool) -> Callable[[Replica, int], None]:
    """Start the optimizer from different values, and also the model if ``published`` is True. The values
    differ between ranks if ``ranks`` is True."""

    def prepare(replica: Replica, seed: int) -> None:
        key = integer(seed, Purpose.PROBE, replica.spec.rank * ranks, "start")
        random = torch.Generator().manual_seed(key)
        replica.theta = replica.theta + scale * torch.randn(replica.theta.shape, generator=random)
        if published:
            replica.publish()

    return prepare


def start_in_bfloat16(replica: Replica, seed: int) -> None:
    replica.theta = replica.theta.bfloat16().float()
    replica.publish()


def clip_to(factor: float) -> Limit:
    """Clip the sum to a norm other than the configured one."""
    return lambda parts, combine, index, largest: trainer.clip_sum(parts, combine, index, factor * largest)


def clip_micro(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Clip every micro-batch by its own norm."""
    return combine([[trainer.clip(g, largest) for g in rank] for rank in gradients], index)


def clip_running(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Clip the sum of the gradients so far after every backward pass."""
    nothing = torch.zeros_like(gradients[0][0])
    sums = [reduce(lambda buffer, g: trainer.clip(buffer + g, largest), rank, nothing) for rank in gradients]
    return trainer.everywhere(gradients, sums)


def clip_rank(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Clip every rank by its own norm, before the ranks are added up."""
    clipped = [trainer.clip(torch.stack(rank).sum(0), largest) for rank in gradients]
    return trainer.everywhere(gradients, clipped)


def clip_too_long(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Clip before the division by the accumulation steps."""
    found, count = combine(gradients, index), len(gradients[0])
    return [trainer.clip(g * count, largest) / count for g in found]


def momentum_lost(replica: Replica, at: int) -> int:
    replica.memory.clear()
    return at


def both_lost(replica: Replica, at: int) -> int:
    replica.memory.clear()
    return 0


def parameters_lost(replica: Replica, at: int) -> int:
    """Return to the initial parameters, but keep the saved momentum."""
    first = trainer.harness.parameters_of(trainer.harness.tiny_model(replica.spec))
    replica.theta = trainer.harness.flat(first).to(replica.theta.dtype)
    replica.publish()
    return at


def from_the_first_row(num: int, size: int, epochs: int) -> Plan:
    """Start again from the first row of the data after resuming."""
    windows = trainer.aligned(num, size, epochs)
    half = len(windows) // 2
    return windows[:half] + windows[: len(windows) - half]
