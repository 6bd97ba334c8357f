"""Five hundred made-up steps against the reference: sequences, groups, advantages, weights, splits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_cases import (
    EXACT,
    MAX_LENGTH,
    check,
    llama,
    plan_for,
    relative_error,
    sgd_gradient,
    twins,
    with_proximal,
)
from torch import nn

from truestep.objective.methods import Method, build
from truestep.records import Origin, TokenBatch, TrainSequence
from truestep.testing.reference.loss import frozen_logprobs, reference_gradient
from truestep.train.packing import pack
from truestep.train.policy import Policy

VOCABULARY = 9
NORMALISERS = {"tokens": "tok", "sequences": "seq", "sequence_sums": "sum", "max_length": "drg"}
ROWS = ("sft", "dft", "grpo_token_mean", "grpo", "dr_grpo", "dapo")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One optimizer step. ``shifts`` move the proximal log-probabilities (empty: the first update)."""

    sequences: list[TrainSequence]
    row: str
    normaliser: str  # of SFT only; the other rows have their own
    temperature: float
    tightness: float  # 0: one micro-batch; 1: the smallest that the longest sequence allows
    share_prefix: bool
    weights: list[float]
    shifts: list[float]


def origin_of(row: str) -> Origin:
    """What a row trains on."""
    return Origin.EXPERT if row in ("sft", "dft") else Origin.POLICY


def has_hole(sequence: TrainSequence) -> bool:
    """Whether context follows a trained token."""
    trained = [origin is not Origin.CONTEXT for origin in sequence.origin]
    return False in trained[trained.index(True) :]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Hypothesis decides on the structure; the numbers are drawn from one seed, which is faster by far."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def signed(size: int) -> tuple[float, ...]:
        """Bounded away from 0, so that a relative error means something."""
        return tuple(float(x) for x in rng.uniform(0.25, 2.0, size) * rng.choice([-1.0, 1.0], size))

    members = st.lists(st.integers(1, 5), min_size=1, max_size=3)  # of a group, by their number of tokens
    row = draw(st.sampled_from(ROWS))
    own = origin_of(row)
    mixed, per_token, sampled, shared = (draw(st.booleans()) for _ in range(4))
    sequences = []
    for group, sizes in enumerate(draw(st.lists(members, min_size=1, max_size=2))):
        prompt = tuple(int(t) for t in rng.integers(0, VOCABULARY, rng.integers(1, 4)))
        origin = (Origin.EXPERT, Origin.POLICY)[int(rng.integers(2))] if mixed else own
        for size in sizes:
            trained = tuple(bool(t) for t in rng.random(size) < 0.7)
            num = sum(trained)
            if num == 0:
                trained, num = (*trained[:-1], True), 1
            sequences.append(
                TrainSequence(
                    token_ids=prompt + tuple(int(t) for t in rng.integers(0, VOCABULARY, size)),
                    origin=(Origin.CONTEXT,) * len(prompt)
                    + tuple(origin if t else Origin.CONTEXT for t in trained),
                    num_prefix_tokens=len(prompt) if shared else 0,
                    group=group,
                    advantage=signed(num) if per_token else signed(1)[0],
                    behavior_logprobs=(-0.5,) * num if sampled else None,
                    weight=abs(signed(1)[0]),
                )
            )
    return Case(
        sequences=sequences,
        row=row,
        normaliser=draw(st.sampled_from(list(NORMALISERS))),
        temperature=draw(st.sampled_from([0.3, 0.7, 1.0, 1.5, 2.5])),
        tightness=draw(st.sampled_from([0.0, 0.5, 1.0])),
        share_prefix=draw(st.booleans()),
        weights=list(signed(9)) if draw(st.booleans()) else [1.0] * 9,
        shifts=rng.uniform(-1.0, 1.0, 7).tolist() if draw(st.booleans()) else [],
    )


@functools.cache
def pair() -> tuple[Policy, nn.Module]:
    return twins(llama(hidden=8, heads=2, kv_heads=1, layers=1, vocab_size=VOCABULARY, intermediate_size=8))


def method_of(case: Case) -> tuple[Method, dict[str, Any]]:
    """The row here, and what the reference is asked for. DAPO's gate works on rewards, before the step."""
    if case.row == "sft":
        return build("sft", {"normaliser": case.normaliser}), {
            "options": {"normaliser": NORMALISERS[case.normaliser]}
        }
    return build(case.row, {}), {"method": "grpo_token_mean" if case.row == "dapo" else case.row}


def packed(case: Case) -> list[TokenBatch]:
    lengths = [len(s.token_ids) for s in case.sequences]
    limit = round(case.tightness * max(lengths) + (1 - case.tightness) * sum(lengths))
    return pack(
        case.sequences, tokens_per_microbatch=limit, share_prefix=case.share_prefix, dtype=torch.float64
    )


def error_of(case: Case) -> float:
    """The step's relative error against the reference."""
    policy, model = pair()
    batches = packed(case)
    rows = None
    if case.shifts:
        rows = frozen_logprobs(model, case.sequences, case.temperature)
        rows = [
            [x + case.shifts[(i + j) % len(case.shifts)] for j, x in enumerate(r)] for i, r in enumerate(rows)
        ]
        batches = [with_proximal(b, rows) for b in batches]
    method, asked = method_of(case)
    chosen = [i for i, s in enumerate(case.sequences) if s.origin.count(origin_of(case.row))]
    parts = [
        ([chosen.index(i) for i in b.sequence_index.unique().tolist() if i in chosen], w)
        for b, w in zip(batches, case.weights, strict=False)
    ]
    expected = reference_gradient(
        model,
        [case.sequences[i] for i in chosen],
        [rows[i] for i in chosen] if rows else None,
        temperature=case.temperature,
        max_length=MAX_LENGTH,
        microbatches=parts,
        **{"method": "sft", **asked},
    )
    weights = case.weights[: len(batches)]
    plan = plan_for(method, temperature=case.temperature, microbatch_weights=weights)
    # Opposite advantages may cancel to nothing; then the error is judged against a small gradient of this
    # model.
    return relative_error(sgd_gradient(policy, batches, plan), expected, floor=1e-2)


def runs(num_cases: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=num_cases, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


@runs(200)
@given(cases())
def test_any_step_is_the_reference_step(case: Case) -> None:
    check(f"made up, {case.row}", error_of(case), EXACT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@runs(4_000)
@given(cases())
def test_any_step_is_the_reference_step_long(case: Case) -> None:
    check(f"made up, {case.row}", error_of(case), EXACT)


def test_the_cases_are_what_they_claim() -> None:
    """All rows, several micro-batches, mixed kinds, later updates: none of it is rare among the cases."""
    seen: dict[str, int] = {}

    @runs(200)
    @given(cases())
    def count(case: Case) -> None:
        for name, found in {
            case.row: True,
            "mixed": len({s.origin.count(Origin.EXPERT) > 0 for s in case.sequences}) > 1,
            "later": bool(case.shifts),
            "holes": any(has_hole(s) for s in case.sequences),
            "several micro-batches": len(packed(case)) > 1,
            "weighted": case.weights != [1.0] * 9,
            "shared": case.share_prefix and any(s.num_prefix_tokens for s in case.sequences),
        }.items():
            seen[name] = seen.get(name, 0) + found

    count()
    assert set(ROWS) <= set(seen)
    assert min(seen.values()) >= 10, seen
