"""One optimizer step, exact: totals before the first forward, one division, one clip by the global norm.

    totals = Σ over all micro-batches and ranks            (count_totals)
    loss_i = Σ_terms w · Σ_t −sg(C_t)·log π_t ÷ total       (microbatch_loss)
    gradient = Σ_i Σ_ranks ∇loss_i                          (accumulated in at least float32, never averaged)

Shapes: M trained tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from truestep.device import return_free_memory
from truestep.objective.coefficients import Context
from truestep.objective.corrections import fresh
from truestep.objective.methods import Term
from truestep.objective.normalise import local_total, normalise
from truestep.records import BatchTotals, StepReport, TokenBatch
from truestep.train.assemble import dummy_batch
from truestep.train.optim import MasterOptimizer, clip_, global_norm
from truestep.train.parallel import Ranks, reshard
from truestep.train.policy import Policy


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity: the step was stopped before the optimizer, and the batch saved."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a step needs besides the policy, the optimizer and the data."""

    step: int
    terms: Sequence[Term]
    learning_rate: float
    temperature: float
    max_length: int = 1  # L of the max_length normaliser
    ranks: Ranks = field(default_factory=Ranks)
    sharded: bool = False
    microbatch_weights: Sequence[float] | None = None  # ones by default; a fault is a wrong weight vector
    statistics: Mapping[str, float] = field(default_factory=dict)  # of the whole step, for coefficients
    controls: Mapping[str, float] = field(
        default_factory=dict
    )  # the method's controller's values of this step
    check_stop: Callable[[], None] = lambda: None
    rescue_folder: Path | None = None  # where the batch of a non-finite step is saved


def train_step(
    policy: Policy, optimizer: MasterOptimizer, batches: Sequence[TokenBatch], plan: StepPlan
) -> StepReport:
    """Accumulate every micro-batch, clip once, update once. Leaves nothing behind if it is interrupted.

    Raises NonFiniteError before the optimizer runs, naming the tensor.
    Held by: tests/numerics/test_invariance.py, tests/numerics/test_mutants.py
    """
    totals = count_totals(plan.terms, batches, plan.ranks)
    weights = [1.0] * len(batches) if plan.microbatch_weights is None else list(plan.microbatch_weights)
    if len(weights) != len(batches):
        raise ValueError(f"{len(weights)} microbatch_weights for {len(batches)} micro-batches")
    sums: dict[str, float] = {}
    if not any(
        totals.terms.values()
    ):  # nothing to learn from on any rank: momentum alone must not move the weights
        return _report(plan, totals, sums, 0.0)
    optimizer.zero_grad()
    if policy.saves_memory:
        return_free_memory()
    try:
        for index, batch in enumerate(_levelled(batches, plan.ranks, policy)):
            plan.check_stop()
            loss = microbatch_loss(policy, batch, plan, totals, sums)
            _require_finite({"loss": loss}, batch, plan, f"micro-batch {index}")
            (loss * (weights[index] if index < len(weights) else 0.0)).backward()
        plan.check_stop()
    except BaseException:
        optimizer.zero_grad()
        raise
    gradients = optimizer.gradients()
    if not plan.sharded:
        plan.ranks.sum_gradients(gradients.values())
    norm = global_norm(gradients.values(), plan.ranks, sharded=plan.sharded)
    if not math.isfinite(norm):
        bad = [
            name
            for name, g in gradients.items()
            if not math.isfinite(global_norm([g], plan.ranks, sharded=plan.sharded))
        ]
        optimizer.zero_grad()
        path = _rescue(batches, plan)
        raise NonFiniteError(
            f"step {plan.step}: the gradient of {bad[0] if bad else 'a parameter'} is not finite{path}"
        )
    clip_(gradients.values(), norm, optimizer.settings.max_grad_norm)
    optimizer.step(gradients, plan.learning_rate)
    return _report(plan, totals, sums, norm)


def count_totals(terms: Sequence[Term], batches: Sequence[TokenBatch], ranks: Ranks) -> BatchTotals:
    """Every term's denominator over all micro-batches and ranks, before the first forward pass."""
    counted = [term.counted or term.select for term in terms]
    local = [
        local_total(t.normaliser, [c(b) for b in batches], batches)
        for t, c in zip(terms, counted, strict=True)
    ]
    sequences = [b.sequence_index for b in batches]
    groups = [b.group_index for b in batches]
    local += [float(sum(b.num_targets for b in batches)), _distinct(sequences), _distinct(groups)]
    *found, num_tokens, num_sequences, num_groups = ranks.sum(local)
    return BatchTotals(
        terms={term.name: total for term, total in zip(terms, found, strict=True)},
        num_tokens=int(num_tokens),
        num_sequences=int(num_sequences),
        num_groups=int(num_groups),
    )


