"""All optimizer updates of one step: pack, score what has to be scored before the first of them, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from truestep.errors import UserError
from truestep.faults import WeightsOf
from truestep.flops import Ledger
from truestep.model.attention import count_pairs
from truestep.objective.methods import Method
from truestep.objective.schedule import Schedule
from truestep.records import StepReport, TokenBatch, TrainSequence
from truestep.settings import StageSettings
from truestep.train.assemble import pack
from truestep.train.faults import fault_of
from truestep.train.optim import MasterOptimizer
from truestep.train.policy import Policy
from truestep.train.source import StepData
from truestep.train.statistics import measure
from truestep.train.step import StepPlan, fill_proximal, fill_reference, train_step


@dataclass(frozen=True, kw_only=True)
class Optimizers:
    """The stage's optimizer, and that of the method's buffer where it has one: same parameters, own
    moments."""

    main: MasterOptimizer
    buffer: MasterOptimizer | None = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of a checkpoint."""
        found = {"optimizer": self.main.state_tensors()}
        return found if self.buffer is None else {**found, "buffer-optimizer": self.buffer.state_tensors()}

    def load_state_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.main.load_state_tensors(groups["optimizer"])
        if self.buffer is not None:
            self.buffer.load_state_tensors(groups["buffer-optimizer"])


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What a step's updates reported, the statistics they used, and the work they took."""

    reports: list[StepReport]
    buffered: StepReport | None = None  # of the buffer's own update
    statistics: Mapping[str, float] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True, kw_only=True)
class Updater:
    """Everything that turns a step's sequences into updates. ``plan`` holds what does not change between
    steps."""

    policy: Policy
    reference: Policy | None
    method: Method
    settings: StageSettings
    optimizers: Optimizers
    learning_rate: Schedule
    updates_per_step: int
    plan: StepPlan

    def update(self, data: StepData, step: int) -> Updates:
        """The updates of one step. Statistics and proximal values of all of them are made before the first;
        the buffer's own update comes last."""
        plan = replace(self.plan, step=step, controls=data.controls)
        fault = fault_of(self.settings.faults)
        packed = [self._pack(part, fault is not None) for part in data.minibatches]
        ledger = sum((_trained(batches) for batches in packed), Ledger())
        if self.reference is not None:
            packed = [fill_reference(self.reference, batches, plan) for batches in packed]
            ledger = sum((_scored(batches) for batches in packed), ledger)
        # The first update needs no pass of its own: there the policy still is the proximal policy.
        for index in range(0 if self.method.scores_first else 1, len(packed)):
            packed[index] = fill_proximal(self.policy, packed[index], plan)
            ledger = ledger + _scored(packed[index])
        statistics = measure(
            self.method.statistics, [b for batches in packed for b in batches], step, self.plan.ranks
        )
        plan = replace(plan, statistics=statistics)
        reports = []
        for index, batches in enumerate(packed):
            rate = self.learning_rate(step * self.updates_per_step + index)
            weighted = replace(plan, learning_rate=rate, microbatch_weights=self._weights(fault, batches))
            reports.append(train_step(self.policy, self.optimizers.main, batches, weighted))
            plan = replace(
                plan, check_stop=lambda: None
            )  # a step that has begun to update is finished, not dropped
        extra = None
        if data.buffered is not None and self.optimizers.buffer is not None:
            batches = self._pack(data.buffered, False)
            rate = self.optimizers.buffer.settings.lr
            extra = train_step(
                self.policy, self.optimizers.buffer, batches, replace(plan, learning_rate=rate)
            )
            ledger = ledger + _trained(batches)
        return Updates(reports=reports, buffered=extra, statistics=statistics, ledger=ledger)

    def entropy_of(self, sequences: Sequence[TrainSequence]) -> tuple[list[float], Ledger]:
        """The mean entropy of each sequence's trained tokens under the policy as it is now. A collective."""
        batches = fill_proximal(self.policy, self._pack(sequences, False), self.plan)
        sums = [0.0] * len(sequences)
        for batch in batches:
            for index in batch.sequence_index.unique().tolist():
                sums[index] = float(batch.proximal_entropy[batch.sequence_index == index].sum())
        found = [total / max(1, s.num_trained) for total, s in zip(sums, sequences, strict=True)]
        return found, sum((_scored([b]) for b in batches), Ledger())

    def _pack(self, sequences: Sequence[TrainSequence], in_order: bool) -> list[TokenBatch]:
        """Micro-batches by memory alone; with an injected fault, which depends on them, by number and in
        order."""
        parameter = next(self.policy.parameters())
        limit = self.settings.tokens_per_microbatch
        size = self.settings.faults.sequences_per_microbatch
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)] if in_order else [sequences]
        found: list[TokenBatch] = []
        for number, part in enumerate(parts):
            batches = pack(
                part,
                tokens_per_microbatch=sum(len(s.token_ids) for s in part) if in_order else limit,
                share_prefix=self.policy.packs,
                dtype=torch.promote_types(parameter.dtype, torch.float32),
                device=parameter.device,
            )
            found += [replace(b, sequence_index=b.sequence_index + number * size) for b in batches]
        return found

    def _weights(self, fault: WeightsOf | None, batches: Sequence[TokenBatch]) -> list[float] | None:
        """This rank's part of the fault's weights, from the trained tokens of all micro-batches on all
        ranks."""
        if fault is None:
            return None
        counts = self.plan.ranks.gather([b.num_targets for b in batches])
        try:
            weights = [float(w) for w in fault(counts)]
        except ValueError as error:
            raise UserError(f"faults: {error}: write another faults.sequences_per_microbatch") from None
        start = sum(len(rank) for rank in counts[: self.plan.ranks.rank])
        return weights[start : start + len(batches)]


def _trained(batches: Sequence[TokenBatch]) -> Ledger:
    return Ledger(
        trained_pass_tokens=sum(b.num_tokens for b in batches),
        trained_pairs=sum(count_pairs(b.segments) for b in batches),
    )


def _scored(batches: Sequence[TokenBatch]) -> Ledger:
    return Ledger(
        scored_pass_tokens=sum(b.num_tokens for b in batches),
        scored_pairs=sum(count_pairs(b.segments) for b in batches),
    )
