"""torch DistributedDataParallel as its documentation shows it: ``no_sync`` inside the window, and a loss that is summed,
divided by the tokens of all ranks and multiplied by the world size, since DDP averages gradients over ranks.

Options: arch, optimizer; ``local_mean`` divides by this rank's tokens instead (a common loop, and a rank-wise mean).
"""

from __future__ import annotations

import contextlib

import kit
import torch
from torch.nn.functional import cross_entropy


def window_tokens(spec: kit.Spec, window: list[list[int]]) -> float:
    """Trained tokens of this window on all ranks."""
    count = torch.tensor(float(sum(sum(spec.rows[row]["trained"][1:]) for batch in window for row in batch)))
    if not spec.options.get("local_mean"):
        torch.distributed.all_reduce(count)
        return float(count)
    return float(count) * spec.world_size


def loss_of(spec: kit.Spec, model: torch.nn.Module, batch: list[int]) -> torch.Tensor:
    """Summed over the trained tokens of a micro-batch, all of its rows in one padded forward pass."""
    longest = max(len(spec.rows[row]["ids"]) for row in batch)
    ids = torch.tensor([spec.rows[row]["ids"] + [0] * (longest - len(spec.rows[row]["ids"])) for row in batch])
    labels = torch.tensor([spec.labels(row) + [-100] * (longest - len(spec.rows[row]["ids"])) for row in batch])
    logits = kit.logits_of(model(input_ids=ids))[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def run(spec: kit.Spec) -> None:
    kit.join_ranks(spec)
    model = kit.tiny_model(spec)
    recorder = kit.Recorder(spec, model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = spec.optimizer(wrapped.parameters())
    wrapped.train()
    micro = spec.batches() * spec.epochs
    for first in range(0, len(micro), spec.accumulation):
        window = micro[first : first + spec.accumulation]
        total = window_tokens(spec, window)
        for index, batch in enumerate(window):
            last = index == len(window) - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                (loss_of(spec, wrapped, batch) * spec.world_size / total).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.finish()


if __name__ == "__main__":
    kit.main(run)