def _distinct(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).unique().numel()) if parts else 0.0


def term_weight(term: Term, plan: StepPlan, totals: BatchTotals) -> float:
    """What multiplies a term's normalised loss in this step: its schedule, its controller's value, its old
    scale."""
    weight = term.weight(plan.step)
    if term.control:
        weight = weight * plan.controls[term.control]
    return weight if term.scale is None else weight * term.scale(totals)


def microbatch_loss(
    policy: Policy, batch: TokenBatch, plan: StepPlan, totals: BatchTotals, sums: dict[str, float]
) -> Tensor:
    """This micro-batch's part of the globally normalised loss; adds its metrics to ``sums``."""
    logprobs, entropy = policy(batch, plan.temperature)
    _require_finite({"policy log-probabilities": logprobs, "entropy": entropy}, batch, plan, "forward pass")
    detached = logprobs.detach()
    # Before the first update of a rollout batch the policy is the proximal policy: its own values, no extra
    # pass.
    proximal = torch.where(batch.proximal_logprobs.isnan(), detached, batch.proximal_logprobs)
    context = Context(
        policy_logprobs=detached,
        proximal_logprobs=proximal,
        entropy=entropy.detach(),
        batch=batch,
        step=plan.step,
        statistics=plan.statistics,
    )
    loss = (
        logprobs.sum() * 0.0
    )  # an exact zero with a graph: a micro-batch without targets still runs backward
    for term in plan.terms:
        total = totals.of(term.name)
        if total == 0:
            continue  # absent from the whole step, on every rank
        selected = term.select(batch)
        if term.coefficient is not None:
            # Elsewhere a coefficient may be anything, even not a number: a demonstration has no behavior
            # probability.
            coefficient = torch.where(selected, term.coefficient(context), 0.0)
            values = -(coefficient * logprobs)
            _count_clipped(sums, coefficient, selected & fresh(batch), batch)
        else:
            assert term.value is not None
            values = term.value(logprobs, entropy)
        part = normalise(
            values * selected.to(values.dtype) * batch.weight,
            normaliser=term.normaliser,
            batch=batch,
            total=total,
            max_length=plan.max_length,
        )
        weight = term_weight(term, plan, totals)
        loss = loss + weight * part
        _add(sums, f"loss/{term.name}", weight * float(part.detach()))
    _measure(sums, context)
    return loss


def _count_clipped(sums: dict[str, float], coefficient: Tensor, selected: Tensor, batch: TokenBatch) -> None:
    """Sampled tokens that have an advantage and yet no gradient: clipped, whatever the method's range is."""
    clipped = selected & (coefficient == 0)
    _add(sums, "clip_low", float((clipped & (batch.advantage < 0)).sum()))
    _add(sums, "clip_high", float((clipped & (batch.advantage > 0)).sum()))


def _measure(sums: dict[str, float], context: Context) -> None:
    """Sums over tokens of what is watched every step; divided by counts in ``_report``. Tokens of the expert
    apart."""
    batch = context.batch
    for name, mask in (("", ~batch.is_expert), ("expert/", batch.is_expert)):
        _add(sums, f"{name}tokens", float(mask.sum()))
        _add(sums, f"{name}entropy", float(context.entropy[mask].sum()))
        _add(sums, f"{name}nll", -float(context.policy_logprobs[mask].sum()))
    sampled = fresh(batch)
    if bool(sampled.any()):
        log_ratio = (context.policy_logprobs - context.proximal_logprobs)[sampled]
        _add(sums, "sampled", float(sampled.sum()))
        _add(sums, "approx_kl", float((log_ratio.exp() - 1 - log_ratio).sum()))
        # The policy that sampled is the proximal one: how far do engine and trainer disagree about the same
        # tokens?
        gap = (context.proximal_logprobs - batch.behavior_logprobs)[sampled]
        _add(sums, "gap", float(gap.abs().sum()))
        _add(sums, "gap_kl", float((gap.exp() - 1 - gap).sum()))
        sums["max_gap"] = max(sums.get("max_gap", 0.0), float(gap.abs().max()))


