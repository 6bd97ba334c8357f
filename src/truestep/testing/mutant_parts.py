"""Wrong parts for the reference trainer; ``mutants`` puts them in. One file: its only importer needs all.

Needs torch. Shapes: P parameters, M predicted tokens, V vocabulary, K micro-batches of a rank, D ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from truestep.seeding import Purpose, integer
from truestep.testing.mutant_trainer import (
    LEARNING_RATE,
    Combine,
    Gradients,
    Layout,
    Limit,
    Plan,
    Replica,
    Window,
    add_all,
    aligned,
    clip,
    everywhere,
    harness,
    model_inputs,
    nll,
    pad_right,
    trained,
)

Share = Callable[[Window, int, int, int], float]


def divided_by(count: Callable[[Window, int, int, int], float]) -> Share:
    """A row's loss over a wrong number of tokens; one over nothing is taken as over one."""
    return lambda window, rank, k, row: 1 / max(1.0, count(window, rank, k, row))


def scaled(factor: Callable[[Window], float]) -> Share:
    return lambda window, rank, k, row: factor(window) / window.total


micro_mean = divided_by(lambda w, r, k, row: w.num_ranks * w.num_micro * max(1.0, w.of_micro(r, k)))
sum_of_means = divided_by(lambda w, r, k, row: w.num_ranks * w.of_micro(r, k))
micro_step_mean = divided_by(
    lambda w, r, k, row: w.num_micro * sum(w.of_micro(i, k) for i in range(w.num_ranks))
)
rank_mean = divided_by(lambda w, r, k, row: w.num_ranks * w.of_rank(r))
own_mean = divided_by(lambda w, r, k, row: w.of_rank(r))
sequence_mean = divided_by(
    lambda w, r, k, row: sum(len(m) for d in w.rows for m in d) * max(1.0, w.tokens[row])
)
slot_mean = divided_by(lambda w, r, k, row: w.num_ranks * w.num_micro * w.slots(r, k))
slot_sum = divided_by(lambda w, r, k, row: w.num_ranks * w.slots(r, k))
all_slots = divided_by(
    lambda w, r, k, row: sum(w.slots(i, j) for i, d in enumerate(w.rows) for j in range(len(d)))
)
empty_row_is_one = divided_by(
    lambda w, r, k, row: sum(max(1.0, w.tokens[i]) for d in w.rows for m in d for i in m)
)


def empty_is_one(window: Window, rank: int, k: int, row: int) -> float:
    micro = [window.of_micro(i, j) for i in range(window.num_ranks) for j in range(window.num_micro)]
    return 1 / sum(max(1.0, n) for n in micro)


def empty_divides_by_zero(window: Window, rank: int, k: int, row: int) -> float:
    return 1 / window.total if window.of_micro(rank, k) else math.nan


def one_row(factor: float, place: int, stride: int) -> Share:
    """One row of every ``stride`` has its loss multiplied."""
    return lambda window, rank, k, row: (factor if row % stride == place else 1.0) / window.total


def kept(which: Callable[[int, int, int], bool]) -> Combine:
    """Only the micro-batches for which ``which(rank, k, K)``."""

    def combine(gradients: Gradients, index: int) -> list[Tensor]:
        parts = [g for r, rank in enumerate(gradients) for k, g in enumerate(rank) if which(r, k, len(rank))]
        return everywhere(gradients, parts)

    return combine


offload = kept(lambda rank, k, num: k in (0, num - 1))
overwritten = kept(lambda rank, k, num: k == num - 1)


def running_average(gradients: Gradients, index: int) -> list[Tensor]:
    buffers = []
    for rank in gradients:
        buffer = rank[0]
        for gradient in rank[1:]:
            buffer = (buffer + gradient) / 2
        buffers.append(buffer)
    return everywhere(gradients, buffers)


