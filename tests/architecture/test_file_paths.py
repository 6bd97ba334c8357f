"""No room reads another room's files by path: import-linter cannot see such a dependency."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGE, modules, short

# Strings that name a folder of files; a room names its own only.
DATA_FOLDERS = {
    str(folder.relative_to(PACKAGE))
    for folder in PACKAGE.rglob("*")
    if folder.is_dir() and folder.name != "__pycache__" and not (folder / "__init__.py").exists()
}


def room(path: Path) -> str:
    """The folder that a file belongs to: of a package in rooms (audit) the room, else the package."""
    parts = path.relative_to(PACKAGE).parts[:-1]
    return "/".join(parts[: 2 if parts[:1] == ("audit",) else 1])


def climbs(node: ast.AST) -> int | None:
    """How many folders above its own file an expression of ``__file__`` points; None: it is none."""
    if isinstance(node, ast.Name) and node.id == "__file__":
        return -1
    if isinstance(node, ast.Attribute) and node.attr == "parent":
        inner = climbs(node.value)
        return None if inner is None else inner + 1
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "parents"
    ):
        inner = climbs(node.value.value)
        index = ast.literal_eval(node.slice)
        return None if inner is None else inner + 1 + index
    if isinstance(node, ast.Call):
        over = [*node.args, node.func.value] if isinstance(node.func, ast.Attribute) else node.args
        return max((n for n in map(climbs, over) if n is not None), default=None)
    return None


def foreign_paths(path: Path, text: str) -> Iterator[str]:
    """Every path of another room in a module: climbed to, named, or asked of importlib.resources."""
    own = room(path)
    depth = len(path.relative_to(PACKAGE).parts) - 1 - len(own.split("/")) if own else 0
    nodes = list(ast.walk(ast.parse(text)))
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("truestep")]
    ours = {alias.asname or alias.name for n in imports for alias in n.names}
    for node in nodes:
        where = f"{short(path)}:{getattr(node, 'lineno', 0)}"
        levels = climbs(node) if isinstance(node, ast.Attribute | ast.Subscript) else None
        # What holds the package is where children import it from, and is no room.
        if levels is not None and levels > depth and path.parents[levels] != PACKAGE.parent:
            yield f"{where} {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr == "__file__" and ast.unparse(node.value) in ours:
            yield f"{where} {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("resources.files", "find_spec")):
            named = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if any(n.startswith("truestep") and not room_of_module(n).startswith(own) for n in named):
                yield f"{where} {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            for folder in DATA_FOLDERS:
                if folder in node.value and "/" in folder and not folder.startswith(f"{own}/"):
                    yield f"{where} {node.value!r}"


def room_of_module(name: str) -> str:
    return "/".join(name.split(".")[1:])


# The child process of an audit is given the recorder as a file, since it cannot import this package.
ALLOWED = {"audit/environments/launch.py cases.__file__"}


def test_no_file_path_leads_into_another_room() -> None:
    found = [line for path in modules() for line in foreign_paths(path, path.read_text(encoding="utf-8"))]
    assert [f for f in found if f"{f.partition(':')[0]} {f.partition(' ')[2]}" not in ALLOWED] == []


@pytest.mark.parametrize(
    "line",
    [
        'T = Path(__file__).parents[2] / "report" / "templates"',
        'T = Path(__file__).parent.parent / "report"',
        'T = Path(__file__).resolve().parents[1] / "measure"',
        'T = importlib.resources.files("truestep.report") / "templates"',
        'T = ROOT / "report/templates"',
        "from truestep.report import html\nT = Path(html.__file__).parent",
    ],
)
def test_a_path_into_another_room_would_be_seen(line: str) -> None:
    assert list(foreign_paths(PACKAGE / "audit" / "present" / "page.py", line))


def test_a_path_into_the_own_room_is_fine() -> None:
    own = 'T = Path(__file__).parent / "templates"'
    assert list(foreign_paths(PACKAGE / "audit" / "present" / "page.py", own)) == []
