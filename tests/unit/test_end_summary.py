"""How a run ended is in its summary, and what a stage exports is said with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from truestep.evaluate.files import end_summary
from truestep.pipeline.shown import exported, head, row
from truestep.rundir import read_json, write_json

SECRET = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        ("failed", ValueError(f"no {SECRET}\nand more"), {"status": "failed", "error": "no <redacted>"}),
        ("failed", ValueError(), {"status": "failed", "error": "ValueError"}),
        ("failed", KeyboardInterrupt(), {"status": "interrupted"}),
        ("killed", "", {"status": "killed"}),
    ],
)
def test_the_end_of_a_run_is_in_its_summary(
    status: str, error: Any, expected: dict[str, str], tmp_path: Path
) -> None:
    write_json(tmp_path / "summary.json", {"name": "a", "status": "running"})
    end_summary(tmp_path, status, error)
    found = read_json(tmp_path / "summary.json")
    assert SECRET not in str(found)
    assert found.keys() == {"name", *expected}
    assert found["status"] == expected["status"]
    assert found.get("error", "").startswith(expected.get("error", "").partition(" ")[0])


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_summary_that_is_not_one_is_left_alone(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    if text is not None:
        path.write_text(text)
    end_summary(tmp_path, "failed", "why")
    assert (path.read_text() if path.exists() else None) == text


@pytest.mark.parametrize(
    ("watched", "best", "expected"),
    [
        ((), {}, (9, "the last")),
        (("dev",), {}, (9, "the last, because dev.select_best is off")),
        (("dev",), {"step": 4, "score": 0.25}, (4, "the best dev score, 0.250")),
        (("validation",), {"step": 3, "loss": 1.5}, (3, "the lowest validation loss, 1.5000")),
    ],
)
def test_which_step_is_exported_and_why(
    watched: tuple[str, ...], best: dict[str, float], expected: tuple[int, str]
) -> None:
    spec: Any = SimpleNamespace(settings=SimpleNamespace(watched_data=watched))
    assert exported(spec, 9, best) == expected


def test_a_row_has_its_numbers_below_their_headings() -> None:
    metrics = {"loss": 1.25, "learning_rate": 1e-3, "grad_norm": 2.0, "num_tokens": 600.0, "dev/score": 0.5}
    titles = head("sft", ["dev", "validation"])
    numbers = str(row("sft", ["dev", "validation"], metrics, 2.0))
    ends = {title: titles.index(title) + len(title) for title in titles.split() if title != "memory"}
    found = {title: numbers[:end].split()[-1] for title, end in ends.items()}
    assert found == {
        "loss": "1.2500",
        "lr": "1.0e-03",
        "grad": "2",
        "tok/s": "300",
        "dev": "0.500",
        "val": "–",
    }
    assert len(head("rl", ["dev"])) <= 80