def unsynced(reduced: Callable[[int, int], bool]) -> Combine:
    """Each rank steps on its own gradient of the micro-batches that are not ``reduced(k, K)``."""

    def combine(gradients: Gradients, index: int) -> list[Tensor]:
        shared = [g for rank in gradients for k, g in enumerate(rank) if reduced(k, len(rank))]
        base = everywhere(gradients, shared)
        own = [[g for k, g in enumerate(rank) if not reduced(k, len(rank))] for rank in gradients]
        return [torch.stack([b, *parts]).sum(0) for b, parts in zip(base, own, strict=True)]

    return combine


local = unsynced(lambda k, num: False)


def late_sync(first: int) -> Combine:
    """Ranks step alone from step ``first`` on."""
    return lambda gradients, index: (local if index >= first else add_all)(gradients, index)


def clip_unasked(limit: Limit, largest: float) -> Combine:
    return lambda gradients, index: limit(gradients, add_all, index, largest)


def skip_if_empty(gradients: Gradients, index: int) -> list[Tensor]:
    if all(bool(g.any()) for rank in gradients for g in rank):
        return add_all(gradients, index)
    return everywhere(gradients, [])


def in_bfloat16(gradients: Gradients, index: int) -> list[Tensor]:
    buffer = torch.zeros_like(gradients[0][0], dtype=torch.bfloat16)
    for rank in gradients:
        for gradient in rank:
            buffer += gradient.bfloat16()
    return everywhere(gradients, [buffer.to(gradients[0][0].dtype)])


def noisy(seed: int) -> Combine:
    def combine(gradients: Gradients, index: int) -> list[Tensor]:
        right = add_all(gradients, index)
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
        where = torch.cat(
            [torch.full((p.numel(),), float(p.dim() > 1 or not matrices)) for p in replica.parameters]
        )
        replica.move(gradient + strength * where * replica.theta)

    return update


def clip_whole(largest: float) -> Update:
    return lambda replica, gradient, index: replica.move(clip(gradient, largest))


def clip_entries(largest: float) -> Update:
    return lambda replica, gradient, index: replica.move(gradient.clamp(-largest, largest))


