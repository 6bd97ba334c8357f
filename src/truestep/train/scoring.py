"""Forward passes before a step's first update, with the proximal and the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from truestep.flops import Ledger
from truestep.model.attention import count_pairs
from truestep.model.lora import switched_off
from truestep.records import TokenBatch, TrainSequence
from truestep.train.packing import pack
from truestep.train.parallel import Ranks, reshard
from truestep.train.policy import Policy
from truestep.train.step import levelled, require_finite


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores sequences and packed micro-batches (collectives). ``reference`` is the frozen initial model, or
    the policy itself, whose adapters are then switched off."""

    policy: Policy
    temperature: float
    tokens_per_microbatch: int
    reference: Policy | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def pack(
        self, sequences: Sequence[TrainSequence], *, first_sequence: int = 0, limit: int | None = None
    ) -> list[TokenBatch]:
        """Pack sequences into micro-batches of at most ``limit`` (or ``tokens_per_microbatch``) tokens."""
        parameter = next(self.policy.parameters())
        return pack(
            sequences,
            tokens_per_microbatch=self.tokens_per_microbatch if limit is None else limit,
            share_prefix=self.policy.packs,
            first_sequence=first_sequence,
            dtype=torch.promote_types(parameter.dtype, torch.float32),
            device=parameter.device,
        )

    def with_proximal(self, batches: Sequence[TokenBatch], step: int) -> list[TokenBatch]:
        """Return the batches with the log-probabilities and entropies of the current policy."""
        scored = self._passed(self.policy, batches, step, "proximal")
        return [replace(b, proximal_logprobs=logprobs, proximal_entropy=e) for b, logprobs, e in scored]

    def with_reference(self, batches: Sequence[TokenBatch], step: int) -> list[TokenBatch]:
        """Return the batches with the log-probabilities of the frozen reference policy."""
        assert self.reference is not None
        with switched_off(self.reference.model):
            scored = self._passed(self.reference, batches, step, "reference")
        return [replace(batch, reference_logprobs=logprobs) for batch, logprobs, _ in scored]

    def entropy(self, sequences: Sequence[TrainSequence], step: int) -> tuple[list[float], Ledger]:
        """Return each sequence's mean entropy over its trained tokens (current policy), and the work done."""
        batches = self.with_proximal(self.pack(sequences), step)
        sums = [0.0] * len(sequences)
        for batch in batches:
            assert batch.proximal_entropy is not None
            for index in batch.sequence_index.unique().tolist():
                sums[index] = float(batch.proximal_entropy[batch.sequence_index == index].sum())
        found = [total / max(1, s.num_trained) for total, s in zip(sums, sequences, strict=True)]
        return found, work("scored", batches)

    @torch.no_grad()
    def _passed(
        self, policy: Policy, batches: Sequence[TokenBatch], step: int, whose: str
    ) -> list[tuple[TokenBatch, Tensor, Tensor]]:
        found = []
        try:
            for index, batch in enumerate(levelled(batches, self.ranks, policy)):
                self.ranks.stop_point()
                logprobs, entropy = policy(batch, self.temperature)
                made = {f"{whose} log-probabilities": logprobs, f"{whose} entropy": entropy}
                require_finite(made, batch, f"step {step + 1}, micro-batch {index}")
                if index < len(batches):
                    found.append((batch, logprobs.detach(), entropy.detach()))
        finally:
            reshard(policy)  # also if interrupted, because the parameters are then saved
        return found


def work(kind: str, batches: Sequence[TokenBatch]) -> Ledger:
    """Count the work of a pass over the batches: forward ("scored"), or forward and backward ("trained")."""
    tokens, pairs = sum(b.num_tokens for b in batches), sum(count_pairs(b.segments) for b in batches)
    return Ledger(**{f"{kind}_pass_tokens": tokens, f"{kind}_pairs": pairs})
