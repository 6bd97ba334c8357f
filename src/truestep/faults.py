"""Known faults as wrong weights of micro-batches, and the recovery of weights from a gradient, without torch.

The correct gradient of a step is Σ_i g_i / N, where g_i is the gradient sum of micro-batch i, and N is the
number of the step's tokens over all ranks. A fault has weights w: its gradient is Σ_i w_i·g_i / N.
``counts[rank][k]`` is the number of trained tokens of a rank's k-th micro-batch. Weights are in one flat
vector, rank after rank. D is the number of ranks, K the number of micro-batches per rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Counts = Sequence[Sequence[int]]
Weights = np.ndarray  # float64, one entry per micro-batch
WeightsOf = Callable[[Counts], Weights]


def _per_rank(counts: Counts, weights_of_rank: Callable[[Sequence[int]], Sequence[float]]) -> Weights:
    return np.array([w for rank in counts for w in weights_of_rank(rank)], dtype=np.float64)


def _require_tokens(counts: Counts) -> None:
    for n in (n for rank in counts for n in rank if n < 1):
        raise ValueError(f"a micro-batch of {n} trained tokens has no mean")


def right(counts: Counts) -> Weights:
    """Return the weight 1 for every micro-batch."""
    return _per_rank(counts, lambda rank: [1.0] * len(rank))


def offload_first_last(counts: Counts) -> Weights:
    """Return the weight 1 for the first and the last micro-batch of a rank, and 0 for those between."""
    return _per_rank(counts, lambda rank: [float(k in (0, len(rank) - 1)) for k in range(len(rank))])


def first_only(counts: Counts) -> Weights:
    """Return the weight 1 for the first micro-batch of a rank, and 0 for the others."""
    return _per_rank(counts, lambda rank: [float(k == 0) for k in range(len(rank))])


def last_only(counts: Counts) -> Weights:
    """Return the weight 1 for the last micro-batch of a rank, and 0 for the others."""
    return _per_rank(counts, lambda rank: [float(k == len(rank) - 1) for k in range(len(rank))])


def micro_mean(counts: Counts) -> Weights:
    """Return the weights N / (D·K·n_i)."""
    _require_tokens(counts)
    total = sum(map(sum, counts))
    return _per_rank(counts, lambda rank: [total / (len(counts) * len(rank) * n) for n in rank])


def micro_mean_without_1_over_k(counts: Counts) -> Weights:
    """Return the weights N / (D·n_i)."""
    _require_tokens(counts)
    total = sum(map(sum, counts))
    return _per_rank(counts, lambda rank: [total / (len(counts) * n) for n in rank])


def rank_mean(counts: Counts) -> Weights:
    """Return the weights N / (D·n_rank), where n_rank is the number of tokens of the whole rank."""
    total = sum(map(sum, counts))
    if not all(map(sum, counts)):
        raise ValueError("a rank without trained tokens has no mean")
    return _per_rank(counts, lambda rank: [total / (len(counts) * sum(rank))] * len(rank))


def dp_token_mean(counts: Counts) -> Weights:
    """Return the weights N / (K·n_k), where n_k is the number of tokens of micro-step k over all ranks.
    Source: arXiv 2604.23747, algorithm 2, called once per micro-step under gradient accumulation."""
    if len({len(rank) for rank in counts}) != 1:
        raise ValueError(
            "ranks with different numbers of micro-batches cannot sum over ranks at each micro-step"
        )
    total, num_steps = sum(map(sum, counts)), len(counts[0])
    per_step = [sum(rank[k] for rank in counts) for k in range(num_steps)]
    if not all(per_step):
        raise ValueError("a micro-step without trained tokens has no mean")
    return _per_rank(counts, lambda rank: [total / (num_steps * n) for n in per_step])


def one_over_k_forgotten(counts: Counts) -> Weights:
    """Return the weight K for every micro-batch."""
    return _per_rank(counts, lambda rank: [float(len(rank))] * len(rank))


def one_over_k_twice(counts: Counts) -> Weights:
    """Return the weight 1/K for every micro-batch."""
    return _per_rank(counts, lambda rank: [1 / len(rank)] * len(rank))


def summed_over_ranks(counts: Counts) -> Weights:
    """Return the weight D for every micro-batch."""
    return scale(float(len(counts)))(counts)


def averaged_over_ranks_twice(counts: Counts) -> Weights:
    """Return the weight 1/D for every micro-batch."""
    return scale(1 / len(counts))(counts)


def scale(factor: float) -> WeightsOf:
    """Return the fault that multiplies every weight by ``factor``."""
    return lambda counts: factor * right(counts)


def combine(*faults: WeightsOf) -> WeightsOf:
    """Return a fault that combines these faults. Their weights are multiplied entry by entry."""

    def combined(counts: Counts) -> Weights:
        weights = right(counts)
        for fault in faults:
            weights = weights * fault(counts)
        return weights

    return combined


FAULTS: dict[str, tuple[WeightsOf, str]] = {
    "right": (right, "every micro-batch counts once"),
    "offload_first_last": (offload_first_last, "the offloaded optimizer drops intermediate micro-batches"),
    "first_only": (first_only, "only the first micro-batch reached the optimizer"),
    "last_only": (last_only, "every backward pass overwrote the one before"),
    "micro_mean": (micro_mean, "mean of micro-batch means instead of one mean over all tokens"),
    "micro_mean_without_1_over_k": (
        micro_mean_without_1_over_k,
        "sum of micro-batch means: the factor 1/K is missing too",
    ),
    "rank_mean": (rank_mean, "each rank divides by its own tokens"),
    "dp_token_mean": (dp_token_mean, "tokens are counted over ranks, but per micro-step"),
    "one_over_k_forgotten": (one_over_k_forgotten, "scale: division by the accumulation steps is missing"),
    "one_over_k_twice": (one_over_k_twice, "scale: divided by the accumulation steps twice"),
    "summed_over_ranks": (summed_over_ranks, "scale: summed where the loss expects a mean over ranks"),
    "averaged_over_ranks_twice": (averaged_over_ranks_twice, "scale: divided by the number of ranks twice"),
    "offload_and_micro_mean": (
        combine(offload_first_last, micro_mean),
        "intermediate micro-batches dropped, and the rest averaged as means of means",
    ),
}


def recover_weights(observed: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[Weights, float, float]:
    """Fit the weights w that bring Σ w_i·parts_i closest to ``observed``. Returns (w, residual, condition).

    ``parts`` are flat gradients on the scale of ``observed`` (g_i / N for the weights above). ``residual`` is
    the norm of what the weights do not explain, relative to ``observed``. ``condition`` is the condition
    number of the parts at unit length, the factor by which noise grows. If one part is zero or a linear
    combination of the others, ``condition`` is infinite and the weights mean nothing."""
    matrix = np.stack([np.asarray(part, dtype=np.float64).ravel() for part in parts], axis=1)
    target = np.asarray(observed, dtype=np.float64).ravel()
    lengths = np.linalg.norm(matrix, axis=0)
    unit = matrix / np.where(lengths > 0, lengths, 1.0)  # parts differ in length by orders of magnitude
    scaled, _, rank, singular = np.linalg.lstsq(unit, target, rcond=None)
    condition = float(singular[0] / singular[-1]) if rank == len(parts) else math.inf
    size = float(np.linalg.norm(target))
    missed = float(np.linalg.norm(target - unit @ scaled))
    return scaled / np.where(lengths > 0, lengths, 1.0), missed / size if size else missed, condition
