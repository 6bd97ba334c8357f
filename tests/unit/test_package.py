"""What the check of the built package finds, and that version, changelog and citation agree."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

import truestep

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import package  # noqa: E402

SOURCES = [
    "truestep/__init__.py",
    "truestep/py.typed",
    "truestep/testing/mutants.py",
    "truestep/testing/rl_mutant_parts.py",
]
METADATA = (
    b"""Metadata-Version: 2.4
Name: truestep
Version: 1
Summary: a
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.11
Author: a
Keywords: a
Classifier: Typing :: Typed

"""
    + b"Words and [a link](https://example.org). " * 50
)


def test_a_complete_wheel_is_accepted() -> None:
    wheel = ["truestep/__init__.py", "truestep/py.typed", "truestep-1.dist-info/METADATA"]
    assert package.wheel_faults(wheel, SOURCES) == []


def test_missing_and_superfluous_files_of_a_wheel_are_named() -> None:
    faults = package.wheel_faults(["truestep/__init__.py", "truestep/testing/mutants.py"], SOURCES)
    assert len(faults) == 2
    assert "lacks truestep/py.typed" in faults[0]
    assert "has truestep/testing/mutants.py" in faults[1]


def test_an_archive_with_results_or_without_documents_is_refused() -> None:
    names = [f"truestep-1/{name}/x" for name in package.ARCHIVE | package.ARCHIVE_ADDED]
    assert package.archive_faults(names) == []
    assert package.archive_faults([*names, "truestep-1/results/a.json"]) == ["the archive has results"]
    assert package.archive_faults([n for n in names if "docs" not in n]) == ["the archive lacks docs"]


def test_metadata_is_complete_and_links_lead_somewhere() -> None:
    assert package.metadata_faults(METADATA) == []
    for line in METADATA.split(b"\n\n")[0].splitlines()[1:]:
        key = line.split(b":")[0].decode()
        [fault] = package.metadata_faults(METADATA.replace(line + b"\n", b""))
        assert key.lower() in fault.lower()
    assert package.metadata_faults(METADATA + b"[a](docs/a.md) ![b](img/b.svg)") == [
        "the description links to docs/a.md",
        "the description links to img/b.svg",
    ]
    assert package.metadata_faults(METADATA[: METADATA.index(b"\n\n") + 2]) == [
        "the metadata lacks the README"
    ]


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"12345")
    assert package.size_fault(tmp_path / "a.whl", 5) == []
    assert package.size_fault(tmp_path / "a.whl", 4) != []


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_readme_on_a_package_index_has_no_relative_link(project: dict) -> None:
    """The substitutions of pyproject.toml, applied as hatch-fancy-pypi-readme applies them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
    assert "![" not in text
    assert "(https://arxiv.org/abs/2604.23747)" in text
    assert "truestep audit deepspeed==0.18.9" in text


def test_version_changelog_and_citation_agree(project: dict) -> None:
    assert "version" in project["project"]["dynamic"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == truestep.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == truestep.__version__
