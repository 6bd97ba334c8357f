"""Brings together what the ranks saw of one step, as one row of float64 numbers per rank.

Every rank takes part in each exchange, also if its own part failed, so that no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import torch

from truestep.guard.tokens import Tokens

NAMES = tuple(f.name for f in fields(Tokens))
BITS = 48  # that a float64 holds exactly


@dataclass(frozen=True, kw_only=True)
class MicroSeen:
    """One micro-batch of a rank."""

    column: np.ndarray  # R
    mark: int  # a hash of its tokens; 0 if they are not known
    backward: int = 0  # number of the backward pass that reached it; -1: none, -2: several
    tokens: Tokens | None


@dataclass(frozen=True, kw_only=True)
class RankSeen:
    """One step of one rank. R equations."""

    failed: bool
    is_narrow: bool  # the watched modules compute in 16 bits
    target: np.ndarray  # R; NaN where the used gradient was not read
    previous: np.ndarray  # R: the target of the step before; NaN if it was not read
    micro: tuple[MicroSeen, ...]
    replicated: int = 0  # a hash of the parameters that every rank has whole
    still: tuple[bool, ...] = ()  # per tensor: it should have moved, and did not
    wrong_update: bool = False
    norm: float = 0.0  # of all gradients that the optimizer used; 0 if it was not read
    noise: float = 0.0  # relative error of the target, from reading it back from rounded values


def pack(seen: RankSeen) -> np.ndarray:
    """Return one row of numbers."""
    flags = [seen.failed, seen.is_narrow, seen.wrong_update, seen.replicated, seen.norm, seen.noise]
    bits = [sum(bit << i for i, bit in enumerate(part)) for part in _parts(seen.still)]
    head = [len(seen.target), len(seen.micro), len(seen.still), *flags, *bits]
    rows = [np.asarray(head, dtype=np.float64), seen.target, seen.previous]
    for one in seen.micro:
        told = [float("nan")] * len(NAMES) if one.tokens is None else list(map(float, astuple(one.tokens)))
        rows += [one.column, np.asarray([one.mark, one.backward, *told], dtype=np.float64)]
    return np.concatenate(rows)


def unpack(row: np.ndarray) -> RankSeen:
    """Return what ``pack`` packed; numbers after it are ignored."""
    size, count, tensors = (int(v) for v in row[:3])
    failed, is_narrow, wrong_update, replicated, norm, noise = row[3:9]
    at = 9 + len(_parts((False,) * tensors))
    bits = [bool(int(row[9 + i // BITS]) >> (i % BITS) & 1) for i in range(tensors)]
    target, previous = row[at : at + size], row[at + size : at + 2 * size]
    at, micro = at + 2 * size, []
    for _ in range(count):
        column, (mark, backward) = row[at : at + size], map(int, row[at + size : at + size + 2])
        told = row[at + size + 2 : at + size + 2 + len(NAMES)]
        tokens = (
            None
            if np.isnan(told[0])
            else Tokens(**{n: _number(n, v) for n, v in zip(NAMES, told, strict=True)})
        )
        micro.append(MicroSeen(column=column, mark=mark, backward=backward, tokens=tokens))
        at += size + 2 + len(NAMES)
    return RankSeen(
        failed=bool(failed), is_narrow=bool(is_narrow), target=target, previous=previous, micro=tuple(micro),
        replicated=int(replicated), still=tuple(bits), wrong_update=bool(wrong_update),
        norm=float(norm),
        noise=float(noise),
    )  # fmt: skip


def _parts(flags: Sequence[bool]) -> list[Sequence[bool]]:
    return [flags[i : i + BITS] for i in range(0, len(flags), BITS)]


def _number(name: str, value: float) -> Any:
    return (
        float(value)
        if name in ("weight", "token_spread", "spread", "sequence_spread", "form")
        else int(value)
    )


def gather(seen: RankSeen, group: Any) -> list[RankSeen]:
    """Return what every rank of the group saw, in the order of the ranks."""
    own = pack(seen)
    dist = torch.distributed
    if group is None:
        return [unpack(own)]
    device = _device(group)
    count = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device), group=group)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.float64)
    padded[: len(own)] = torch.from_numpy(own)
    rows = [torch.zeros(longest, dtype=torch.float64, device=device) for _ in range(count)]
    dist.all_gather(rows, padded.to(device), group=group)
    return [unpack(row.cpu().numpy()) for row in rows]


def on_all_ranks(flag: bool, group: Any) -> bool:
    """Return whether the flag is set on every rank of the group."""
    if group is None:
        return flag
    told = torch.tensor([flag], dtype=torch.int32, device=_device(group))
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(told)


def summed(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum of a tensor over the ranks of the group, on the CPU."""
    total = values.to(_device(group))
    torch.distributed.all_reduce(total, group=group)
    return total.cpu()


def _device(group: Any) -> torch.device:
    gloo = "gloo" in str(torch.distributed.get_backend(group))
    return torch.device("cpu" if gloo else current_device())


def current_device() -> str:
    """Return the accelerator of this process."""
    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return f"{found.type}:{torch.accelerator.current_device_index()}" if found else "cpu"


def world() -> Any:
    """Return the group of all ranks, or None if this process is alone."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return dist.group.WORLD
