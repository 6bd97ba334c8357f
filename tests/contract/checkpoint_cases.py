"""Checkpoints to save in tests, and what it means that two are the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from truestep.checkpoint.layout import Checkpoint, RowsOf, Share


def make(step: int, rank: int = 0) -> Checkpoint:
    """A checkpoint that is a function of its step and rank, with every awkward kind of tensor in it."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    weight = torch.randn(6, 5, generator=draw)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    parameters = {
        "embedding": weight,
        "head": weight,  # tied
        "transposed": weight.t(),
        "column": weight[:, 1],
        "leaf": torch.nn.Parameter(weight.to(torch.bfloat16)),
        "nothing": torch.empty(0, 3),
        "special": special,
    }
    optimizer = {
        "exact": torch.randn(3, generator=draw, dtype=torch.float64),
        "step": torch.tensor(2**62 + step),
        "flags": torch.tensor([True, False, step % 2 == 0]),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    state = {
        "cursor": step * 8,
        "lr": 1 / 3 + step,
        "ledger": {"tokens": 2**60 + step},
        "name": "ü",
        "order": [3, 1],
    }
    return Checkpoint(
        step=step,
        tensors={"parameters": parameters, "optimizer": optimizer, "buffer.replay": {}},
        state=state,
    )


def same(a: Checkpoint | None, b: Checkpoint | None) -> bool:
    """Equal bit for bit: dtypes, shapes, NaN payloads and signs of zero included."""
    if a is None or b is None:
        return a is b

    def bits(c: Checkpoint) -> dict:
        def one(t: torch.Tensor) -> tuple:
            raw = t.detach().contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)
            return t.dtype, tuple(t.shape), raw.tolist()

        return {group: {name: one(t) for name, t in tensors.items()} for group, tensors in c.tensors.items()}

    return a.step == b.step and dict(a.state) == dict(b.state) and bits(a) == bits(b)


def bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows of a rank, as FSDP2 splits them."""
    size = -(-num_rows // world_size)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)


def rows_of(rank: int, world_size: int) -> RowsOf:
    """What a rank needs if every tensor of the parameters is split; the optimizer's are whole."""

    def rows(group: str, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        if group == "parameters":
            return bounds(shape[0], rank, world_size)
        return 0, shape[0] if shape else 1

    return rows


def split(whole: Checkpoint, rank: int, world_size: int, *, saves: bool = False) -> Checkpoint:
    """What a rank has of a checkpoint. ``saves``: with the shares that a saved one needs."""
    parameters, shares = {}, {}
    for name, t in whole.tensors["parameters"].items():
        first, stop = bounds(t.shape[0], rank, world_size)
        parameters[name], shares[name] = t[first:stop], Share(shape=tuple(t.shape), start=first)
    tensors = {**whole.tensors, "parameters": parameters}
    found = {"parameters": shares} if saves else {}
    return Checkpoint(step=whole.step, tensors=tensors, state=whole.state, shares=found)


def on_ranks(world_size: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Run ``work(rank, gather)`` in a thread for each rank; what each returned or raised."""
    barrier, told, found = threading.Barrier(world_size), [None] * world_size, [None] * world_size

    def one(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait(60)
            answers = list(told)
            barrier.wait(60)
            return answers

        try:
            found[rank] = work(rank, gather)
        except (OSError, RuntimeError, ValueError) as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def silent(message: str) -> None:
    pytest.fail(f"unexpected warning: {message}")
