"""Attention over one flat row of tokens, without padding. A ``Layout`` says which tokens see which others.

Every decoder in transformers that looks up its attention function in ``ALL_ATTENTION_FUNCTIONS`` passes its
keyword arguments on to that function. truestep registers one function, which takes a layout. Packed training
sequences (with a shared prompt), prefill and decoding are three layouts of the same forward pass.

Shapes: N flat tokens, H query heads, K key-value heads, D head size, L tokens of a segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from truestep.records import Segment

IMPLEMENTATION = "truestep"


class Layout(Protocol):
    """A rule that says which tokens see which others in one forward pass over N flat tokens."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Return the attention. Shapes: query [H, N, D], key and value [K, N, D] → [N, H, D]."""


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
    """Compute attention. transformers calls this function in every layer. Without a layout, it uses sdpa."""
    window = kwargs.get("sliding_window")
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is None and window is not None and query.shape[2] == key.shape[2] > window:
            positions = torch.arange(query.shape[2], device=query.device)
            # The mask that ``register`` leaves out.
            attention_mask = visible(positions, positions, window)[None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unsupported = [k for k in ("softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unsupported or query.shape[0] != 1:
        raise NotImplementedError(f"packed attention does not support {unsupported or 'a batch'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layout.attend(int(module.layer_idx), query[0], key[0], value[0], scale, window)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


def register() -> None:
    """Register ``attn_implementation="truestep"`` with transformers. Further calls have no effect."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        """Return sdpa's mask for a padded batch, and no mask for packed rows, which have a layout instead."""
        if kwargs.get("attention_mask") is None and kwargs.get("q_length") == kwargs.get("kv_length"):
            return None
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    # Not compiled, because the layer's number would be a constant: every layer would be compiled separately, up to
    # the compiler's limit, and the rest would run uncompiled.
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, torch.compiler.disable(attention_forward))
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, mask)


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Return the mask [queries, keys], True if a query sees a key (causal, and within the window if any)."""
    queries, keys = (
        query_positions[:, None],
        key_positions[None, :],
    )  # not subtracted: int64 takes 8 times the mask's memory
    return queries >= keys if window is None else (queries >= keys) & (queries - window < keys)


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar size, padded into one batch. ``mask`` is None if the attention is purely causal."""

    queries: Tensor  # S L, flat indices (padding points at token 0)
    keys: Tensor  # S (prefix + L)
    mask: Tensor | None  # S 1 L (prefix + L)


class PackedLayout:
    """A layout in which each segment attends causally to itself and fully to its shared prefix, and to
    nothing else. Segments of similar size run as one padded batch, with one kernel call for the batch."""

    MOST_PADDING = 1.25  # largest ratio of padded to real work in a bucket
    FREE_PAIRS = 1 << 14  # below this much work, a kernel call costs more than padding

    def __init__(self, segments: Sequence[Segment], position_ids: Tensor) -> None:
        self.segments, self.position_ids = segments, position_ids
        self._plans: dict[int | None, tuple[list[_Bucket], Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        del layer
        buckets, order = self._plan(window)
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)  # N H D
        pieces = []
        for bucket in buckets:
            q = query[bucket.queries].transpose(1, 2)  # S H L D
            k, v = key[bucket.keys].transpose(1, 2), value[bucket.keys].transpose(1, 2)
            pieces.append(grouped_attention(q, k, v, bucket.mask, scaling).transpose(1, 2).flatten(0, 1))
        return torch.cat(pieces)[order]

    def _plan(self, window: int | None) -> tuple[list[_Bucket], Tensor]:
        """Return the buckets, and each token's place in their joined outputs, once for all layers."""
        if window not in self._plans:
            groups, base = self._group(window), 0
            buckets = [self._bucket(group, window) for group in groups]
            order = torch.empty_like(self.position_ids, dtype=torch.int64)
            for group, bucket in zip(groups, buckets, strict=True):
                for row, s in enumerate(group):
                    first, length = base + row * bucket.queries.shape[1], s.stop - s.start
                    order[s.start : s.stop] = torch.arange(first, first + length, device=order.device)
                base += bucket.queries.numel()
            self._plans[window] = (buckets, order)
        return self._plans[window]

    def _group(self, window: int | None) -> list[list[Segment]]:
        """Group segments by size. A new group starts if padding would cost more than it saves."""

        def needs_mask(s: Segment) -> bool:
            return s.prefix_stop > s.prefix_start or (window is not None and s.stop - s.start > window)

        groups: list[list[Segment]] = []
        real, longest, widest, masked = 0, 0, 0, False
        for s in sorted(self.segments, key=lambda s: (needs_mask(s), _num_keys(s), s.stop - s.start)):
            length, keys = s.stop - s.start, _num_keys(s)
            if groups and masked == needs_mask(s):
                padded = (len(groups[-1]) + 1) * max(longest, length) * max(widest, keys)
                if padded <= max(self.FREE_PAIRS, self.MOST_PADDING * (real + length * keys)):
                    groups[-1].append(s)
                    real, longest, widest = real + length * keys, max(longest, length), max(widest, keys)
                    continue
            groups.append([s])
            real, longest, widest, masked = length * keys, length, keys, needs_mask(s)
        return groups

    def _bucket(self, group: Sequence[Segment], window: int | None) -> _Bucket:
        device = self.position_ids.device
        longest, widest = max(s.stop - s.start for s in group), max(_num_keys(s) for s in group)
        queries = torch.zeros(len(group), longest, dtype=torch.int64, device=device)
        keys = torch.zeros(len(group), widest, dtype=torch.int64, device=device)
        plain = all(s.prefix_stop == s.prefix_start for s in group) and (window is None or longest <= window)
        mask = None if plain else torch.zeros(len(group), longest, widest, dtype=torch.bool, device=device)
        if mask is not None:
            mask[:, :, 0] = True  # a padded query sees one token; otherwise its softmax would be NaN
        for row, s in enumerate(group):
            length, num_keys = s.stop - s.start, _num_keys(s)
            own = torch.arange(s.start, s.stop, device=device)
            seen = torch.cat([torch.arange(s.prefix_start, s.prefix_stop, device=device), own])
            queries[row, :length] = own
            keys[row, :num_keys] = seen
            if mask is not None:
                places = self.position_ids[own], self.position_ids[seen]
                mask[row, :length, :num_keys] = visible(*places, window)
        return _Bucket(queries, keys, None if mask is None else mask.unsqueeze(1))


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Return the attention of a padded batch, purely causal without a mask. Then the query heads of a key-value head
    become a batch entry with views of the same keys, so keys are not repeated. A mask would be copied for each of these
    entries, which takes more memory than the keys. ``enable_gqa`` is not used: PyTorch's kernel for CPUs adds up the
    keys' gradients over these heads in bfloat16.
    Shapes: query [S, H, L, D], key and value [S, K, W, D], mask [S, 1, L, W] → [S, H, L, D]."""
    (num, heads, length, size), (_, groups, width, _) = query.shape, key.shape
    is_causal = mask is None
    if groups < heads and mask is not None:
        key, value = (t.repeat_interleave(heads // groups, dim=1) for t in (key, value))
    elif groups < heads:
        query = query.reshape(num * groups, -1, length, size)
        key, value = (t.reshape(-1, 1, width, size).expand(-1, heads // groups, -1, -1) for t in (key, value))
    out = scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scaling)
    return out.reshape(num, heads, length, size)


def _num_keys(s: Segment) -> int:
    return s.stop - s.start + s.prefix_stop - s.prefix_start


def count_pairs(segments: Sequence[Segment]) -> int:
    """Return the number of query-key pairs in a packed row, which is the work of attention."""
    sizes = [(s.stop - s.start, s.prefix_stop - s.prefix_start) for s in segments]
    return sum(length * (length + 1) // 2 + length * prefix for length, prefix in sizes)
