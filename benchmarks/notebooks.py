"""Execute the notebooks from the first cell to the last, in an empty folder, and write their outputs into them.

    python benchmarks/notebooks.py [notebooks/first_run.ipynb …]

An error in a cell stops it, and the file stays as it was. Held by: tests/e2e/test_notebooks.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import interpreter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Runs in the environment with Jupyter's kernel.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def executed(path: Path) -> dict[str, Any]:
    """Return the notebook with fresh outputs. Raises RuntimeError with the last lines if a cell fails."""
    python = interpreter("notebooks", print)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.ipynb"
        work = Path(folder) / "work"
        work.mkdir()
        words = [str(python), "-c", EXECUTE, str(path), str(work), str(made)]
        path_of_commands = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path_of_commands}
        )
        if done.returncode:
            raise RuntimeError(f"{path.name}: {done.stderr[-2000:]}")
        notebook: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["metadata"] = {}  # times of execution
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def write(path: Path, notebook: dict[str, Any]) -> None:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, default=NOTEBOOKS)
    for given in parser.parse_args().paths:
        print(f"executing {given}", file=sys.stderr)
        write(given, executed(given))
