"""Write what a run prints, at 80 columns, into docs/run.md, from a real run of the recipe on that page.

    python benchmarks/run_output.py

Held by: tests/e2e/test_run_output.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

from truestep.rundir import write_atomic

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/run.md"
WORTHLESS = ("--set", "stages.sft.optimizer.lr=1.0")  # much too large
PARTS = {"right": (), "worthless": WORTHLESS}


def recipe(page: str) -> str:
    return page.partition("```toml\n")[2].partition("```")[0]


def printed(text: str, *words: str) -> str:
    """Return what ``truestep run`` prints for a recipe, on stderr and stdout together, at 80 columns."""
    from truestep.cli.main import main

    said, argv, columns = io.StringIO(), sys.argv, os.environ.get("COLUMNS")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("sums.toml").write_text(text)
        sys.argv, os.environ["COLUMNS"] = ["truestep", "run", "sums.toml", "--out", "runs/sums", *words], "80"
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                main()
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(said.getvalue()) from None
        finally:
            sys.argv = argv
            del os.environ["COLUMNS"]
            if columns is not None:
                os.environ["COLUMNS"] = columns
    command = " ".join(["$ truestep run sums.toml --out runs/sums", *words])
    lines = [line.rstrip() for line in said.getvalue().splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if words and line.startswith("sft: method")), 0)
    return "\n".join([command, *(["..."] if start else []), *lines[start:]])


def filled(page: str) -> str:
    """Return the page with the output of fresh runs."""
    for name, words in PARTS.items():
        begin, end = f"<!-- {name}: benchmarks/run_output.py -->", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n```\n{printed(recipe(page), *words)}\n```\n{end}{after}"
    return page


def without_numbers(page: str) -> str:
    """Return the page with every number as # and single spaces, because speeds and times differ between runs."""
    return re.sub(r"[ \t]+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?", "#", page))


if __name__ == "__main__":
    write_atomic(PAGE, filled(PAGE.read_text(encoding="utf-8")))
