"""The chunked output layer, which computes differentiable log-probabilities and entropies at a temperature.

The logits of a whole micro-batch never exist at once. Each chunk is computed, reduced and dropped, and is
computed again in the backward pass. Softmax arithmetic is in ``promote_types(dtype, float32)``, so float64
stays float64.

Shapes: M trained tokens, C tokens in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truestep.device import linear

CHUNK_ELEMENTS = 1 << 23  # logits in memory at once: 32 MiB in float32
Adapter = tuple[
    Tensor, Tensor
]  # of the output layer: s·(x·Aᵀ) [M, r] and B [V, r], whose product is added to the logits


def _chunks(num_tokens: int, vocabulary: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


def _scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, adapter: Adapter | None
) -> Tensor:
    """Compute the logits [C, V] at a temperature, in at least float32."""
    logits = linear(hidden, weight, bias)
    if adapter is not None:
        logits = logits + torch.nn.functional.linear(*adapter)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits.div_(temperature)


class _ChunkedHead(torch.autograd.Function):
    """log softmax(hidden Wᵀ / τ) gathered at the targets, and the entropy of the same distribution."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        reduced: Tensor | None, up: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=wide)
        entropy = torch.empty_like(logprobs)
        normalizer = torch.empty_like(logprobs)
        for a, b in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _scaled_logits(hidden[a:b], weight, bias, temperature, _part(reduced, up, a, b))
            at_target = logits.gather(1, targets[a:b, None])[:, 0]
            # The normaliser and the entropy H = log Σe^z − Σ p z share one exponentiation.
            top = logits.amax(1, keepdim=True)
            shifted = logits.sub_(top)
            exponent = shifted.exp()
            total = exponent.sum(1)
            mean = torch.linalg.vecdot(exponent, shifted) / total
            log_total = total.log()
            normalizer[a:b] = top[:, 0] + log_total
            logprobs[a:b] = at_target - normalizer[a:b]
            entropy[a:b] = log_total - mean
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy, reduced, up)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, bias, targets, normalizer, entropy, reduced, up = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        needs_bias = bias is not None and ctx.needs_input_grad[2]
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        grad_reduced = torch.empty_like(reduced) if ctx.needs_input_grad[5] else None
        grad_up = torch.zeros_like(up, dtype=wide) if ctx.needs_input_grad[6] else None
        for a, b in _chunks(hidden.shape[0], weight.shape[0]):
            adapter = _part(reduced, up, a, b)
            logp = _scaled_logits(hidden[a:b], weight, bias, ctx.temperature, adapter)
            logp = logp.sub_(normalizer[a:b, None])
            probability = logp.exp()
            # d logp_y / dz = 1[y] − p ;  dH / dz = −p (log p + H)
            scale = torch.zeros_like(normalizer[a:b]) if grad_logprobs is None else -grad_logprobs[a:b]
            factor = scale[:, None]
            if grad_entropy is not None:
                factor = factor - grad_entropy[a:b, None] * (logp + entropy[a:b, None])
            grad = probability.mul_(factor)
            grad.scatter_add_(1, targets[a:b, None], -scale[:, None])
            if ctx.temperature != 1.0:
                grad = grad.div_(ctx.temperature)
            grad_logits = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[a:b] = grad_logits @ weight
            if grad_weight is not None:
                if grad_logits.dtype == wide:
                    grad_weight.addmm_(grad_logits.T, hidden[a:b])
                else:
                    grad_weight += grad_logits.T @ hidden[a:b]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            if grad_reduced is not None:
                grad_reduced[a:b] = grad_logits @ up
            if grad_up is not None:
                grad_up += grad_logits.T @ reduced[a:b]
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        grad_up = None if grad_up is None else grad_up.to(up.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, grad_reduced, grad_up


def _part(reduced: Tensor | None, up: Tensor | None, start: int, stop: int) -> Adapter | None:
    return None if reduced is None or up is None else (reduced[start:stop], up)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    adapter: Adapter | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the log-probabilities [M] of the targets and the entropies [M], both differentiable.

    Shapes: hidden [M, D], weight [V, D], bias [V] or None, targets [M]. Units: nats.
    Held by: tests/numerics/test_chunked_head.py"""
    if hidden.shape[0] == 0:  # an all-masked micro-batch: an exact zero that still has a graph
        zero = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).sum(1)
        # The graph includes the head, because FSDP reduces whatever has a gradient, so all ranks must agree.
        zero = zero + weight[:0].sum() + (0 if bias is None else bias[:0].sum())
        zero = zero + (0 if adapter is None else adapter[0].sum(1) + adapter[1][:0].sum())
        return zero, zero
    added = adapter or (None, None)
    out: tuple[Tensor, Tensor] = _ChunkedHead.apply(hidden, weight, bias, targets, temperature, *added)
    return out


def logprobs_from_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the same as ``chunked_logprobs``, for logits [M, V] that are more than a matrix product."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = torch.log_softmax(logits.to(wide) / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