def _add(sums: dict[str, float], key: str, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value


def _report(plan: StepPlan, totals: BatchTotals, sums: dict[str, float], norm: float) -> StepReport:
    keys = ["sampled", "clip_low", "clip_high", "approx_kl", "gap", "gap_kl"]
    keys += [f"{who}{what}" for who in ("", "expert/") for what in ("tokens", "entropy", "nll")]
    keys += [f"loss/{t.name}" for t in plan.terms]
    total = dict(zip(keys, plan.ranks.sum([sums.get(k, 0.0) for k in keys]), strict=True))
    loss = math.fsum(total[f"loss/{term.name}"] for term in plan.terms)
    # Where nothing was sampled the expert's tokens are all there is, and need no name of their own.
    who = "" if total["tokens"] else "expert/"
    metrics = {what: total[f"{who}{what}"] / max(1.0, total[f"{who}tokens"]) for what in ("entropy", "nll")}
    if total["tokens"] and total["expert/tokens"]:
        num = total["expert/tokens"]
        metrics |= {"expert/nll": total["expert/nll"] / num, "expert/entropy": total["expert/entropy"] / num}
        metrics["expert/share"] = num / (num + total["tokens"])
    if len(plan.terms) > 1:
        metrics |= {f"loss/{term.name}": total[f"loss/{term.name}"] for term in plan.terms}
    if total["sampled"]:
        metrics |= {
            "clip_ratio/low": total["clip_low"] / total["sampled"],
            "clip_ratio/high": total["clip_high"] / total["sampled"],
            "approx_kl": total["approx_kl"] / total["sampled"],
            "sampling/logprob_difference_mean": total["gap"] / total["sampled"],
            "sampling/logprob_difference_max": plan.ranks.max([sums.get("max_gap", 0.0)])[0],
            "sampling/kl": total["gap_kl"] / total["sampled"],
        }
    return StepReport(
        step=plan.step,
        loss=loss,
        grad_norm=norm,
        learning_rate=plan.learning_rate,
        num_tokens=totals.num_tokens,
        metrics=metrics,
        timings={},
    )


@torch.no_grad()
def fill_proximal(policy: Policy, batches: Sequence[TokenBatch], plan: StepPlan) -> list[TokenBatch]:
    """The proximal pass: the same batches with the log-probabilities and entropies of the policy as it is
    now."""
    return [
        replace(batch, proximal_logprobs=logprobs, proximal_entropy=entropy)
        for batch, logprobs, entropy in _passed(policy, batches, plan, "proximal")
    ]


@torch.no_grad()
def fill_reference(reference: Policy, batches: Sequence[TokenBatch], plan: StepPlan) -> list[TokenBatch]:
    """The same batches with the log-probabilities of the frozen reference policy."""
    return [
        replace(batch, reference_logprobs=logprobs)
        for batch, logprobs, _ in _passed(reference, batches, plan, "reference")
    ]


def _passed(
    policy: Policy, batches: Sequence[TokenBatch], plan: StepPlan, whose: str
) -> list[tuple[TokenBatch, Tensor, Tensor]]:
    found = []
    for index, batch in enumerate(_levelled(batches, plan.ranks, policy)):
        plan.check_stop()
        logprobs, entropy = policy(batch, plan.temperature)
        _require_finite({f"{whose} log-probabilities": logprobs}, batch, plan, f"micro-batch {index}")
        if index < len(batches):
            found.append((batch, logprobs.detach(), entropy.detach()))
    reshard(policy)
    return found


def _levelled(batches: Sequence[TokenBatch], ranks: Ranks, policy: Policy) -> list[TokenBatch]:
    """As many micro-batches as the busiest rank has: collectives inside the model need partners on every
    rank."""
    most = int(ranks.max([float(len(batches))])[0])
    if len(batches) == most:
        return list(batches)
    parameter = next(policy.parameters())
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return [*batches, *[dummy_batch(wide, parameter.device)] * (most - len(batches))]


def _require_finite(tensors: Mapping[str, Tensor], batch: TokenBatch, plan: StepPlan, where: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            path = _rescue([batch], plan)
            raise NonFiniteError(f"step {plan.step}, {where}: {name} is not finite{path}")


def _rescue(batches: Sequence[TokenBatch], plan: StepPlan) -> str:
    """Save the batch for whoever has to find out; the message's tail says where."""
    if plan.rescue_folder is None:
        return ""
    from safetensors.torch import save_file

    plan.rescue_folder.mkdir(parents=True, exist_ok=True)
    path = plan.rescue_folder / f"nonfinite-step-{plan.step:08d}-rank-{plan.ranks.rank}.safetensors"
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, batch in enumerate(batches)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path)
    return f"; the batch is saved in {path}"
