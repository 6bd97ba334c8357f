"""The intervals hold the truth as often as they say; the whole study is benchmarks/coverage_study.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import coverage_study  # noqa: E402

RESULT = ROOT / "results" / "coverage" / "study.json"


@pytest.mark.parametrize("seeds", [5, 8])
def test_mixed_settings_where_simpler_intervals_fail(seeds: int) -> None:
    """1,000 studies: a standard error of 0.7 points around 95 %, so 92.5 % is more than three of them
    away."""
    setting = coverage_study.Setting(
        name="t", kind="difference", seeds=seeds, problems=(60,), by_seed=0.3, by_problem=1.0
    )
    found = coverage_study.cover(setting, 1000, 1)
    assert 0.925 < found["crossed"]["coverage"] < 0.985
    assert found["problems alone"]["coverage"] < 0.92


def test_the_truth_of_a_setting_is_the_mean_of_many_draws() -> None:
    setting = coverage_study.Setting(
        name="t", kind="difference", seeds=5, problems=(50,), by_seed=0.3, by_problem=0.5
    )
    draws = coverage_study.draw(setting, 2000, coverage_study.generator(0, coverage_study.Purpose.BOOTSTRAP))[
        0
    ]
    assert draws.mean() == pytest.approx(
        coverage_study.truth(setting), abs=4 * draws.mean((1, 2)).std() / 2000**0.5
    )


def test_the_committed_result_meets_the_bar() -> None:
    found = json.loads(RESULT.read_text())
    assert found["simulations"] >= 2000
    names = {(row["seeds"], regime) for row in found["settings"] for regime in ("seed-dominated", "problem-dominated")
             if row["name"].startswith(regime)}  # fmt: skip
    assert names == {(s, r) for s in (5, 8) for r in ("seed-dominated", "problem-dominated")}
    assert {row["name"] for row in found["settings"]} == {s.name for s in coverage_study.declared()}
    assert min(row["crossed"]["coverage"] for row in found["settings"]) >= 0.935
    assert found["mean"] == pytest.approx(0.95, abs=0.015)
    assert all(row["crossed"]["half_width"] > 0 for row in found["settings"])
