"""One exact optimizer step, with totals before the first forward pass, one division and one global clip.

    totals = Σ over all micro-batches and ranks            (count_totals)
    loss_i = Σ_terms w · Σ_t −sg(C_t)·log π_t ÷ total       (microbatch_loss)
    gradient = Σ_i Σ_ranks ∇loss_i                          (accumulated in at least float32, never averaged)

Shapes: M trained tokens in a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from truestep import signals
from truestep.device import return_free_memory
from truestep.objective.coefficients import Context
from truestep.objective.methods.row import POLICY, Term
from truestep.objective.normalise import local_total, normalise
from truestep.records import BatchTotals, Origin, RecordError, StepReport, TokenBatch
from truestep.train import metrics
from truestep.train.metrics import Meter
from truestep.train.optim import MasterOptimizer, clip_, global_norm
from truestep.train.packing import dummy_batch
from truestep.train.parallel import Ranks, is_sharded
from truestep.train.policy import Policy


class NonFiniteError(ArithmeticError):
    """Raised for a NaN or an infinity, before the optimizer runs. One of ``batches`` may be the cause."""

    def __init__(self, message: str, batches: Sequence[TokenBatch] = ()) -> None:
        super().__init__(message)
        self.batches = tuple(batches)


class Observer(Protocol):
    """Sees the sampled tokens of an update. ``judge`` is called once, before the optimizer, and may raise."""

    def add(self, trainer: Tensor, engine: Tensor) -> None:
        """Take the log-probabilities [K] of K tokens that the engine sampled, as trainer and engine have them."""

    def judge(self, step: int, ranks: Ranks) -> None:
        """Judge all tokens of the update, on all ranks (a collective)."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The inputs of one optimizer step other than the policy, the optimizer and the data."""

    step: int  # the number of steps before it; messages and logs count from 1
    terms: Sequence[Term]
    learning_rate: float
    temperature: float
    max_length: int = 1  # L of the max_length normaliser
    ranks: Ranks = field(default_factory=Ranks)
    microbatch_weights: Sequence[float] | None = None  # ones by default; a fault is a wrong weight vector
    statistics: Mapping[str, float] = field(default_factory=dict)  # over the whole step, for coefficients
    controls: Mapping[str, float] = field(default_factory=dict)  # the controller's values for this step
    observe: Observer | None = None  # of the sampled tokens; may refuse the update
    sets: Sequence[str] = ()  # the data set of every sequence, by its number, for metrics


def train_step(
    policy: Policy,
    optimizer: MasterOptimizer,
    batches: Sequence[TokenBatch],
    plan: StepPlan,
    check_stop: Callable[[], None] = lambda: None,
) -> StepReport:
    """Accumulate every micro-batch, clip once, update once. ``check_stop`` is called before each micro-batch
    and may raise; the step then changes nothing.

    Raises NonFiniteError before the optimizer runs, naming the tensor.
    Held by: tests/numerics/test_invariance.py, tests/numerics/test_mutants.py"""
    totals = count_totals(plan.terms, batches, plan.ranks)
    weights = [1.0] * len(batches) if plan.microbatch_weights is None else list(plan.microbatch_weights)
    if len(weights) != len(batches):
        raise ValueError(f"got {len(weights)} microbatch_weights for {len(batches)} micro-batches")
    meter = Meter()
    if not any(totals.terms.values()):  # no rank trains a token: momentum must not move the weights
        return _report(plan, totals, meter, 0.0)
    optimizer.zero_grad()
    if policy.saves_memory:
        return_free_memory()
    try:
        for index, batch in enumerate(levelled(batches, plan.ranks, policy)):
            check_stop()
            loss = microbatch_loss(policy, batch, plan, totals, meter)
            require_finite({"loss": loss}, batch, f"step {plan.step + 1}, micro-batch {index}")
            (loss * (weights[index] if index < len(weights) else 0.0)).backward()
        check_stop()
        if plan.observe is not None:
            plan.observe.judge(plan.step, plan.ranks)
    except BaseException:
        optimizer.zero_grad()
        raise
    gradients, sharded = optimizer.gradients(), is_sharded(policy)
    if not sharded:
        plan.ranks.sum_gradients(gradients.values())
    norm = global_norm(gradients.values(), plan.ranks, sharded=sharded)
    if not math.isfinite(norm):
        norms = {name: global_norm([g], plan.ranks, sharded=sharded) for name, g in gradients.items()}
        name = next((name for name, value in norms.items() if not math.isfinite(value)), "a parameter")
        optimizer.zero_grad()
        raise NonFiniteError(f"step {plan.step + 1}: the gradient of {name} is not finite", batches)
    clip_(gradients.values(), norm, optimizer.settings.max_grad_norm)
    signals.hold()  # from here on, only the whole step can be kept; the loop releases it
    optimizer.step(gradients, plan.learning_rate)
    return _report(plan, totals, meter, norm)


