"""Reads the weights of trained tokens where the logits never reach autograd, as in a fused or chunked loss.

There, the gradient of the last hidden state h_t is w·Wᵀ(p − e_y) for the weight W of the head, p = softmax(W h_t)
and the target y. So each row is compared with the directions Wᵀ(p − e_y) of the possible targets, and the best fit
gives y, w and a residual. Shapes: B rows of T tokens, d hidden entries, N trained positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from truestep.guard.survive import Survive
from truestep.guard.tokens import ENTRIES, SHIFTS, Batch, Forward, Tokens, logp_of, next_values, targets_of

TINY = 1e-30


def last_hidden(output: Any, otherwise: Tensor | None) -> Tensor | None:
    """Return the last hidden state [B, T, d] in a backbone's output, if there is one."""
    found = getattr(output, "last_hidden_state", None)
    return (
        found if isinstance(found, Tensor) and found.dim() == 3 and found.is_floating_point() else otherwise
    )


def _fits(hidden: Tensor, head: nn.Module | None, batch: Batch) -> bool:
    """Return whether the weights can be read: the tokens are known, and this rank has the whole head."""
    weight = None if head is None else head._parameters.get("weight")
    return (
        isinstance(head, nn.Linear)
        and isinstance(weight, Tensor)
        and not (hasattr(weight, "ds_id") or hasattr(weight, "placements"))
        and batch.ids is not None
        and hidden.shape[:2] == batch.ids.shape
        and hidden.shape[-1] == weight.shape[-1]
    )


def watch_hidden(micro: Any, hidden: Tensor, head: Any, stop_ids: Any, survive: Survive) -> None:
    """Read the tokens' weights from the gradient of the hidden state, unless the logits' gradient comes first."""
    if not hidden.requires_grad or not _fits(hidden, head, micro.batch):
        return
    values = hidden.detach()  # the same memory, which the head's backward pass needs as well

    def judge(delta: Tensor | None) -> None:
        backward = torch._C._current_graph_task_id()
        if delta is None or backward in micro.told:
            return
        with survive:
            micro.told[backward] = tokens_of(values, delta, head, micro.batch, stop_ids)

    hidden.register_hook(judge)


@torch.no_grad()
def tokens_of(
    hidden: Tensor, delta: Tensor, head: nn.Linear, batch: Batch, stop_ids: tuple[int, ...]
) -> Tokens:
    """Return what the gradient ``delta`` [B, T, d] of the hidden state [B, T, d] says."""
    shape = (hidden.shape[0], hidden.shape[1])
    count = shape[0] * shape[1]
    assert batch.ids is not None
    targets = targets_of(batch.ids, shape[1])
    flat, slopes, wanted = hidden.flatten(0, 1), delta.flatten(0, 1), targets.flatten(1).T
    asked = (slopes != 0).any(-1)
    if batch.labels is not None:
        asked |= targets[0].ne(-1).flatten() & next_values(batch.labels, shape[1], -100).ne(-100).flatten()
    logp = torch.full((count, len(SHIFTS)), torch.nan, device=hidden.device)
    top, top_logp = torch.zeros_like(wanted[:, 0]), torch.zeros_like(logp[:, 0])
    target = torch.full_like(top, -2)
    sums = torch.zeros(3, count, dtype=torch.float64, device=hidden.device)  # own, others, at the top
    with torch.autocast(hidden.device.type, enabled=False):
        for part in asked.nonzero()[:, 0].split(max(1, ENTRIES // head.weight.shape[0])):
            logits = nn.functional.linear(flat[part], head.weight, head.bias).float()
            logp[part], top[part], top_logp[part] = logp_of(logits, wanted[part])
            mean = logits.softmax(-1).to(head.weight.dtype) @ head.weight
            ways = mean.double()[:, None] - head.weight[wanted[part].clamp(min=0)].double()
            best, size, missed = _fit(slopes[part].double(), ways, wanted[part] >= 0)
            target[part] = wanted[part].gather(1, best)[:, 0]
            others = size * -torch.expm1(logp[part].gather(1, best)[:, 0].double())
            # What the best fit misses counts as a difference of the form.
            sums[:, part] = torch.stack(
                [-others * (1 + missed), others, size * top_logp[part].double().exp()]
            )
    at_top = (top.reshape(shape), top_logp.reshape(shape))
    seen = Forward(batch, shape, targets, logp.T.reshape(-1, *shape), *at_top)
    return seen.tokens([one.reshape(shape) for one in (target, *sums)], stop_ids)


def _fit(slopes: Tensor, ways: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which of the directions [N, 3, d] fits the gradient [N, d] best, as [N, 1], and its weight and the
    relative residual [N]."""
    squares = ways.square().sum(-1).clamp(min=TINY)
    sizes = (slopes[:, None] * ways).sum(-1) / squares
    length = slopes.square().sum(-1, keepdim=True).clamp(min=TINY)
    missed = ((slopes[:, None] - sizes[..., None] * ways).square().sum(-1) / length).sqrt()
    best = torch.where(exists, missed, torch.inf).argmin(-1, keepdim=True)
    return best, sizes.gather(1, best)[:, 0], missed.gather(1, best)[:, 0]
