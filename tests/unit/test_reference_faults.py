"""The fault catalogue: its closed forms, and the recovery of every weight vector from gradients of a tiny
model."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from truestep import faults
from truestep.records import Origin, TrainSequence
from truestep.testing.reference.loss import per_microbatch_gradients, reference_gradient

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def make_sequence(num_trained: int, seed: int) -> TrainSequence:
    token_ids = np.random.default_rng(seed).integers(0, 20, num_trained + 2)
    origin = (Origin.CONTEXT,) * 2 + (Origin.EXPERT,) * num_trained
    return TrainSequence(token_ids=tuple(map(int, token_ids)), origin=origin, num_prefix_tokens=2, group=seed)


SEQUENCES = [make_sequence(n, seed) for seed, n in enumerate([3, 8, 1, 4, 2, 4, 6])]
ONE_RANK = [[2, 27, 2, 17]]
TWO_RANKS = [[2, 27, 2, 17], [5, 9, 1, 7]]


@pytest.mark.parametrize(
    ("name", "counts", "weights"),
    [
        ("right", ONE_RANK, [1, 1, 1, 1]),
        ("offload_first_last", ONE_RANK, [1, 0, 0, 1]),
        ("offload_first_last", TWO_RANKS, [1, 0, 0, 1, 1, 0, 0, 1]),
        ("offload_first_last", [[3, 4]], [1, 1]),
        ("offload_first_last", [[3]], [1]),
        ("first_only", TWO_RANKS, [1, 0, 0, 0, 1, 0, 0, 0]),
        ("last_only", ONE_RANK, [0, 0, 0, 1]),
        ("micro_mean", ONE_RANK, [6, 48 / 108, 6, 48 / 68]),
        ("micro_mean_without_1_over_k", ONE_RANK, [24, 48 / 27, 24, 48 / 17]),
        ("offload_and_micro_mean", ONE_RANK, [6, 0, 0, 48 / 68]),
        ("rank_mean", TWO_RANKS, [70 / 96] * 4 + [70 / 44] * 4),
        ("rank_mean", ONE_RANK, [1, 1, 1, 1]),
        ("dp_token_mean", TWO_RANKS, [70 / 28, 70 / 144, 70 / 12, 70 / 96] * 2),
        ("one_over_k_forgotten", ONE_RANK, [4] * 4),
        ("one_over_k_twice", ONE_RANK, [0.25] * 4),
        ("summed_over_ranks", TWO_RANKS, [2] * 8),
        ("averaged_over_ranks_twice", TWO_RANKS, [0.5] * 8),
    ],
)
def test_fault_vectors(name: str, counts: list[list[int]], weights: list[float]) -> None:
    assert np.allclose(faults.FAULTS[name][0](counts), weights, rtol=1e-14, atol=0)


def test_fault_vectors_as_measured_in_frameworks() -> None:
    assert np.allclose(faults.micro_mean(ONE_RANK), [6, 0.444, 6, 0.706], atol=5e-4)
    assert np.allclose(faults.micro_mean_without_1_over_k(ONE_RANK), [24, 1.78, 24, 2.82], atol=5e-3)
    assert np.allclose(faults.rank_mean(TWO_RANKS), [0.729] * 4 + [1.591] * 4, atol=5e-4)


@pytest.mark.parametrize("name", ["micro_mean", "dp_token_mean", "rank_mean"])
def test_means_of_means_keep_the_mean_of_equal_counts(name: str) -> None:
    assert np.allclose(faults.FAULTS[name][0]([[7, 7, 7], [7, 7, 7]]), 1.0)
    assert not np.allclose(faults.FAULTS[name][0]([[7, 8, 9], [3, 7, 7]]), 1.0, atol=0.05)


def test_combination_and_scale() -> None:
    both = faults.combine(faults.first_only, faults.scale(-3.0))
    assert np.array_equal(both(ONE_RANK), [-3, 0, 0, 0])


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 trained tokens"):
        faults.micro_mean([[3, 0]])
    with pytest.raises(ValueError, match="different numbers"):
        faults.dp_token_mean([[3, 1], [2]])
    with pytest.raises(ValueError, match="rank without"):
        faults.rank_mean([[3, 1], [0, 0]])


def flat(gradients: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([g.numpy().ravel() for g in gradients.values()])


@pytest.fixture(scope="module")
def shares(model: LlamaForCausalLM) -> tuple[list[np.ndarray], list[list[int]]]:
    """g_i / N of two ranks with three micro-batches each."""
    indices = [[0], [1], [2], [3], [4], [5, 6]]
    sums, counts = per_microbatch_gradients(model, SEQUENCES, indices)
    assert counts == [3, 8, 1, 4, 2, 10]
    return [flat(g) / sum(counts) for g in sums], [counts[:3], counts[3:]]


def test_right_weights_give_the_sft_gradient(
    model: LlamaForCausalLM, shares: tuple[list[np.ndarray], list[list[int]]]
) -> None:
    assert np.allclose(
        sum(shares[0]), flat(reference_gradient(model, SEQUENCES, method="sft")), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("name", faults.FAULTS)
def test_every_fault_is_recovered(shares: tuple[list[np.ndarray], list[list[int]]], name: str) -> None:
    parts, counts = shares
    weights = faults.FAULTS[name][0](counts)
    observed = sum(w * g for w, g in zip(weights, parts, strict=True))
    found, residual, condition = faults.recover_weights(observed, parts)
    assert np.allclose(found, weights, rtol=0, atol=1e-12 * condition * abs(weights).max())
    assert residual < 1e-13
    assert condition < 100


def test_residual_tells_what_no_weights_explain(shares: tuple[list[np.ndarray], list[list[int]]]) -> None:
    parts, _ = shares
    right = sum(parts)
    stranger = np.random.default_rng(0).normal(size=right.size)
    stranger *= 0.01 * np.linalg.norm(right) / np.linalg.norm(stranger)
    found, residual, _ = faults.recover_weights(right + stranger, parts)
    assert 0.009 < residual < 0.0101
    assert np.allclose(found, 1, atol=0.05)


def test_micro_batches_that_cannot_be_told_apart_are_said_so(
    shares: tuple[list[np.ndarray], list[list[int]]],
) -> None:
    parts, _ = shares
    for hopeless in (parts[0] * 0, parts[0] - 2 * parts[1]):
        assert faults.recover_weights(sum(parts), [*parts[:2], hopeless])[2] == math.inf


def test_faults_need_no_torch() -> None:
    code = "import sys, truestep.faults; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
