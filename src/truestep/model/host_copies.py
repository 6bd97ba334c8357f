"""Keeps what layers save for the backward pass in host memory.

Held by: tests/numerics/test_host_copies.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SMALLEST = 1 << 10  # bytes; smaller tensors stay where they are


class HostCopies:
    """A context in which every tensor that is saved for the backward pass becomes a copy in host memory, which is copied
    back when it is needed. The copies have the same bits. ``kept`` (such as weights) stay where they are, and so do
    integers. Shards among ``kept`` are ignored, because only gathered weights are saved. Copies to and from the device
    are in its own stream, so they are in order with its kernels.

    ``nbytes`` counts what was copied, in all contexts so far."""

    def __init__(self, kept: Iterable[Tensor] = ()) -> None:
        self.nbytes, self.kept = (
            0,
            {t.untyped_storage().data_ptr() for t in kept if not isinstance(t, DTensor)},
        )
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        is_small = saved.nbytes < SMALLEST or not saved.is_floating_point()
        if is_small or saved.untyped_storage().data_ptr() in self.kept:
            return saved
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.device.type != "cpu")
        self.nbytes += saved.nbytes
        return saved.device, host.copy_(saved, non_blocking=True)

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        moved: Tensor = host.to(device, non_blocking=True)
        return moved
