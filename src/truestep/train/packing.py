"""Packs training sequences into micro-batches. Packing affects only memory and never changes the update.

The samples of a group share their prompt as a prefix, which goes through the model once per micro-batch that
contains any of them. A token is left out of the forward pass if its hidden state predicts no trained token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from truestep.records import TARGET_FIELDS, Origin, Segment, TokenBatch, TrainSequence

# Integers stay integers; every other column is a float of the policy's precision, at least float32.
_LONG = ("target_ids", "source_index", "sequence_index", "sequence_length")
INTEGERS = dict.fromkeys(_LONG, torch.int64) | {"origin": torch.int8, "policy_version": torch.int32}
INTEGERS["solved"] = torch.bool


@dataclass(frozen=True)
class _Tree:
    """Sequences with a common prefix. ``size`` is the number of tokens in the forward pass."""

    prefix: tuple[int, ...]
    members: tuple[int, ...]
    size: int


def pack(
    sequences: Sequence[TrainSequence],
    *,
    tokens_per_microbatch: int,
    share_prefix: bool = True,
    first_sequence: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[TokenBatch]:
    """Pack by first-fit decreasing into micro-batches of at most ``tokens_per_microbatch`` tokens each.

    Sequences are numbered from ``first_sequence``. The numbers must be unique within a step, even if a step
    makes several calls. Raises ValueError if one sequence is longer than a micro-batch."""
    trees = _trees(sequences, tokens_per_microbatch, share_prefix)
    bins: list[list[_Tree]] = []
    space: list[int] = []
    for tree in sorted(trees, key=lambda t: -t.size):  # sorted is stable: only the sequences matter
        slot = next((i for i, free in enumerate(space) if free >= tree.size), len(bins))
        if slot == len(bins):
            bins.append([])
            space.append(tokens_per_microbatch)
        bins[slot].append(tree)
        space[slot] -= tree.size
    return [_batch(trees, sequences, first_sequence, dtype, device) for trees in bins]


def last_needed(sequence: TrainSequence) -> int:
    """Return how many tokens the forward pass needs, which are all before the last trained token."""
    return max(i for i, origin in enumerate(sequence.origin) if origin is not Origin.CONTEXT)


def _trees(sequences: Sequence[TrainSequence], limit: int, share_prefix: bool) -> list[_Tree]:
    trees: list[_Tree] = []
    open_tree: dict[tuple[int, tuple[int, ...]], int] = {}  # (group, prefix) → the tree still being filled
    for index, sequence in enumerate(sequences):
        if not sequence.num_trained:
            continue  # all tokens are masked, so the sequence is in neither the numerator nor the totals
        prefix = sequence.token_ids[: sequence.num_prefix_tokens] if share_prefix else ()
        size = last_needed(sequence)
        if size > limit:
            raise ValueError(
                f"a sequence of {size} tokens does not fit into tokens_per_microbatch = {limit}; "
                f"set tokens_per_microbatch = {size} or more"
            )
        own = size - len(prefix)
        at = open_tree.get((sequence.group, prefix)) if prefix else None
        if at is not None and trees[at].size + own <= limit:
            trees[at] = _Tree(prefix, (*trees[at].members, index), trees[at].size + own)
        else:
            trees.append(_Tree(prefix, (index,), size))
            if prefix:
                open_tree[sequence.group, prefix] = len(trees) - 1
    return trees


def _batch(
    trees: Sequence[_Tree],
    sequences: Sequence[TrainSequence],
    first_sequence: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> TokenBatch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    columns: dict[str, list[float]] = {name: [] for name in (*TARGET_FIELDS, "behavior_logprobs")}
    has_behavior = False
    for tree in trees:
        prefix_start, num_prefix = len(ids), len(tree.prefix)
        prefix_stop = prefix_start + num_prefix
        if num_prefix:
            ids += tree.prefix
            positions += range(num_prefix)
            segments.append(Segment(start=prefix_start, stop=prefix_stop))
        for index in tree.members:
            sequence = sequences[index]
            start, stop = len(ids), last_needed(sequence)
            if stop > num_prefix:
                ids += sequence.token_ids[num_prefix:stop]
                positions += range(num_prefix, stop)
                bounds = {"prefix_start": prefix_start, "prefix_stop": prefix_stop}
                segments.append(Segment(start=start, stop=len(ids), **bounds))
            targets = [i for i, origin in enumerate(sequence.origin) if origin is not Origin.CONTEXT]
            count = len(targets)
            columns["target_ids"] += [sequence.token_ids[i] for i in targets]
            columns["source_index"] += [
                start + i - 1 - num_prefix if i > num_prefix else prefix_stop - 1 for i in targets
            ]
            columns["sequence_index"] += [first_sequence + index] * count
            columns["sequence_length"] += [count] * count
            columns["origin"] += [sequence.origin[i] for i in targets]
            columns["policy_version"] += _spread(sequence.policy_version, count)
            columns["advantage"] += _spread(sequence.advantage, count)
            columns["weight"] += [sequence.weight] * count
            columns["solved"] += [sequence.solved] * count
            columns["behavior_logprobs"] += sequence.behavior_logprobs or [0.0] * count
            has_behavior = has_behavior or sequence.behavior_logprobs is not None
    if not has_behavior:
        del columns["behavior_logprobs"]
    tensors: dict[str, Any] = {
        name: torch.tensor(values, dtype=INTEGERS.get(name, dtype), device=device)
        for name, values in columns.items()
    }
    return TokenBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        position_ids=torch.tensor(positions, dtype=torch.int64, device=device),
        segments=tuple(segments),
        **tensors,
    )


def _spread(value: Sequence[float] | float, count: int) -> Sequence[float]:
    """Return one value per trained token."""
    return value if isinstance(value, Sequence) else [value] * count


def dummy_batch(dtype: torch.dtype, device: torch.device | str) -> TokenBatch:
    """Return a batch of two tokens without targets. A rank without work runs it, so that the collectives
    inside the model match those of the other ranks."""
    origin = (Origin.CONTEXT, Origin.CONTEXT, Origin.POLICY)
    sequence = TrainSequence(token_ids=(0, 0, 0), origin=origin, num_prefix_tokens=0, group=0)
    (batch,) = pack([sequence], tokens_per_microbatch=2, dtype=dtype, device=device)
    return replace(batch, **{name: getattr(batch, name)[:0] for name in TARGET_FIELDS})
