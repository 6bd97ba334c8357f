"""Makes all optimizer updates of one step, after packing and scoring the step's sequences."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from truestep import faults
from truestep.errors import UserError
from truestep.faults import FAULTS, WeightsOf
from truestep.flops import Ledger
from truestep.objective.methods import Method
from truestep.objective.schedule import Schedule
from truestep.records import RecordError, StepReport, TokenBatch, TrainSequence
from truestep.settings import FaultSettings
from truestep.train.metrics import combine
from truestep.train.optim import MasterOptimizer
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer, work
from truestep.train.source import StepData
from truestep.train.statistics import measure
from truestep.train.step import Observer, StepPlan, train_step

NO_FAULTS = FaultSettings()


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The metrics of a step's updates, the values for the controller (``seen``), and the work.
    ``later_seconds`` is the time of all updates after the first, or None if there is only one."""

    metrics: Mapping[str, float]
    seen: Mapping[str, float]
    ledger: Ledger
    later_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Updater:
    """Turns a step's sequences into updates. ``optimizers`` has "optimizer" and, for a method with a buffer,
    "buffer-optimizer" (same parameters, separate moments). ``max_length`` is L of Normaliser.MAX_LENGTH."""

    policy: Policy
    scorer: Scorer
    method: Method
    optimizers: Mapping[str, MasterOptimizer]
    learning_rate: Schedule  # by optimizer update, 0-based
    updates_per_step: int
    faults: FaultSettings = NO_FAULTS
    max_length: int = 1
    observe: Observer | None = None  # of the sampled tokens

    def update(self, data: StepData, step: int, *, may_drop: bool = False) -> Updates:
        """Make the updates of one step. Statistics and proximal values for all updates are computed before
        the first one. The buffer's separate update comes last. A stop after the first update leaves the
        step half done, so it is possible only if ``may_drop``: the caller then drops the step."""
        scorer, fault = self.scorer, fault_of(self.faults)
        packed = [self._pack(part, fault) for part in data.minibatches]
        ledger = sum((work("trained", batches) for batches in packed), Ledger())
        if scorer.reference is not None:
            packed = [scorer.with_reference(batches, step) for batches in packed]
            ledger = sum((work("scored", batches) for batches in packed), ledger)
        # The first update needs no proximal pass, because the policy is still the proximal policy.
        for index in range(0 if self.method.scores_first else 1, len(packed)):
            packed[index] = scorer.with_proximal(packed[index], step)
            ledger += work("scored", packed[index])
        statistics = measure(self.method.statistics, [b for part in packed for b in part], step, scorer.ranks)
        plan = partial(
            StepPlan,
            step=step,
            terms=self.method.terms,
            temperature=scorer.temperature,
            max_length=self.max_length,
            ranks=scorer.ranks,
            statistics=statistics,
            controls=data.controls,
            observe=self.observe,
        )
        reports, optimizer, began = [], self.optimizers["optimizer"], 0.0
        stops = scorer.ranks.stop_point
        later = stops if may_drop else lambda: None
        for index, batches in enumerate(packed):
            self._require_columns(batches)
            rate = self.learning_rate(step * self.updates_per_step + index)
            sets = [sequence.data for sequence in data.minibatches[index]]
            planned = plan(learning_rate=rate, microbatch_weights=self._weights(fault, batches), sets=sets)
            reports.append(train_step(self.policy, optimizer, batches, planned, later if index else stops))
            began = began or time.perf_counter()
        metrics = combine([_row(report) for report in reports])
        metrics |= {f"statistics/{name}": value for name, value in statistics.items()}
        if data.buffered is not None:
            batches, optimizer = scorer.pack(data.buffered), self.optimizers["buffer-optimizer"]
            planned = plan(learning_rate=optimizer.settings.lr)
            extra = train_step(self.policy, optimizer, batches, planned, later)
            metrics |= {"buffer/loss": extra.loss, "buffer/grad_norm": extra.grad_norm}
            ledger += work("trained", batches)
        seen = {**statistics, "grad_norm": reports[-1].grad_norm}
        is_single = len(packed) == 1 and data.buffered is None
        spent = None if is_single else time.perf_counter() - began
        return Updates(metrics=metrics, seen=seen, ledger=ledger, later_seconds=spent)

    def _pack(self, sequences: Sequence[TrainSequence], fault: WeightsOf | None) -> list[TokenBatch]:
        """Pack by memory; for an injected fault, whose weights depend on the micro-batches, pack a fixed
        number of sequences into each, in data order."""
        if fault is None:
            return self.scorer.pack(sequences)
        size = self.faults.sequences_per_microbatch
        found = []
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            tokens = sum(len(s.token_ids) for s in part)
            found += self.scorer.pack(part, first_sequence=start, limit=tokens)
        return found

    def _weights(self, fault: WeightsOf | None, batches: Sequence[TokenBatch]) -> list[float] | None:
        """Return this rank's fault weights, from the trained tokens of all ranks' micro-batches."""
        if fault is None:
            return None
        ranks = self.scorer.ranks
        counts = ranks.gather([b.num_targets for b in batches])
        try:
            weights = [float(w) for w in fault(counts)]
        except ValueError as error:
            raise UserError(f"faults: {error}; set a different faults.sequences_per_microbatch") from None
        start = sum(len(rank) for rank in counts[: ranks.rank])
        return weights[start : start + len(batches)]

    def _require_columns(self, batches: Sequence[TokenBatch]) -> None:
        """Raise RecordError, naming the method, if a term selects tokens without a column that it needs."""
        for term in self.method.terms:
            for name in term.needs:
                if any(getattr(b, name) is None and bool(term.select(b).any()) for b in batches):
                    named = f"method {self.method.name}: the term {term.name}"
                    raise RecordError(f"{named} needs {name}, which the tokens that it selects do not have")


def _row(report: StepReport) -> dict[str, float]:
    own = ("loss", "grad_norm", "learning_rate", "num_tokens")
    return {key: float(getattr(report, key)) for key in own} | dict(report.metrics)


OFFLOAD: Mapping[str, WeightsOf] = {"first_last": faults.offload_first_last, "first_only": faults.first_only}


def fault_of(settings: FaultSettings) -> WeightsOf | None:
    """Return a function that gives the weights with all injected faults, or None. Raises UserError."""
    unknown = [name for name in settings.others if name not in FAULTS]
    if unknown:
        raise UserError(f"faults.others: {unknown[0]!r} is not one of {', '.join(FAULTS)}")
    asked = [OFFLOAD[settings.offload_drop]] if settings.offload_drop != "none" else []
    asked += [faults.micro_mean] * settings.micro_mean + [faults.dp_token_mean] * settings.dp_token_mean
    asked += [FAULTS[name][0] for name in settings.others]
    return faults.combine(*asked) if asked else None
