"""The loss and the textbook update of an optimizer step, in float64.

The loss is computed token by token, with each sequence run separately and the batch in one graph. The update
takes tensors by name; it consists of one clip and one step, and has no hidden state.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from truestep.records import Origin, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.testing.reference.rows import ROWS, named_part
from truestep.testing.reference.surrogate import ScoredSequence

LogprobRows = Sequence[Sequence[float] | None]  # one row per sequence, one number per trained token
Microbatches = Sequence[tuple[Sequence[int], float]]  # (indices of its sequences, its weight)
Tensors = Mapping[str, Tensor]  # by parameter name


class exact_float64(TorchFunctionMode):  # a context manager; torch offers modes by inheritance only
    """A context in which every request for float32 gives float64.

    Model code casts norms, softmaxes and losses to float32, whatever the type of the weights. Without this
    context, a float64 model is accurate only to 1e-7, and its rounding is not smooth.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide_args = [torch.float64 if a is torch.float32 else a for a in args]
        wide_kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide_args, **wide_kwargs)


def trained_tokens(
    model: nn.Module, sequence: TrainSequence, temperature: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Return log-probabilities of a sequence's trained tokens and entropies of their distributions, with
    gradient. The sequence is run separately, without padding and dropout. Raises ValueError if the model is
    not in float64.

    Equation: log softmax(logits[t-1] / temperature)[token t] for every trained t; −Σ_v p_v log p_v.
    """
    narrow = [name for name, p in model.named_parameters() if p.dtype is not torch.float64]
    if narrow:
        raise ValueError(f"{narrow[0]} is not in float64, as it must be; call model.double() on a copy")
    row = torch.tensor(sequence.token_ids, dtype=torch.int64, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with exact_float64():
            logits = model(input_ids=row[None], use_cache=False).logits[0]
    finally:
        model.train(was_training)
    logprobs, entropies = [], []
    for t in range(1, len(sequence.token_ids)):
        if sequence.origin[t] is not Origin.CONTEXT:
            every = torch.log_softmax(logits[t - 1] / temperature, dim=-1)
            logprobs.append(every[sequence.token_ids[t]])
            entropies.append(-(torch.exp(every) * every).sum())
    return logprobs, entropies


def frozen_logprobs(
    model: nn.Module, sequences: Sequence[TrainSequence], temperature: float = 1.0
) -> list[list[float]]:
    """Return log-probabilities as plain numbers, for the proximal policy of later updates or a KL anchor."""
    with torch.no_grad():
        return [[logprob.item() for logprob in trained_tokens(model, s, temperature)[0]] for s in sequences]


def score(
    policy: nn.Module, proximal: nn.Module, reference: nn.Module, sequences: Sequence[TrainSequence]
) -> list[ScoredSequence]:
    """Return the sequences with log-probabilities of three models; those of the policy keep their graph."""
    found = []
    for sequence in sequences:
        logprobs, entropies = trained_tokens(policy, sequence)
        with torch.no_grad():
            old, old_entropies = trained_tokens(proximal, sequence)
            anchor, _ = trained_tokens(reference, sequence)
        frozen = {"proximal": old, "reference": anchor, "proximal_entropies": old_entropies}
        numbers = {name: [x.item() for x in tensors] for name, tensors in frozen.items()}
        found.append(ScoredSequence(sequence=sequence, policy=logprobs, entropies=entropies, **numbers))
    return found


def denominator(
    sequence: TrainSequence,
    sequences: Sequence[TrainSequence],
    normaliser: str,
    max_length: int | None = None,
) -> float:
    """Return the divisor for a token of ``sequence``. All ``sequences`` are counted, whatever their weight.

    Equation: Σ|y| (tok); |y|·N_seq (seq); N_seq (sum); N_seq·L with L = ``max_length`` (drg).
    """
    if normaliser == "drg" and max_length is None:
        raise ValueError("the drg normaliser divides by a fixed length; pass max_length")
    known = {
        "tok": sum(s.num_trained for s in sequences),
        "seq": sequence.num_trained * len(sequences),
        "sum": len(sequences),
        "drg": len(sequences) * (max_length or 0),
    }
    if normaliser not in known:
        raise ValueError(f"unknown normaliser {normaliser!r}; use tok, seq, sum or drg")
    return known[normaliser]


def drop_equal_groups(scored: Sequence[ScoredSequence]) -> list[ScoredSequence]:
    """Drop the groups whose rewards are all the same; their tokens are not counted either. Source: DAPO."""
    seen = {(item.sequence.group, item.sequence.reward) for item in scored}
    different = Counter(group for group, _ in seen)
    return [item for item in scored if different[item.sequence.group] > 1]


def group_advantages(rewards: Sequence[float], kind: str) -> list[float]:
    """Return the advantages of a group's members; 0 for a group of one, which has nothing to compare with.

    Equation: R−mean (mean); (R−mean)/(std+1e-6), std with n−1 (mean_std); R − mean of the others (rloo).
    """
    if kind not in ("mean", "mean_std", "rloo"):
        raise ValueError(f"unknown advantage {kind!r}; use mean, mean_std or rloo")
    if len(rewards) == 1:
        return [0.0]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    if kind == "rloo":
        others = [[*rewards[:i], *rewards[i + 1 :]] for i in range(len(rewards))]
        return [reward - sum(rest) / len(rest) for reward, rest in zip(rewards, others, strict=True)]
    return [(reward - mean) / (std + 1e-6 if kind == "mean_std" else 1.0) for reward in rewards]


def weigh_microbatches(sequences: Sequence[TrainSequence], microbatches: Microbatches) -> list[TrainSequence]:
    """Return the sequences. Their weights are multiplied by those of ``microbatches``, if there are any.

    Raises: ValueError if a sequence is in no micro-batch or in two.
    """
    if not microbatches:
        return list(sequences)
    listed = sorted(i for indices, _ in microbatches for i in indices)
    if listed != list(range(len(sequences))):
        raise ValueError(f"micro-batches list sequences {listed}; list each of 0..{len(sequences) - 1} once")
    weight_of = {i: weight for indices, weight in microbatches for i in indices}
    return [replace(s, weight=s.weight * weight_of[i]) for i, s in enumerate(sequences)]


def reference_loss(
    model: nn.Module,
    sequences: Sequence[TrainSequence],
    proximal: LogprobRows | None = None,
    *,
    method: str = "sft",
    temperature: float = 1.0,
    max_length: int | None = None,
    options: Mapping[str, Any] | None = None,
    microbatches: Microbatches = (),
) -> Tensor:
    """Return the loss of one optimizer step over the whole batch, with its graph.

    If a row of ``proximal`` is None, the policy's own row is used, detached, as in the first update after a
    rollout. ``options`` overrides the method's numbers and its ``normaliser``. Weights of sequences and
    micro-batches multiply only numerators.
    Equation: Σ_sequences weight Σ_tokens surrogate / denominator.
    """
    part, numbers = named_part(method), dict(options or {})
    normaliser = numbers.pop("normaliser", part.normaliser)
    scored = []
    for i, sequence in enumerate(weigh_microbatches(sequences, microbatches)):
        policy, _ = trained_tokens(model, sequence, temperature)
        given = None if proximal is None else proximal[i]
        old = [logprob.item() for logprob in policy] if given is None else given
        scored.append(ScoredSequence(sequence=sequence, policy=policy, proximal=old))
    if ROWS[method].drop_equal_groups:
        scored = drop_equal_groups(scored)

    kept = [item.sequence for item in scored]
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for item in scored:
        losses = part.losses(item, **numbers)
        count = denominator(item.sequence, kept, normaliser, max_length) if losses else 1.0
        for loss in losses:
            total = total + item.sequence.weight * loss / count
    return total


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of ``loss`` by parameter name; parameters that are not in ``loss`` get zeros."""
    parameters = dict(model.named_parameters())
    if not loss.requires_grad:  # every sequence was dropped
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    parts = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, parts, strict=True))


