"""Weights of micro-batches as a pattern: kept × normaliser × scale, and that pattern in words.

Names come from the structure of the weights, so that a fault that nobody has seen is still described.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truestep import faults
from truestep.audit.weights import Recovered

TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "bfloat16": 0.15}  # of a weight; real faults start at 6e-2
NORMALISERS: dict[str, tuple[faults.WeightsOf, str]] = {
    "global": (faults.right, ""),
    "rank_mean": (faults.rank_mean, "rank-wise mean"),
    "micro_mean": (faults.micro_mean, "mean of micro-batch means"),
    "dp_token_mean": (faults.dp_token_mean, "mean over the tokens of each micro-step"),
}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """kept × normaliser × scale."""

    kept: tuple[tuple[bool, ...], ...]  # per rank
    normaliser: str
    scale: float
    codes: tuple[str, ...]  # the parts that are not right, as codes
    text: str  # and in words


def fit_pattern(recovered: Recovered, dtype: str) -> Pattern | None:
    """The simplest pattern that the weights obey within their errors; None where none does."""
    weights, errors = recovered.weights, np.maximum(5 * recovered.errors, TOLERANCE[dtype])
    seen = np.abs(weights) > np.maximum(errors, 0.02 * np.abs(weights).max())
    every = np.ones_like(seen)
    # Nothing is wrong or dropped unless the weights say so: one of 1 ± 1.5 is not told from zero, and is no
    # sign of it.
    if (np.abs(weights - 1.0) <= errors).all():
        return Pattern(kept=_by_rank(every, recovered), normaliser="global", scale=1.0, codes=(), text="")
    if not seen.any():
        return None
    for kept in (every, seen):
        for name in NORMALISERS:
            if found := _fit(recovered, kept, name, errors):
                return found
    return None


def hides_weights(recovered: Recovered) -> bool:
    """Whether the noise leaves a weight of the step that could as well be zero."""
    return bool((5 * recovered.errors >= 1.0).any())


def _fit(recovered: Recovered, kept: np.ndarray, name: str, errors: np.ndarray) -> Pattern | None:
    """kept × the normaliser × the scale that fits best, if the weights obey it."""
    weights_of, words = NORMALISERS[name]
    try:
        predicted = weights_of(recovered.counts)
    except ValueError:
        return None  # ranks with unequal numbers of micro-batches have no micro-step
    weights = recovered.weights
    scale = float(np.median(weights[kept] / predicted[kept]))
    allowed = errors * max(1.0, abs(scale) * float(predicted[kept].max()))
    if not (np.abs(weights - scale * predicted * kept) <= allowed).all():
        return None
    # One, if no weight contradicts it: a single noisy weight does not hide the scale of the others.
    scale = 1.0 if (np.abs(weights - predicted * kept) <= allowed).all() else scale
    scale_code, scale_words = describe_scale(scale, recovered, kept, name)
    by_rank = _by_rank(kept, recovered)
    codes = [
        *(["kept"] if not kept.all() else []),
        *([name] if words else []),
        *([scale_code] if scale_code else []),
    ]
    text = ", and ".join(part for part in (describe_kept(by_rank), words, scale_words) if part)
    return Pattern(kept=by_rank, normaliser=name, scale=scale, codes=tuple(codes), text=text)


def _by_rank(kept: np.ndarray, recovered: Recovered) -> tuple[tuple[bool, ...], ...]:
    cuts = np.cumsum([len(rank) for rank in recovered.counts])[:-1]
    return tuple(tuple(map(bool, part)) for part in np.split(kept, cuts))


def describe_scale(scale: float, recovered: Recovered, kept: np.ndarray, normaliser: str) -> tuple[str, str]:
    """The constant as (code, words); several readings where they coincide."""
    if scale == 1.0:
        return "", ""
    counts = recovered.counts
    flat = [n for rank in counts for n in rank]
    total, empty, ranks = sum(flat), len(recovered.empty), len(counts)
    used = max(len(rank) for rank in counts)
    asked = max(len(rank) + sum(r == i for r, _ in recovered.empty) for i, rank in enumerate(counts))
    known = [
        ("accumulation_factor", "the division by the accumulation steps is missing", float(asked)),
        ("accumulation_factor", "divided by the accumulation steps twice", 1 / asked),
        ("rank_factor", "summed over ranks instead of averaged", float(ranks)),
        ("rank_factor", "divided by the number of ranks twice", 1 / ranks),
        # On one process these are the factors of the accumulation alone, on one micro-batch those of the
        # ranks.
        (
            "rank_factor",
            "multiplied by ranks and accumulation steps",
            float(ranks * asked) if ranks > 1 < asked else 1.0,
        ),
        (
            "rank_factor",
            "divided by ranks and accumulation steps twice",
            1 / (ranks * asked) if ranks > 1 < asked else 1.0,
        ),
        (
            "kept",
            "divided by the tokens that were kept",
            total / sum(n for n, k in zip(flat, kept, strict=True) if k),
        ),
        ("empty_counted", "micro-batches without trained tokens count as one token", total / (total + empty)),
    ]
    if normaliser == "micro_mean":
        known.append(
            ("empty_counted", "micro-batches without trained tokens count as a mean of zero", used / asked)
        )
    fitting = [(c, t) for c, t, value in known if value != 1.0 and abs(scale - value) <= 0.002 * abs(value)]
    if not fitting:
        return "scale", f"everything is multiplied by {scale:.4g}"
    return fitting[0][0], " or ".join(text for _, text in fitting[:2])


def describe_kept(kept: Sequence[Sequence[bool]]) -> str:
    """Which micro-batches are missing, in words."""
    if all(map(all, kept)):
        return ""
    if len({tuple(rank) for rank in kept}) > 1:
        gone = [f"rank {r}: {_numbers(rank)}" for r, rank in enumerate(kept) if not all(rank)]
        return f"micro-batches are dropped ({'; '.join(gone)})"
    rank = list(kept[0])
    size = len(rank)
    if size > 2 and rank == [True] + [False] * (size - 2) + [True]:
        return "the intermediate micro-batches are dropped"
    if rank == [False] * (size - 1) + [True]:
        return "every backward overwrites the one before: only the last micro-batch counts"
    if rank == [True] + [False] * (size - 1):
        return "only the first micro-batch counts"
    return f"micro-batches are dropped ({_numbers(rank)} of {size})"


def _numbers(rank: Sequence[bool]) -> str:
    return ", ".join(str(i + 1) for i, k in enumerate(rank) if not k)
