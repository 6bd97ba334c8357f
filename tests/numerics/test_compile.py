"""Compiled layers give the same gradient and the same tokens, and one compilation serves all layers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from step_cases import (
    FAMILIES,
    batches_of,
    close,
    expected_gradient,
    llama,
    make_model,
    make_policy,
    plan_for,
    sequences_of,
    sgd_gradient,
)

from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.seeding import Purpose

LAYERS = torch._dynamo.config.recompile_limit + 2  # compiled one by one, they would pass the compiler's limit
CONFIG = llama(hidden=32, heads=4, kv_heads=2, layers=LAYERS)

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """An error where the compiler gives up and would run what is left uncompiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def sampled(policy: Any) -> list[Any]:
    requests = [
        SampleRequest(
            problem_id=str(i),
            sample_index=0,
            prompt_ids=(3, 4, 5 + i),
            seed=1,
            purpose=Purpose.SAMPLE,
            step=0,
        )
        for i in range(3)
    ]
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=6, stop_token_ids=())
    rollouts = TorchEngine(policy.model).generate(requests, sampling)
    return sorted((r.problem_id, r.completion_ids) for r in rollouts)


@pytest.mark.slow
def test_compiled_layers_sample_and_train_as_plain_ones() -> None:
    plain = sampled(make_policy(CONFIG))
    for checkpointing in ("selective", True):
        torch._dynamo.reset()  # as in a process of its own
        policy = make_policy(CONFIG, gradient_checkpointing=checkpointing, compile=True)
        assert sampled(policy) == plain
        for name in ("sft", "grpo"):
            family = FAMILIES[name]
            right = expected_gradient(make_model(CONFIG).double(), sequences_of(family), family)
            for num_batches in (1, 2, 4):
                batches = batches_of(sequences_of(family), num_batches=num_batches)
                close(f"compiled, {name}", sgd_gradient(policy, batches, plan_for(family.method)), right)
        assert sampled(policy) == plain
