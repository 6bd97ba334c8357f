"""Checkpoints to save in tests, and what it means that two are the same."""

from __future__ import annotations

import pytest
import torch

from truestep.checkpoint.store import Checkpoint


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
            t = t.detach().contiguous()
            return t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).tolist()

        return {group: {name: one(t) for name, t in tensors.items()} for group, tensors in c.tensors.items()}

    return a.step == b.step and dict(a.state) == dict(b.state) and bits(a) == bits(b)


def silent(message: str) -> None:
    pytest.fail(f"unexpected warning: {message}")
