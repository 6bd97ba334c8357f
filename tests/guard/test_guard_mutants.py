"""Every fault of the audit's mutants that the guard claims to see is named at the step that first contains it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faulty_loops import Loop, train
from ported import BOTH, PORTED, UNSEEN

from truestep.testing import mutants

ALONE = [(n, dtype) for n, one in enumerate(PORTED) for dtype in one.dtypes if one.ranks == 1]
TOGETHER = [(n, dtype) for n, one in enumerate(PORTED) for dtype in one.dtypes if one.ranks == 2]


def name(value: Any) -> str:
    return (
        PORTED[value].text.replace(" ", "-") if isinstance(value, int) else str(value).removeprefix("torch.")
    )


def check(number: int, records: list[dict[str, Any]], failure: str) -> None:
    one = PORTED[number]
    faulty = [r for r in records if r["verdict"] == "FAULT"]
    assert failure == ""
    assert faulty, one.text
    assert faulty[0]["step"] == one.first
    assert faulty[0]["codes"]
    assert set(faulty[0]["codes"]) <= set(one.codes.split()), faulty[0]["fault"]
    assert all(r["verdict"] == "RIGHT" for r in records if r["step"] < one.first)


@pytest.mark.parametrize(("number", "dtype"), ALONE, ids=name)
def test_one_process(number: int, dtype: torch.dtype) -> None:
    records, _, failure = train(PORTED[number].loop, dtype)
    check(number, records, failure)


@pytest.mark.parametrize(("number", "dtype"), TOGETHER, ids=name)
def test_two_processes(number: int, dtype: torch.dtype, two_ranks: list[dict[str, Any]]) -> None:
    key = f"{number} {dtype}"
    for rank in two_ranks:
        check(number, rank[key]["records"], rank[key]["failure"])
    first, second = ([(r["step"], r["codes"]) for r in rank[key]["records"]] for rank in two_ranks)
    assert first == second  # so that all processes stop together


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_right_runs_of_two_processes(rows: int, dtype: torch.dtype, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank[f"clean {rows} {dtype}"]
        assert found["failure"] == ""
        assert [r["verdict"] for r in found["records"]] == ["RIGHT"] * 3
        assert all(abs(w - 1) < 0.05 for r in found["records"] for part in r["weights"] for w in part)
        assert found["same"]  # the parameters without the guard


def test_an_error_on_one_rank_turns_all_off(two_ranks: list[dict[str, Any]]) -> None:
    other, faulty = (rank["an error on one rank"] for rank in two_ranks)
    assert "simulated" in faulty["failure"]
    assert other["failure"] == "another process failed"
    assert other["records"] == faulty["records"] == []


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_right_runs(optimizer: str, rows: int, dtype: torch.dtype) -> None:
    loop = Loop(optimizer=optimizer, rows=rows, stop=True, rate=0.01 if optimizer == "adamw" else 0.5)
    records, model, failure = train(loop, dtype)
    assert failure == ""
    assert [r["verdict"] for r in records] == ["RIGHT"] * 3, [r["fault"] for r in records]
    assert not any(r["notes"] for r in records)
    assert all(abs(w - 1) < 0.05 for r in records for part in r["weights"] for w in part)
    _, alone, _ = train(loop, dtype, guarded=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_all_mutants_are_ported_or_listed() -> None:
    groups = (mutants.SUMS, mutants.MASKS, mutants.OPTIMIZERS, mutants.ASKED)
    texts = {fault.text for group in groups for fault in group}
    ported = {one.text for one in PORTED}
    assert ported <= texts
    assert set(UNSEEN) == texts - ported


def test_stop_tokens_that_are_never_trained_are_named_without_labels() -> None:
    """A loss that masks the stop token by itself: the model is not called with labels."""

    def without_stop(micro: Any) -> torch.Tensor:
        return torch.where(micro.labels == 2, -100, micro.labels)

    right, _, _ = train(Loop(stop=True, masks=False), torch.float32)
    wrong, _, _ = train(Loop(stop=True, masks=False, targets=without_stop), torch.float32)
    assert [r["verdict"] for r in right] == ["RIGHT"] * 3
    assert wrong[0]["codes"] == ["stop_untrained"]
