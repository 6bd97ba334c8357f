"""The peak of the memory that tensors take: on an accelerator by its allocator, otherwise by watching operators.

Watching counts the storages of all results until they are freed. So it also works for tensors without data (fake
tensors), with which a model of any size is measured. It does not see memory that a kernel takes and frees inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):
    """Counts the bytes of storages while it is entered. ``now`` begins with those of the tensors that it is given."""

    def __init__(self, tensors: Iterator[Tensor] | tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        for tensor in tensors:
            self._add(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor) and not isinstance(found, DTensor):
                self._add(found)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Peak:
    """The largest number of bytes that tensors took. Set when the measurement ends."""

    num_bytes: int = 0


@contextmanager
def measured_peak(device: torch.device, *modules: nn.Module) -> Iterator[Peak]:
    """Measure the peak within the block. ``modules`` hold parameters that exist before."""
    found = Peak()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        yield found
        found.num_bytes = torch.accelerator.max_memory_allocated(device)
        return
    before = tuple(t for module in modules for t in (*module.parameters(), *module.buffers()))
    with Watched(before) as watched:
        yield found
    found.num_bytes = watched.peak