def count_totals(terms: Sequence[Term], batches: Sequence[TokenBatch], ranks: Ranks) -> BatchTotals:
    """Count every term's denominator over all micro-batches and ranks, before the first forward pass."""
    local = [
        local_total(term.normaliser, [(term.counted or term.select)(b) for b in batches], batches)
        for term in terms
    ]
    local += [float(sum(b.num_targets for b in batches)), float(_num_sequences(batches))]
    *found, num_tokens, num_sequences = ranks.sum(local)
    return BatchTotals(
        terms={term.name: total for term, total in zip(terms, found, strict=True)},
        num_tokens=int(num_tokens),
        num_sequences=int(num_sequences),
    )


def _num_sequences(batches: Sequence[TokenBatch]) -> int:
    """Count the step's sequences on this rank. Raises RecordError if two micro-batches contain the same
    number: no sequence is split, so these are two sequences, which a mean would count as one."""
    numbers = [batch.sequence_index.unique() for batch in batches]
    held = torch.cat(numbers) if numbers else torch.zeros(0)
    if held.unique().numel() < held.numel():
        raise RecordError(
            "two micro-batches of a step contain the same sequence number; pack all sequences of the step in one call, "
            "or pass different first_sequence numbers"
        )
    return held.numel()


def microbatch_loss(
    policy: Policy, batch: TokenBatch, plan: StepPlan, totals: BatchTotals, meter: Meter
) -> Tensor:
    """Return this micro-batch's part of the globally normalised loss, and add its metrics to ``meter``."""
    logprobs, entropy = policy(batch, plan.temperature)
    where = f"step {plan.step + 1}, forward pass"
    require_finite({"policy log-probabilities": logprobs, "entropy": entropy}, batch, where)
    detached = logprobs.detach()
    context = Context(
        policy_logprobs=detached,
        # Before the first update of a rollout batch the policy is the proximal policy.
        proximal_logprobs=detached if batch.proximal_logprobs is None else batch.proximal_logprobs,
        entropy=entropy.detach(),
        batch=batch,
        step=plan.step,
        statistics=plan.statistics,
    )
    if plan.observe is not None and batch.behavior_logprobs is not None:
        own = batch.origin == int(Origin.POLICY)
        plan.observe.add(context.proximal_logprobs[own], batch.behavior_logprobs[own])
    loss = logprobs.sum() * 0.0  # zero with a graph: backward runs even for a micro-batch without targets
    for term in plan.terms:
        total = totals.of(term.name)
        if total == 0:
            continue  # no rank has tokens of this term in this step
        selected = term.select(batch)
        if not bool(selected.any()):
            continue  # a column that the coefficient reads may be missing
        if term.coefficient is not None:
            # At tokens that are not selected, a coefficient may have any value, even NaN.
            coefficient = torch.where(selected, term.coefficient(context), 0.0)
            sampled = POLICY(batch) & selected
            if term.clips:
                metrics.of_clipping(meter, coefficient, batch.advantage, sampled)
            if term.correction is not None:
                weight = term.correction(context)
                metrics.of_correction(meter, weight, sampled)
                coefficient = coefficient * torch.where(selected, weight, 0.0)
            values = -(coefficient * logprobs)
        else:
            assert term.value is not None
            values = term.value(logprobs, entropy)
        values = values * selected.to(values.dtype) * batch.weight
        which, longest = term.normaliser, plan.max_length
        part = normalise(values, normaliser=which, batch=batch, total=total, max_length=longest)
        weight_now = term.weight(plan.step) * (plan.controls[term.control] if term.control else 1.0)
        weight_now *= 1.0 if term.scale is None else term.scale(totals)
        loss = loss + weight_now * part
        meter.add(f"loss/{term.name}", weight_now * float(part.detach()))
    metrics.of_tokens(meter, context, plan.sets)
    return loss


def _report(plan: StepPlan, totals: BatchTotals, meter: Meter, norm: float) -> StepReport:
    found = metrics.with_expert(meter.reduce(plan.ranks))
    parts = {f"loss/{term.name}": found.pop(f"loss/{term.name}", 0.0) for term in plan.terms}
    return StepReport(
        step=plan.step,
        loss=math.fsum(parts.values()),
        grad_norm=norm,
        learning_rate=plan.learning_rate,
        num_tokens=totals.num_tokens,
        metrics=found | (parts if len(plan.terms) > 1 else {}),
    )


def levelled(batches: Sequence[TokenBatch], ranks: Ranks, policy: Policy) -> list[TokenBatch]:
    """Add dummy batches until all ranks have the same number, because collectives need all ranks. The same holds for
    the passes of a sharded model that cannot be packed."""
    most = int(ranks.max([float(len(batches))])[0])
    parameter = next(policy.parameters())
    wide = torch.promote_types(parameter.dtype, torch.float32)
    made = [*batches, *[dummy_batch(wide, parameter.device)] * (most - len(batches))]
    if not counts_passes(policy):
        return made
    passes = ranks.max([float(len(batch.segments)) for batch in made])
    return [replace(batch, num_passes=int(count)) for batch, count in zip(made, passes, strict=True)]


def counts_passes(policy: Policy) -> bool:
    """Return whether all ranks must run the model equally often in a micro-batch: its layers are sharded, and it runs each
    sequence separately."""
    return is_sharded(policy) and not policy.packs


def require_finite(tensors: Mapping[str, Tensor], batch: TokenBatch, where: str) -> None:
    """Raise NonFiniteError with the name of the first tensor that has a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{where}: {name} is not finite", [batch])