def warm_up(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.move(gradient * min(1.0, (index + 1) / 3))


def stored_in_bfloat16(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.theta = (replica.theta - LEARNING_RATE * gradient).bfloat16().float()
    replica.publish()


def small_updates_lost(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.move(gradient * (LEARNING_RATE * gradient.abs() >= 2**-9 * replica.theta.abs()))


def never_published(replica: Replica, gradient: Tensor, index: int) -> None:
    replica.theta = replica.theta - LEARNING_RATE * gradient


def from_the_step_before(replica: Replica, gradient: Tensor, index: int) -> None:
    stale = replica.memory.get("stale", replica.theta)
    replica.memory["stale"], replica.theta = replica.theta, stale
    replica.move(gradient)


def frozen(number: int) -> Update:
    """The optimizer was given another tensor than the one that the model uses."""

    def update(replica: Replica, gradient: Tensor, index: int) -> None:
        lost = number % len(replica.parameters)
        held = [torch.full((p.numel(),), float(i != lost)) for i, p in enumerate(replica.parameters)]
        replica.move(gradient * torch.cat(held))

    return update


def whole_only(num: int, size: int, epochs: int) -> Plan:
    """What is left of an epoch is never loaded."""
    return [(window, True) for window, _ in aligned(num, size, epochs) if len(window) == size]


def tail_not_stepped(num: int, size: int, epochs: int) -> Plan:
    """What is left of an epoch is run, and its gradients thrown away."""
    return [(window, len(window) == size) for window, _ in aligned(num, size, epochs)]


def across_epochs(num: int, size: int, epochs: int) -> Plan:
    return aligned(num * epochs, size, 1)


def tail_carried(num: int, size: int, epochs: int) -> Plan:
    """What is left of an epoch waits in the buffers for the next epoch's first step."""
    plan: Plan = []
    carried: list[int] = []
    for window, _ in aligned(num, size, epochs):
        carried = carried + window
        if len(window) == size:
            plan.append((carried, True))
            carried = []
    return [*plan, (carried, False)] if carried else plan


def every(size_of: Callable[[int], int]) -> Callable[[int, int, int], Plan]:
    """Windows of another size than the one that was asked for."""
    return lambda num, size, epochs: aligned(num, size_of(size), epochs)


def counter_off_by_one(num: int, size: int, epochs: int) -> Plan:
    """A step after the first micro-batch, then after every ``size``; the end is run without a step."""
    ends = [*range(1, num * epochs + 1, size), num * epochs]
    places = list(range(num * epochs))
    windows = [places[first:last] for first, last in zip([0, *ends], ends, strict=False) if last > first]
    return [(window, window[-1] % size == 0) for window in windows]


Order = Callable[[list[list[list[int]]]], list[list[list[int]]]]


def same_on_every_rank(batches: list[list[list[int]]]) -> list[list[list[int]]]:
    return [batches[0]] * len(batches)


def start_repeated(batches: list[list[list[int]]]) -> list[list[list[int]]]:
    """A sampler that fills up the end of an epoch with rows from its start."""
    return [[*rank[:-1], rank[0]] for rank in batches]


Targets = Callable[[Any, int], list[float]]


def prompt_too(weight: float = 1.0) -> Targets:
    return lambda spec, row: [0.0] + [float(on) or weight for on in spec.rows[row]["trained"][1:]]


def one_token_early(spec: Any, row: int) -> list[float]:
    """The last token of every prompt as well."""
    mask = trained(spec, row)
    return [0.0] + [max(now, after) for now, after in zip(mask[1:], [*mask[2:], 0.0], strict=True)]


def no_stop(spec: Any, row: int) -> list[float]:
    """The last token of every answer is masked."""
    mask = trained(spec, row)
    return [now * after for now, after in zip(mask, [*mask[1:], 0.0], strict=True)]


def no_start(spec: Any, row: int) -> list[float]:
    """The first token of every answer is masked."""
    mask = trained(spec, row)
    return [now * before for now, before in zip(mask, [0.0, *mask[:-1]], strict=True)]


def mask_lost(place: int, stride: int) -> Targets:
    """One row of every ``stride`` has a mask of zeros."""
    return lambda spec, row: [on * (row % stride != place) for on in trained(spec, row)]


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


def with_z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nll(logits, targets) + 0.01 * logits.logsumexp(-1) ** 2


def at_temperature(logits: Tensor, targets: Tensor) -> Tensor:
    return nll(logits / 0.7, targets)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Weighted by the token's own probability."""
    losses = nll(logits, targets)
    return losses * torch.exp(-losses.detach())


def packed(*, restart: bool, isolated: bool) -> Callable[[Any, Sequence[int]], Layout]:
    """All rows of a micro-batch in one line; not isolated: each sees those before it."""

    def layout(spec: Any, rows: Sequence[int]) -> Layout:
        lengths = [len(spec.rows[row]["ids"]) for row in rows]
        starts = [sum(lengths[:i]) for i in range(len(rows))]
        line = torch.tensor([[t for row in rows for t in spec.rows[row]["ids"]]])
        places = torch.cat([torch.arange(n) for n in lengths]) if restart else torch.arange(sum(lengths))
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
        seen = (owner[:, None] == owner) if isolated else torch.ones(len(owner), len(owner), dtype=torch.bool)
        hidden = torch.where(seen.tril(), 0.0, torch.finfo(spec.dtype).min).to(spec.dtype)[None, None]
        inputs = model_inputs(spec, line, position_ids=places[None], attention_mask=hidden)
        return inputs, [(0, start) for start in starts]

    return layout


def pad_left(*, masked: bool) -> Callable[[Any, Sequence[int]], Layout]:
    """Padding first, and positions that count it; not ``masked``: it is attended to as well."""

    def layout(spec: Any, rows: Sequence[int]) -> Layout:
        right, _ = pad_right(spec, rows)
        shifts = [right["input_ids"].shape[1] - len(spec.rows[row]["ids"]) for row in rows]
        inputs = {
            k: torch.stack([line.roll(n) for line, n in zip(v, shifts, strict=True)])
            for k, v in right.items()
        }
        if not masked:
            inputs = {"input_ids": inputs["input_ids"]}
        return inputs, list(enumerate(shifts))

    return layout


def begun_twice(spec: Any, rows: Sequence[int]) -> Layout:
    """One more begin token before every row."""
    inputs, places = pad_right(spec, rows)
    front = torch.ones(len(rows), 1, dtype=torch.int64)
    return {k: torch.cat([front, v], 1) for k, v in inputs.items()}, [
        (line, start + 1) for line, start in places
    ]


def dropping(share: float) -> Callable[[Replica, int], None]:
    """Dropout behind the embedding, in training only."""

    def prepare(replica: Replica, seed: int) -> None:
        torch.manual_seed(integer(seed, Purpose.PROBE, replica.spec.rank, "dropout"))

        def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
            return dropout(out, share, training=module.training)

        replica.model.get_submodule("embed").register_forward_hook(hook)

    return prepare


def shifted_start(scale: float, *, ranks: bool, published: bool) -> Callable[[Replica, int], None]:
    """The optimizer starts from other values; ``published``: and the model; ``ranks``: different on every rank."""

    def prepare(replica: Replica, seed: int) -> None:
        random = torch.Generator().manual_seed(
            integer(seed, Purpose.PROBE, replica.spec.rank * ranks, "start")
        )
        replica.theta = replica.theta + scale * torch.randn(replica.theta.shape, generator=random)
        if published:
            replica.publish()

    return prepare


def start_in_bfloat16(replica: Replica, seed: int) -> None:
    replica.theta = replica.theta.bfloat16().float()
    replica.publish()


def _whole(change: Callable[[Tensor, float], Tensor]) -> Limit:
    """The sum is changed, where a clip is asked for."""

    def limit(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
        return [change(g, largest) if largest else g for g in combine(gradients, index)]

    return limit


clip_forgotten = _whole(lambda gradient, largest: gradient)


def clip_to(factor: float) -> Limit:
    """To another norm than the one that was asked for."""
    return _whole(lambda gradient, largest: clip(gradient, factor * largest))


def clip_micro(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Every micro-batch by its own norm."""
    return combine([[clip(g, largest) if largest else g for g in rank] for rank in gradients], index)


def clip_running(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """After every backward the gradient that has been added up so far."""
    if not largest:
        return combine(gradients, index)
    sums = []
    for rank in gradients:
        buffer = torch.zeros_like(rank[0])
        for gradient in rank:
            buffer = clip(buffer + gradient, largest)
        sums.append(buffer)
    return everywhere(gradients, sums)


def clip_rank(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Every rank by its own norm, before they are added up."""
    if not largest:
        return combine(gradients, index)
    return everywhere(gradients, [clip(torch.stack(rank).sum(0), largest) for rank in gradients])


def clip_too_long(gradients: Gradients, combine: Combine, index: int, largest: float) -> list[Tensor]:
    """Before the division by the accumulation steps."""
    found, count = combine(gradients, index), len(gradients[0])
    return [clip(g * count, largest) / count if largest else g for g in found]


def ticks_of(speed: Callable[[int, int], float], ahead: int = 0) -> Callable[[int, int, int], float]:
    """``speed(K, D)`` ticks a step."""
    return lambda index, num_micro, num_ranks: (index + ahead) * speed(num_micro, num_ranks)


def momentum_lost(replica: Replica, at: int) -> int:
    replica.memory.clear()
    return at


def schedule_lost(replica: Replica, at: int) -> int:
    return 0


def both_lost(replica: Replica, at: int) -> int:
    replica.memory.clear()
    return 0


def parameters_lost(replica: Replica, at: int) -> int:
    """Back to where training began, with the momentum that was saved."""
    replica.theta = harness.flat(harness.parameters_of(harness.tiny_model(replica.spec))).to(
        replica.theta.dtype
    )
    replica.publish()
    return at


def from_the_first_row(num: int, size: int, epochs: int) -> Plan:
    """After the resume the data start anew."""
    windows = aligned(num, size, epochs)
    half = len(windows) // 2
    return windows[:half] + windows[: len(windows) - half]
