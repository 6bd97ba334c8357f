"""Two processes make the update of one: summed all-reduce and FSDP2, uneven and idle ranks, clipping,
AdamW."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import distributed_worker as worker
import pytest
import torch
from distributed_worker import Case, cases, run_case
from safetensors.torch import load_file
from step_cases import EXACT, FAMILIES, SINGLE, check, close, expected_gradient, make_model
from torch import Tensor
from two_processes import launch

from truestep.train.parallel import Ranks

SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Rank:
    moved: dict[str, Tensor]
    reports: dict[str, Any]
    gathered: list[Any]

    def of(self, case: Case) -> dict[str, Tensor]:
        prefix = case.name + "/"
        return {name.removeprefix(prefix): t for name, t in self.moved.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Rank]:
    """One launch of two processes for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    launch([str(worker.__file__), str(folder)], seconds=SECONDS)
    found = []
    for rank in (0, 1):
        text = json.loads((folder / f"rank-{rank}.json").read_text())
        found.append(Rank(moved=load_file(folder / f"rank-{rank}.safetensors"), **text))
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_two_processes_are_one(case: Case, ranks: list[Rank]) -> None:
    expected, reports = run_case(case, Ranks())
    limit = EXACT if case.dtype is torch.float64 else SINGLE
    close(f"2 ranks, {case.parallel}, {case.dtype}", ranks[0].of(case), expected, limit)
    ours, theirs = ranks[0].of(case), ranks[1].of(case)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the ranks have parted"
    if case.optimizer != "sgd":
        assert max(r["report"]["grad_norm"] for r in reports) > 0.5, "nothing was clipped"
    for step, one in enumerate(reports):
        both = [rank.reports[case.name][step] for rank in ranks]
        assert both[0]["totals"] == both[1]["totals"] == one["totals"]
        assert both[0]["report"] == both[1]["report"]
        one_by_one = case.model == worker.ONE_BY_ONE
        expected_counts = [1, 1] if one_by_one else {"uneven": [3, 5], "one idle": [8, 0]}[case.cut]
        assert [b["num_batches"] for b in both] == expected_counts
        for key in ("grad_norm", "loss"):
            error = abs(both[0]["report"][key] - one["report"][key])
            check(f"2 ranks, {key}, {case.dtype}", error / max(abs(one["report"][key]), 1e-2), limit)
        assert both[0]["report"]["metrics"] == pytest.approx(one["report"]["metrics"], rel=limit, abs=limit)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_are_the_reference(parallel: str, ranks: list[Rank]) -> None:
    """Without the one-process step between them."""
    case = Case(family="dr_grpo", cut="one idle", optimizer="sgd", parallel=parallel, model="tied")
    family = FAMILIES[case.family]
    model = make_model(worker.LLAMAS[case.model]).double()
    right = expected_gradient(model, worker.sequences_of(case, 0), family)
    got = {name.removeprefix("model."): -t for name, t in ranks[0].of(case).items()}
    close(f"2 ranks against the reference, {parallel}", got, right)


def test_ranks_tell_each_other_values_of_different_lengths(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.gathered == [{"rank": r, "text": "ü" * (3 + 40 * r)} for r in (0, 1)]
