"""A group of processes in which the first one sends tensors to all others: by gloo between processors, and by NCCL
between NVIDIA GPUs.

Trainer and vLLM's workers are such a group, beside any other group that either of them has. They meet at a store of
the trainer. No object is sent, so nothing is pickled. A copy of this file is imported in vLLM's environment, so it
imports nothing of the package.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SENDER = 0
KINDS = {"cpu": "ProcessGroupGloo", "cuda": "ProcessGroupNCCL"}


class TensorGroup:
    """``size`` processes with the ranks 0 to size − 1. The one with rank 0 opens the store, and can be asked for its
    ``port`` before the others come. ``meet`` waits for them."""

    def __init__(self, host: str, port: int, rank: int, size: int, seconds: float) -> None:
        self.rank, self.size, self.limit = rank, size, timedelta(seconds=seconds)
        is_first = rank == SENDER
        self.store = dist.TCPStore(host, port, size, is_first, self.limit, wait_for_workers=False)
        self.port = self.store.port

    def meet(self, device: torch.device) -> None:
        """Connect all processes. Raises RuntimeError if one does not come."""
        self.device = device
        kind = getattr(dist, KINDS[device.type])
        self.group = kind(dist.PrefixStore("truestep", self.store), self.rank, self.size, self.limit)

    def broadcast(self, tensor: Tensor) -> None:
        """Send the tensor if this is the first process, and otherwise overwrite it. It lies on the group's device.
        Raises RuntimeError if a process was lost."""
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = SENDER, self.limit
        # As bytes, because not every transport knows every dtype.
        self.group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()
