"""Training sequences → packed micro-batches. Memory only: no choice made here changes the update.

The samples of a group share their prompt: it is forwarded once per micro-batch that holds any of them, and
each sample sees it as its prefix. A token whose hidden state predicts nothing that is trained is not
forwarded at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from truestep.records import (
    SCORED_FIELDS,
    TARGET_FIELDS,
    TARGET_FLAGS,
    TARGET_INDICES,
    Kind,
    Segment,
    TokenBatch,
    TrainSequence,
)


@dataclass(frozen=True)
class _Tree:
    """Sequences with a common prefix. ``size`` counts the tokens to be forwarded."""

    prefix: tuple[int, ...]
    members: tuple[int, ...]
    size: int


def pack(
    sequences: Sequence[TrainSequence],
    *,
    tokens_per_microbatch: int,
    share_prefix: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[TokenBatch]:
    """Pack sequences into as few micro-batches of at most ``tokens_per_microbatch`` forwarded tokens as
    first-fit decreasing finds. Raises ValueError where one sequence alone is longer."""
    trees = _trees(sequences, tokens_per_microbatch, share_prefix)
    bins: list[list[_Tree]] = []
    space: list[int] = []
    for tree in sorted(trees, key=lambda t: -t.size):  # sorted is stable: a function of the sequences alone
        slot = next((i for i, free in enumerate(space) if free >= tree.size), None)
        if slot is None:
            bins.append([])
            space.append(tokens_per_microbatch)
            slot = len(bins) - 1
        bins[slot].append(tree)
        space[slot] -= tree.size
    group_lengths: dict[int, int] = {}
    for s in sequences:
        group_lengths[s.group] = group_lengths.get(s.group, 0) + s.num_trained
    return [_batch(trees, sequences, group_lengths, dtype, device) for trees in bins]


def last_needed(sequence: TrainSequence) -> int:
    """How many leading tokens must be forwarded: all before the last trained token."""
    return max(i for i, t in enumerate(sequence.trained) if t)


def _trees(sequences: Sequence[TrainSequence], limit: int, share_prefix: bool) -> list[_Tree]:
    trees: list[_Tree] = []
    open_tree: dict[tuple[int, tuple[int, ...]], int] = {}  # (group, prefix) → the tree still being filled
    for index, sequence in enumerate(sequences):
        if not any(sequence.trained):
            continue  # all masked: it adds nothing to the numerator, and totals never counted it
        prefix = sequence.token_ids[: sequence.num_prefix_tokens] if share_prefix else ()
        own = last_needed(sequence) - len(prefix)
        if own + len(prefix) > limit:
            raise ValueError(
                f"a sequence of {own + len(prefix)} tokens does not fit into tokens_per_microbatch = {limit}: "
                f"write tokens_per_microbatch = {own + len(prefix)} or more"
            )
        at = open_tree.get((sequence.group, prefix)) if prefix else None
        if at is not None and trees[at].size + own <= limit:
            trees[at] = _Tree(prefix, (*trees[at].members, index), trees[at].size + own)
        else:
            trees.append(_Tree(prefix, (index,), len(prefix) + own))
            if prefix:
                open_tree[sequence.group, prefix] = len(trees) - 1
    return trees


def _batch(
    trees: Sequence[_Tree],
    sequences: Sequence[TrainSequence],
    group_lengths: dict[int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> TokenBatch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    columns: dict[str, list[float]] = {name: [] for name in TARGET_FIELDS if name not in SCORED_FIELDS}
    for tree in trees:
        prefix_start, num_prefix = len(ids), len(tree.prefix)
        if num_prefix:
            ids += tree.prefix
            positions += range(num_prefix)
            segments.append(Segment(start=prefix_start, stop=prefix_start + num_prefix))
        for index in tree.members:
            sequence = sequences[index]
            start, stop = len(ids), last_needed(sequence)
            if stop > num_prefix:
                ids += sequence.token_ids[num_prefix:stop]
                positions += range(num_prefix, stop)
                segments.append(
                    Segment(
                        start=start,
                        stop=len(ids),
                        prefix_start=prefix_start,
                        prefix_stop=prefix_start + num_prefix,
                    )
                )
            targets = [i for i, t in enumerate(sequence.trained) if t]
            count = len(targets)
            columns["target_ids"] += [sequence.token_ids[i] for i in targets]
            columns["source_index"] += [
                start + i - 1 - num_prefix if i > num_prefix else prefix_start + num_prefix - 1
                for i in targets
            ]
            columns["sequence_index"] += [index] * count
            columns["group_index"] += [sequence.group] * count
            columns["kind"] += [int(sequence.kind)] * count
            given = sequence.advantage
            columns["advantage"] += given if isinstance(given, tuple) else [given] * count
            columns["behavior_logprobs"] += sequence.behavior_logprobs or [float("nan")] * count
            columns["weight"] += [sequence.weight] * count
            columns["correct"] += [sequence.correct] * count
            num_expert = count if sequence.kind is Kind.DEMO else sequence.num_expert_tokens
            columns["is_expert"] += [True] * num_expert + [False] * (count - num_expert)
            columns["sequence_length"] += [count] * count
            columns["group_length"] += [group_lengths[sequence.group]] * count
    tensors = {
        name: torch.tensor(
            values,
            dtype=torch.int64 if name in TARGET_INDICES else torch.bool if name in TARGET_FLAGS else dtype,
        )
        for name, values in columns.items()
    }
    unscored = torch.full((len(columns["weight"]),), float("nan"), dtype=dtype, device=device)
    return TokenBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        position_ids=torch.tensor(positions, dtype=torch.int64, device=device),
        segments=tuple(segments),
        **{name: unscored.clone() for name in SCORED_FIELDS},  # a saved batch shares no memory
        **{name: tensor.to(device) for name, tensor in tensors.items()},
    )


def dummy_batch(dtype: torch.dtype, device: torch.device | str) -> TokenBatch:
    """Two tokens and no target: what a rank without work runs, so that collectives inside the model still
    match."""
    sequence = TrainSequence(
        token_ids=(0, 0, 0), trained=(False, False, True), num_prefix_tokens=0, group=0, kind=Kind.ON
    )
    batch = _batch([_Tree((), (0,), 2)], [sequence], {0: 1}, dtype, device)
    empty = {name: getattr(batch, name)[:0] for name in TARGET_FIELDS}
    return TokenBatch(
        input_ids=batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, **empty
    )
