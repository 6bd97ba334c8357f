"""Who may import whom, and what the base package must not import at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from source_tree import PACKAGE, ROOT, modules, short

from truestep.objective.methods import METHODS

HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "pyarrow",
    "datasets",
    "math_verify",
    "gguf",
)


def test_imports_go_downward_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_room_has_its_layer() -> None:
    """A new folder that the contract does not name would be bound by nothing."""
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    named = {
        word for word in contract.replace('"', " ").replace(",", " ").split() if word.startswith("truestep.")
    }
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    rooms |= {p.stem for p in PACKAGE.glob("*.py") if not p.name.startswith("__")}
    assert rooms == {name.removeprefix("truestep.") for name in named}


def imported(statement: str) -> set[str]:
    """The heavy packages that a statement brings into a fresh interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


BASE = """
import truestep, truestep.records, truestep.settings, truestep.rundir, truestep.seeding, truestep.flops
import truestep.signals, truestep.report.html, truestep.report.tables, truestep.report.figures
import truestep.grade.score, truestep.grade.extract, truestep.grade.equivalent, truestep.data.problems
import truestep.data.procedural, truestep.data.chat, truestep.evaluate.estimate, truestep.evaluate.compare
import truestep.cli.main, truestep.cli.run, truestep.cli.data, truestep.cli.report
import truestep.cli.study, truestep.report.study
import truestep.study.plan, truestep.study.run, truestep.study.table, truestep.study.analyse, truestep.study.budget
import truestep.study.estimate, truestep.study.cell_runner, truestep.study.cell_results, truestep.study.processes
import truestep.study.engines, truestep.study.resources
import truestep.rewards.scorer, truestep.rewards.worker, truestep.rewards.functions, truestep.rewards.judge
"""


def test_the_base_package_imports_nothing_heavy() -> None:
    assert imported(BASE) == set()


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["study", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    statement = f"""
import sys
from truestep.cli.main import main
sys.argv = ["truestep", *{words!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert imported(statement) == set()


def test_heavy_imports_would_be_seen() -> None:
    assert "torch" in imported("import truestep.rollout.sampling")


def test_only_device_names_an_accelerator() -> None:
    guilty = [
        f"{short(path)}:{number}"
        for path in modules()
        # The second is the one place where processes of two environments meet; it imports nothing of the package.
        if short(path) not in ("device.py", "rollout/tensor_group.py")
        and not short(path).startswith("audit/")  # which hides accelerators from what it audits
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "cuda" in line.lower() or '"mps"' in line or "nccl" in line.lower()
    ]
    assert guilty == []
    assert "cuda" in (PACKAGE / "device.py").read_text()


def test_the_training_step_knows_no_method() -> None:
    """A method is a row of a table; below the table no name of one decides anything."""
    assert len(METHODS) > 30
    guilty = [
        f"{short(path)}: {name}"
        for path in modules("train") + modules("rollout")
        for name in METHODS
        if re.search(rf"""(["']){name}\1""", path.read_text())
    ]
    assert guilty == []
