"""The package as files and syntax trees, for the tests that look at how it is written."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "truestep"


def modules(under: str = "") -> list[Path]:
    found = sorted((PACKAGE / under).rglob("*.py")) if (PACKAGE / under).is_dir() else [PACKAGE / under]
    assert found, under
    return found


def short(path: Path) -> str:
    return str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def function(path: Path, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    (found,) = [f for f in functions(path) if f.name == name]
    return found


def methods_called(node: ast.AST) -> set[str]:
    """Names after a dot that are called: {"mean"} in ``x.mean(1)`` and in ``torch.mean(x)``."""
    return {
        n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }


def divisions(node: ast.AST) -> list[ast.BinOp | ast.AugAssign]:
    """Every ``/`` and ``/=`` outside f-strings (a path's ``/`` looks the same: count only where there are
    none)."""
    return [
        n for n in ast.walk(node) if isinstance(n, ast.BinOp | ast.AugAssign) and isinstance(n.op, ast.Div)
    ]


def code_tokens(path: Path) -> Iterator[tuple[int, str]]:
    """(line, token) without comments and without strings: what the interpreter runs."""
    skipped = {
        tokenize.COMMENT,
        tokenize.STRING,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
    }
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in skipped:
            yield token.start[0], token.string


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
