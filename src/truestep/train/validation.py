"""The validation loss of a stage, and the decision to end a stage early. Neither changes what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from truestep.records import Demonstration, TrainSequence
from truestep.train.packing import dummy_batch, last_needed, pack
from truestep.train.parallel import Ranks, reshard
from truestep.train.policy import Policy
from truestep.train.sequences import whole_demonstration
from truestep.train.step import counts_passes, require_finite

if TYPE_CHECKING:
    from truestep.settings import EarlyStoppingSettings

LOWER_IS_BETTER = {"validation/loss": True, "dev/score": False}


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """The mean of −log π over all trained tokens of a set of demonstrations, at temperature 1.

    The micro-batches do not depend on the number of ranks, and their sums are added exactly. With copies of the
    model, the loss of given weights is therefore the same to the last bit on any number of ranks.
    Units: nats. Held by: tests/contract/test_validation.py"""

    policy: Policy
    demonstrations: Sequence[Demonstration]
    tokens_per_microbatch: int
    ranks: Ranks = field(default_factory=Ranks)

    def __call__(self, step: int) -> float:
        """Measure the current weights (a collective). Raises NonFiniteError, and Interrupted on all ranks."""
        found = [part for one in self.ranks.exchange(self._sums(step)) for part in one]
        num_tokens = sum(count for _, count in found)
        return math.fsum(total for total, _ in found) / num_tokens  # fsum is exact, in any order

    @torch.no_grad()
    def _sums(self, step: int) -> list[tuple[float, int]]:
        """Return −Σ log π and the number of tokens of each micro-batch of this rank."""
        parts, ranks, sums = self._parts(), self.ranks, []
        parameter = next(self.policy.parameters())
        made: dict[str, Any] = {
            "dtype": torch.promote_types(parameter.dtype, torch.float32),
            "device": parameter.device,
        }
        try:
            for first in range(0, len(parts), ranks.world_size):
                ranks.stop_point()
                together = parts[first : first + ranks.world_size]
                passes = max(map(len, together)) if counts_passes(self.policy) else 0
                if (index := first + ranks.rank) >= len(parts):  # sharded layers are gathered by all ranks
                    self.policy(replace(dummy_batch(**made), num_passes=passes), 1.0)
                    continue
                size = sum(last_needed(sequence) for sequence in parts[index])
                (batch,) = pack(parts[index], tokens_per_microbatch=size, **made)
                logprobs, _ = self.policy(replace(batch, num_passes=passes), 1.0)
                where = f"validation after step {step}, micro-batch {index}"
                require_finite({"log-probabilities": logprobs}, batch, where)
                sums.append((-float(logprobs.double().sum()), batch.num_targets))
        finally:
            reshard(self.policy)
        return sums

    def _parts(self) -> list[list[TrainSequence]]:
        """Return the sequences in micro-batches, in the order of the set. A sequence that is longer than
        ``tokens_per_microbatch`` gets its own: without gradients, it takes less memory than a training step."""
        parts: list[list[TrainSequence]] = []
        room = 0
        for number, d in enumerate(self.demonstrations):
            sequence = whole_demonstration(d, number)
            if (size := last_needed(sequence)) > room:
                parts.append([])
                room = self.tokens_per_microbatch
            parts[-1].append(sequence)
            room -= size
        return parts


def is_better(watch: str, value: float, best: float, min_change: float = 0.0) -> bool:
    """Return whether a value is better than the best one by more than ``min_change``."""
    return value < best - min_change if LOWER_IS_BETTER[watch] else value > best + min_change


def counted(
    settings: EarlyStoppingSettings, stall: Mapping[str, float], metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return the best value so far, and how many measurements in a row have not reached a new one (``since``)."""
    value = metrics.get(settings.watch)
    if not settings.patience or value is None:
        return dict(stall)
    if not stall or is_better(settings.watch, value, stall["best"], settings.min_change):
        return {"best": value, "since": 0}
    return {**stall, "since": stall["since"] + 1}


def has_stalled(settings: EarlyStoppingSettings, stall: Mapping[str, float]) -> bool:
    return bool(settings.patience and stall.get("since", 0) >= settings.patience)
