"""Attention without padding: one flat row of tokens, and a ``Layout`` that says who sees whom.

Every decoder of transformers that looks its attention up in ``ALL_ATTENTION_FUNCTIONS`` passes keyword arguments
through to it. truestep registers one such function and hands it a layout: packed training rows (with a prompt that the
samples of a group share), prefill and decoding are three layouts of the same forward pass.

Shapes: N flat tokens, H query heads, K key-value heads, D head size, L tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from truestep.records import Segment

IMPLEMENTATION = "truestep"


class Layout(Protocol):
    """Who sees whom in one forward pass over N flat tokens."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Shapes: query [H, N, D], key and value [K, N, D] → [N, H, D]."""
        ...


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every attention layer; without a layout, plain scaled dot product."""
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unsupported = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unsupported or query.shape[0] != 1:
        raise NotImplementedError(f"packed attention does not support {unsupported or 'a batch'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = kwargs.get("sliding_window")
    out = layout.attend(int(module.layer_idx), query[0], key[0], value[0], scale, window)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


def register() -> None:
    """Make ``attn_implementation="truestep"`` known to transformers (idempotent)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        """No mask for packed rows (the layout is the mask); sdpa's own for a padded batch from elsewhere."""
        return None if kwargs.get("attention_mask") is None and kwargs.get("q_length") == kwargs.get("kv_length") else (
            sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        )  # fmt: skip

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, mask)


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Boolean mask [queries, keys]: True where the query sees the key (causal, and within the window if any)."""
    distance = query_positions[:, None] - key_positions[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class PackedLayout:
    """Segments that see themselves causally and their shared prefix wholly; nothing else."""

    def __init__(self, segments: Sequence[Segment], position_ids: Tensor) -> None:
        self.segments = segments
        self.position_ids = position_ids
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        del layer
        repeats = query.shape[0] // key.shape[0]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=0), value.repeat_interleave(repeats, dim=0)
        pieces = []
        for i, s in enumerate(self.segments):
            k, v = key[:, s.start : s.stop], value[:, s.start : s.stop]
            if s.prefix_stop > s.prefix_start:
                k = torch.cat([key[:, s.prefix_start : s.prefix_stop], k], dim=1)
                v = torch.cat([value[:, s.prefix_start : s.prefix_stop], v], dim=1)
            mask = self._mask(i, s, window)
            out = scaled_dot_product_attention(
                query[:, s.start : s.stop].unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0),
                attn_mask=mask, is_causal=mask is None, scale=scaling,
            )  # fmt: skip
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    def _mask(self, index: int, s: Segment, window: int | None) -> Tensor | None:
        """None for the plain causal case, which has a faster kernel."""
        num_prefix, length = s.prefix_stop - s.prefix_start, s.stop - s.start
        if num_prefix == 0 and (window is None or length <= window):
            return None
        if (index, window) not in self._masks:
            own = self.position_ids[s.start : s.stop]
            keys = torch.cat([self.position_ids[s.prefix_start : s.prefix_stop], own])
            self._masks[index, window] = visible(own, keys, window)
        return self._masks[index, window]


def count_pairs(segments: Sequence[Segment]) -> int:
    """Query-key pairs of a packed row: the work of attention."""
    total = 0
    for s in segments:
        length = s.stop - s.start
        total += length * (length + 1) // 2 + length * (s.prefix_stop - s.prefix_start)
    return total
