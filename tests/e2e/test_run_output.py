"""docs/run.md shows what a run prints today, at 80 columns."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import run_output


def test_the_page_shows_what_a_run_prints() -> None:
    page = run_output.PAGE.read_text(encoding="utf-8")
    fresh = run_output.filled(page)
    assert run_output.without_numbers(fresh) == run_output.without_numbers(page), (
        "run benchmarks/run_output.py"
    )
    blocks = [part.partition("-->")[2].partition("<!--")[0] for part in fresh.split("run_output.py")[2:]]
    assert len(blocks) == 2
    assert max(len(line) for block in blocks for line in block.splitlines() if "warning" not in line) <= 80
