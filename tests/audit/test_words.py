"""Measuring and looking back find records; every sentence about them is made in ``present``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from truestep.audit import subjects
from truestep.audit.measure.findings import Cause, Differences, Finding, Verdict, cause
from truestep.audit.present.past import NOTES, REASONS, SETTINGS
from truestep.audit.present.words import SENTENCES, row_of, sentence

AUDIT = subjects.FOLDER.parent


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def strings(room: str) -> Iterator[tuple[str, str]]:
    """(file, text) of every string that is no docstring and is not raised."""
    for path in sorted((AUDIT / room).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = [s for s in ast.walk(tree) if isinstance(s, ast.Raise) or _is_docstring(s)]
        skipped = {id(n) for statement in statements for n in ast.walk(statement)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                yield path.name, node.value


@pytest.mark.parametrize("room", ["measure", "measure/rl", "postmortem"])
def test_no_sentence_is_made_where_something_is_found(room: str) -> None:
    """But for what makes a file unreadable."""
    subject_names = {subject.name for subject in subjects.TABLE}
    told = [
        pair for pair in strings(room) if not pair[1].startswith("https://") and pair[1] not in subject_names
    ]
    found = [pair for pair in told if len(re.findall(r"\b[a-z]{2,}\b", pair[1])) > 3]
    assert [pair for pair in found if pair[0] not in ("run_files.py", "pins.py")] == []


def test_every_kind_has_its_sentence_and_every_sentence_its_kind() -> None:
    measured = {
        text for room in ("measure", "measure/rl", "environments", "../guard") for _, text in strings(room)
    }
    looked_back = {text for _, text in strings("postmortem")}
    command = (AUDIT.parent / "cli" / "audit_actions.py").read_text(encoding="utf-8")
    resumes = {kind for kind in SENTENCES if kind.startswith("resume_")}  # put together from their parts
    unused = {kind for kind in SENTENCES if kind not in measured and f'"{kind}"' not in command} - resumes
    assert unused <= {
        "no_observation",
        "unreadable",
        "ranks_missing",
        "ranks_disagree",
        "no_row_found",
        "said",
    }
    assert {kind for kind in (*REASONS, *NOTES, *SETTINGS) if kind not in looked_back} == set()


def test_a_cause_names_its_case_and_both_of_its_readings() -> None:
    both = cause("rank_factor", "ranks_summed", "accumulation_missing")
    assert (
        sentence(both)
        == "summed over ranks instead of averaged or the division by the accumulation steps is missing"
    )
    assert sentence(cause("", "case_not_run", why="no", case="resumed")) == "resumed: not run (no)"


def test_what_single_steps_show_is_said_once() -> None:
    twice = Differences(
        steps=((cause("scale", "scale", scale=2.00001),), (cause("scale", "scale", scale=2.00002),)),
        in_every_step=False,
    )
    finding = Finding(subject="x", configuration={}, verdict=Verdict.FAULT, found=twice)
    assert row_of(finding)["fault"] == "everything is multiplied by 2 (not in every step)"


def test_a_documented_choice_names_its_option() -> None:
    found = Differences(steps=((Cause(code="rank_mean", kinds=("rank_mean",)),),))
    finding = Finding(
        subject="x",
        configuration={},
        verdict=Verdict.DOCUMENTED_CHOICE,
        found=found,
        documented="option = false",
    )
    assert row_of(finding)["fault"] == "rank-wise mean (option = false)"


ADAPTER = """
import harness
import framework_that_is_not_installed

SUBJECTS = [
    {"name": "a framework", "needs": ["framework", "torch"], "processes": [1, 2], "cases": ["ENGINE", "clipped"],
     "without": {"scheduled, resumed": "it has none"}, "configurations": [{"arch": "llama"}, {"arch": "gpt2"}]},
]
"""


def test_a_subject_is_one_file(tmp_path: Path) -> None:
    """Its adapter is found by being there, and read without importing the framework."""
    (tmp_path / "framework_loop.py").write_text(ADAPTER)
    (subject,) = subjects.read(tmp_path)
    assert (subject.name, subject.script, subject.needs) == (
        "a framework",
        "framework_loop",
        ("framework", "torch"),
    )
    assert [c.to_json() for c in subject.configurations] == [
        {"arch": arch, "processes": n} for arch in ("llama", "gpt2") for n in (1, 2)
    ]
    assert subject.configurations[0].only == ("ragged", "unsplit", "masked", "whole", "clipped")
    assert dict(subject.configurations[0].without) == {"scheduled": "it has none", "resumed": "it has none"}
    adapters = {
        p.stem for p in subjects.FOLDER.glob("*.py") if "SUBJECTS = " in p.read_text(encoding="utf-8")
    }
    assert {s.script for s in subjects.TABLE} == adapters - {"__init__", "harness"}
