"""Documents that are made by a program are up to date: parts of the README, the picture, docs/metrics.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import readme_figures  # noqa: E402
import terminal  # noqa: E402


@pytest.mark.parametrize("path", list(readme_figures.files()), ids=lambda p: p.name)
def test_a_made_document_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == readme_figures.files()[path], (
        "run benchmarks/readme_figures.py"
    )


@pytest.mark.parametrize("path", list(terminal.files()), ids=lambda p: p.name)
def test_a_session_is_drawn_as_it_was(path: Path) -> None:
    made = terminal.files()[path]
    assert path.read_text(encoding="utf-8") == made, "run benchmarks/terminal.py"
    assert "url(" not in made
    assert "href" not in made


def test_the_readme_is_short() -> None:
    assert len(readme_figures.README.read_text(encoding="utf-8").split()) <= 800


def test_every_stack_has_a_row() -> None:
    text = readme_figures.README.read_text(encoding="utf-8")
    assert len(readme_figures.STACKS) == 8
    assert all(f"| {stack.name} |" in text for stack in readme_figures.STACKS)
