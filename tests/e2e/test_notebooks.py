"""The example notebooks: every cell is Python, the outputs are of this code, and (slow) they run from an empty folder."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import notebooks


def cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert len(cells(notebook)) > 5
    assert [cell["execution_count"] for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
    kinds = [output["output_type"] for cell in cells(notebook) for output in cell["outputs"]]
    assert "error" not in kinds
    assert "display_data" in kinds
    for cell in cells(notebook):
        source = "".join(cell["source"])
        if source.startswith("!"):
            assert source.startswith("!truestep ")
        else:
            ast.parse(source.partition("\n")[2] if source.startswith("%%writefile") else source)
    for private in (str(Path.home()), str(notebooks.ROOT), "/tmp/"):
        assert private not in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    """In an empty folder, with the kernel of a separate environment."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    fresh = notebooks.executed(path)
    assert [cell["source"] for cell in fresh["cells"]] == [cell["source"] for cell in kept["cells"]]
    for old, new in zip(cells(kept), cells(fresh), strict=True):
        assert [o["output_type"] for o in new["outputs"]] == [o["output_type"] for o in old["outputs"]]
