"""What the words of the project promise exists: tests named in docstrings, recipes, links."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from source_tree import PACKAGE, ROOT, docstrings, modules, short

from truestep.rundir import to_toml
from truestep.settings import load_settings, parse_settings

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
MOST_KEYS = 25
HELD = re.compile(r"Held by:\s*((?:[\w/]+\.py(?:\s*\([^)]*\))?[,;\s]*)+)", re.DOTALL)


def held_by() -> Iterator[tuple[str, str]]:
    for path in modules():
        for text in docstrings(path):
            for match in HELD.finditer(text):
                for named in re.findall(r"[\w/]+\.py", match[1]):
                    yield short(path), named


def test_every_test_that_a_docstring_names_exists() -> None:
    pairs = list(held_by())
    assert len(pairs) >= 7
    missing = sorted({f"{where}: {named}" for where, named in pairs if not (ROOT / named).is_file()})
    assert missing == []
    mentions = sum(text.count("Held by:") for path in modules() for text in docstrings(path))
    assert mentions == sum(len(HELD.findall(text)) for path in modules() for text in docstrings(path)), (
        "a form unread"
    )


def keys(table: Any, path: str = "") -> set[str]:
    """The different settings that a TOML document sets; two stages that set the same one set one."""
    if isinstance(table, dict):
        return {key for name, value in table.items() for key in keys(value, f"{path}.{name}")}
    if isinstance(table, list) and table and all(isinstance(v, dict) for v in table):
        return {key for entry in table for key in keys(entry, path)}
    return {path}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_loads_and_comes_back(path: Path) -> None:
    settings = load_settings(path)
    assert (
        parse_settings(tomllib.loads(to_toml(settings.model_dump(mode="json"))), where="resolved") == settings
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_sets_little(path: Path) -> None:
    """The data tables are left out: a run that names more data is not harder to understand."""
    raw = tomllib.loads(path.read_text())
    raw.pop("data", {})
    assert len(keys(raw)) <= MOST_KEYS


def documents() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.html"), *RECIPES]
    found += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *PACKAGE.rglob("*.py")]
    return [p for p in found if p != Path(__file__).resolve()]


FORBIDDEN = re.compile(
    r"issue #\d|/work/|helper session|/tmp/brief|TODO|FIXME|XXX|lorem ipsum", re.IGNORECASE
)


def test_the_project_speaks_of_itself_alone() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in documents()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if FORBIDDEN.search(line)
    ]
    assert guilty == []


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if (
                "://" not in target
                and not target.startswith("mailto:")
                and not (path.parent / target).exists()
            ):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []
