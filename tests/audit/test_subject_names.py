"""Adapters import each other by bare names, which mypy does not follow, and few of them run in a test."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from truestep.audit.environments.in_process import subject_module
from truestep.audit.measure import recorder
from truestep.audit.subjects import FOLDER


def names_in(tree: ast.Module) -> set[str]:
    """Return the names that a module defines or imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(one.asname or one.name).partition(".")[0] for one in node.names}
    return found


def test_adapters_use_only_names_that_the_others_have() -> None:
    paths = [*FOLDER.glob("*.py"), Path(recorder.__file__)]
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    known = {name: names_in(tree) for name, tree in trees.items()}
    used, missing = 0, []
    for name, tree in trees.items():
        imported = {one.name for n in ast.walk(tree) if isinstance(n, ast.Import) for one in n.names} & set(
            known
        )
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in imported
            ):
                used += 1
                missing += [f"{name}: {node.value.id}.{node.attr}"] * (node.attr not in known[node.value.id])
    assert missing == []
    assert used > 100


def test_a_case_that_cannot_run_says_why(tmp_path: Path) -> None:
    def run(spec: Any) -> None:
        raise NotImplementedError(f"this release has no option {spec.lr}")

    subject_module("rl_harness").by_case(run)(SimpleNamespace(lr=2.0, case={"rate": 4.0}, folder=tmp_path))
    assert (tmp_path / "not-run.txt").read_text() == "NotImplementedError: this release has no option 8.0"