def reference_gradient(
    model: nn.Module, sequences: Sequence[TrainSequence], proximal: LogprobRows | None = None, **how: Any
) -> dict[str, Tensor]:
    """Return Σ_i w_i·g_i, where g_i is the gradient of micro-batch i's share of ``reference_loss(**how)``."""
    return gradient(model, reference_loss(model, sequences, proximal, **how))


def per_microbatch_gradients(
    model: nn.Module,
    sequences: Sequence[TrainSequence],
    indices_per_microbatch: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Return for each micro-batch the gradient SUM of −log π over its trained tokens, and their number.

    The correct SFT gradient of the step is the sum of these gradients divided by the sum of these numbers.
    """
    sums, counts = [], []
    for indices in indices_per_microbatch:
        loss = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        for logprob in (x for i in indices for x in trained_tokens(model, sequences[i], temperature)[0]):
            loss = loss - logprob
        sums.append(gradient(model, loss))
        counts.append(sum(sequences[i].num_trained for i in indices))
    return sums, counts


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """The running means of g and g², and how many steps they have seen."""

    step: int
    first: Tensors
    second: Tensors


@dataclass(frozen=True)
class StepResult:
    """The result of one step: loss, norm and gradient before clipping, and the parameters after the step."""

    loss: float
    grad_norm: float
    learning_rate: float
    gradient: Tensors
    parameters: Tensors


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str = "constant",
    warmup_fraction: float = 0.0,
    min_lr_ratio: float = 0.1,
    decay_fraction: float = 0.1,
) -> float:
    """Return the learning rate of ``step``, which is 0 … total_steps − 1.

    Equation: W = round(warmup_fraction · T). If s < W, the rate is peak·(s+1)/W; otherwise, it is peak if
    the schedule is constant, and floor + (peak−floor)·½(1+cos(π(s−W)/(T−W))) if it is cosine, where floor is
    min_lr_ratio·peak. Steps W−1 and W have the peak rate; only step T, one after the last, would have floor.
    linear: the point at s on the line from (W, peak) to (T, floor). wsd: the same line from (T−D, peak), where
    D = round(decay_fraction·T), and peak before it.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is not one of 0..{total_steps - 1}")
    warmup_steps = round(warmup_fraction * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    floor = min_lr_ratio * peak
    if schedule in ("linear", "wsd"):
        start = warmup_steps if schedule == "linear" else total_steps - round(decay_fraction * total_steps)
        return min(peak, peak - (peak - floor) / (total_steps - start) * (step - start))
    if schedule != "cosine":
        raise ValueError(f"unknown schedule {schedule!r}; use constant, cosine, linear or wsd")
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_by_global_norm(gradients: Tensors, max_norm: float) -> tuple[dict[str, Tensor], float]:
    """Return clipped gradients and the norm of all tensors before clipping. ``max_norm`` 0 means no clip.

    Equation: g · min(1, max_norm / (‖g‖ + 1e-6)).
    """
    norm = math.sqrt(sum((g * g).sum().item() for g in gradients.values()))
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    return {name: g * factor for name, g in gradients.items()}, norm


def sgd(parameters: Tensors, gradients: Tensors, lr: float) -> dict[str, Tensor]:
    """Equation: θ − lr·g."""
    return {name: theta - lr * gradients[name] for name, theta in parameters.items()}


def adamw(
    parameters: Tensors, gradients: Tensors, state: AdamState | None, lr: float, settings: OptimizerSettings
) -> tuple[dict[str, Tensor], AdamState]:
    """Take an AdamW step, which is the same for every tensor. ``state`` is None before the first step.

    Equation: m ← β1·m + (1−β1)g, v ← β2·v + (1−β2)g², θ ← θ − lr·wd·θ − lr·m̂/(√v̂+ε); ^ divides by 1−β^t.
    Source: arXiv 1711.05101, algorithm 2.
    """
    zeros = {name: torch.zeros_like(theta) for name, theta in parameters.items()}
    before = state or AdamState(step=0, first=zeros, second=zeros)
    (beta1, beta2), t = settings.betas, before.step + 1
    moved, first, second = {}, {}, {}
    for name, theta in parameters.items():
        g = gradients[name]
        m = beta1 * before.first[name] + (1 - beta1) * g
        v = beta2 * before.second[name] + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        update = lr * m_hat / (torch.sqrt(v_hat) + settings.eps)
        moved[name] = theta - lr * settings.weight_decay * theta - update
        first[name], second[name] = m, v
    return moved, AdamState(step=t, first=first, second=second)


def reference_step(
    parameters: Tensors, gradients: Tensors, state: AdamState | None, lr: float, settings: OptimizerSettings
) -> tuple[dict[str, Tensor], AdamState | None, float]:
    """Clip and update. Return the new parameters, new state (None for sgd) and the norm before clipping."""
    clipped, norm = clip_by_global_norm(gradients, settings.max_grad_norm)
    if settings.kind == "sgd":
        return sgd(parameters, clipped, lr), None, norm
    moved, after = adamw(parameters, clipped, state, lr, settings)
    return moved, after, norm


def reference_steps(
    model: nn.Module,
    losses: Sequence[Callable[[nn.Module], Tensor]],
    settings: OptimizerSettings,
    total_steps: int,
) -> list[StepResult]:
    """Run steps 0, 1, … of a stage of ``total_steps`` on a model copy, with one loss function per step.

    Each function is called with the copy at that step, e.g. ``lambda m: reference_loss(m, sequences)``.
    """
    model = copy.deepcopy(model)
    state: AdamState | None = None
    results = []
    for step, loss_of in enumerate(losses):
        loss = loss_of(model)
        gradients = gradient(model, loss)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        how = (
            settings.lr,
            settings.schedule,
            settings.warmup_fraction,
            settings.min_lr_ratio,
            settings.decay_fraction,
        )
        lr = learning_rate(step, total_steps, *how)
        moved, state, norm = reference_step(parameters, gradients, state, lr, settings)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(moved[name])
        results.append(StepResult(loss.item(), norm, lr, gradients, moved))
    return results
