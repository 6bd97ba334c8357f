"""The tree does what the recorded commit did: the same bytes after every step on the same kind of machine, the
same values at 1e-6 elsewhere.

A change that is meant to move a number says so: in ``golden.MOVED`` with the reason if one value was wrong, or with
a new record (``python tests/golden/golden.py record``, from a clean tree) if the updates themselves change.
"""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import golden
import pytest


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return golden.run_tree(golden.SRC, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    runs, _, _ = golden.read_record()
    return runs


@pytest.mark.parametrize("run", golden.RUNS)
def test_a_run_is_the_recorded_one(run: str, now: dict[str, Any], recorded: dict[str, Any]) -> None:
    _, hashes, tolerance = golden.read_record()
    found = golden.differences({run: recorded[run]}, now, hashes, tolerance)
    assert found == [], "\n".join(found)


def test_the_machinery_of_the_methods_was_at_work(recorded: dict[str, Any]) -> None:
    """A record of runs in which nothing happens would hold nothing."""

    def most(run: str, key: str) -> float:
        return max(abs(step["values"].get(key, 0.0)) for step in recorded[run])

    assert all(most(run, "grad_norm") > 0 for run in recorded)
    sampling = [run for run, steps in recorded.items() if "rl" in steps[0]["at"]]
    assert len(sampling) > 10
    assert all(most(run, "mixed_groups") > 0 for run in sampling)
    assert recorded["start"][-2]["values"]["loss"] < recorded["start"][0]["values"]["loss"] / 2
    for run, key in (
        ("demonstration", "expert/share"), ("prefix", "expert/share"), ("stream", "loss/sft"),
        ("switch", "loss/sft"),
        ("replay", "loss/replay"), ("buffer", "buffer/grad_norm"), ("refill", "completions/truncated"),
        ("reference", "loss/kl"), ("rejection", "work/rollout_tokens"), ("rl", "loss/entropy"),
    ):  # fmt: skip
        assert most(run, key) > 0, f"{run}: {key} stayed 0"
    assert len({step["values"]["control/policy"] for step in recorded["controller"][:-1]}) == 3
    # What is the same until a method's own rule is needed must then part.
    for run in ("hint", "branch"):
        assert most(run, "work/generated_pairs") != most("reference", "work/generated_pairs")


def test_a_change_is_seen(recorded: dict[str, Any]) -> None:
    assert golden.differences(recorded, recorded, True) == []
    for change in ("bytes", "value", "gone", "short"):
        other = copy.deepcopy(recorded)
        step = other["rl"][1]
        if change == "bytes":
            step["sha256"] = "0" * 32
            assert golden.differences(recorded, other, False) == []
        elif change == "value":
            step["values"]["loss"] *= 1 + 3e-6
        elif change == "gone":
            del step["values"]["loss"]
        else:
            other["rl"].pop()
        found = golden.differences(recorded, other, True)
        assert len(found) == 1
        assert found[0].startswith("rl: ")


def test_a_record_needs_a_clean_tree_and_one_thread(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    (tmp_path / "golden").mkdir()
    golden.require_clean(tmp_path)
    (tmp_path / "a.py").write_text("a = 2\n")
    with pytest.raises(SystemExit, match=r"a.py is not committed"):
        golden.record(tmp_path)
    with pytest.raises(SystemExit, match="2 threads"):
        golden.require_one_thread(2, "run")
