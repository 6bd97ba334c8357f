"""Adapters: right runs pass, and adapters that the optimizer does not have are named at the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faulty_loops import Loop, make_optimizer, train
from ported import BOTH


def only_two(run: Any) -> None:
    """Give the optimizer the first two of all adapter tensors."""
    run.optimizer = make_optimizer("adamw", run.parameters[:2])


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_right_adapters(arch: str, dtype: torch.dtype) -> None:
    records, model, failure = train(Loop(arch=arch, lora=True), dtype)
    assert failure == ""
    assert [r["verdict"] for r in records] == ["RIGHT"] * 3, [r["fault"] for r in records]
    _, alone, _ = train(Loop(arch=arch, lora=True), dtype, guarded=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_adapters_outside_of_the_optimizer(dtype: torch.dtype) -> None:
    records, model, failure = train(Loop(arch="llama", lora=True, begin=only_two), dtype)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert failure == ""
    assert records[0]["codes"] == ["stale_parameters"]
    # The first of each pair has a zero gradient while the second is zero, so it should not move at step 1.
    # Later, these still do not move, because their partners have not moved.
    for record in records:
        still = [c for c in record["causes"] if c["code"] == "stale_parameters"]
        assert [c["values"]["count"] for c in still] == [len(trainable) // 2 - 1]


def test_a_dropped_micro_batch_of_adapters() -> None:
    from faulty_loops import keep

    records, _, _ = train(Loop(arch="llama", lora=True, **keep(lambda run, k: k != 2)), torch.float32)
    assert records[0]["codes"] == ["kept"]
    assert records[0]["causes"][0]["values"]["dropped"] == [3]
