"""measured.json, docs/stack/ and docs/findings.md are what the results say; what no table has is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import pages
import stack
import stack_data
import stack_pages

from truestep.audit.postmortem import measured
from truestep.audit.present.past import conditions_in_words, fixes, releases_in_words


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return stack.files()


def test_the_files_are_up_to_date(made: dict[Path, str]) -> None:
    old = [p.name for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    assert old == [], "run benchmarks/stack.py"
    assert {p for p in made if p.parent == stack_pages.PAGES} == set(stack_pages.PAGES.iterdir())


def test_every_fault_is_on_its_page_and_in_the_index(made: dict[Path, str]) -> None:
    index = made[stack_pages.PAGES / "README.md"]
    for fault in measured.MEASURED:
        text = made[stack_pages.PAGES / stack_pages.file_of(fault.package)]
        part = text.split(f"\n## {stack_pages.heading(fault)}\n")[1].split("\n## ")[0]
        told = [*fault.faulty, *fault.right, *conditions_in_words(fault), *fixes(fault), *fault.links]
        assert [words for words in told if words not in part] == []
        assert {stack_pages.weights(m) for m in fault.shown if m.kinds == fault.kinds} <= set(
            re.findall(r"\| ([^|]+) \|\n", part)
        )
        assert f") {releases_in_words(fault)}, {stack_pages.heading(fault)}\n" in index


def test_every_audited_package_has_a_page_with_its_files(made: dict[Path, str]) -> None:
    for m in measured.load():
        text = made[stack_pages.PAGES / stack_pages.file_of(m.package)]
        assert f"(../../{m.file})" in text
        if m.verdict in measured.UNSEEN:
            assert "## Not measured" in text
        elif m.verdict not in measured.FAULTY:
            right = text.split("## Right")[1]
            assert m.version in right
    for fault in measured.MEASURED:
        for m in fault.through:
            text = made[stack_pages.PAGES / stack_pages.file_of(m.package)]
            assert f"\n## Through {stack_pages.heading(fault)}\n" in text


def test_every_link_to_a_file_leads_to_one(made: dict[Path, str]) -> None:
    for path, text in made.items():
        if path.suffix == ".md":
            for link in re.findall(r"\]\(((?!https:)[^)]+)\)", text):
                file, _, heading = link.partition("#")
                target = path.parent / file
                assert target.exists(), (path.name, link)
                titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M) if heading else []
                assert heading in ["", *(t.lower().replace(" ", "-") for t in titles)], (path.name, link)


def test_releases_are_shown_as_ranges() -> None:
    (offload,) = [m for m in measured.MEASURED if m.kinds == ("kept_first_and_last",)]
    low, high = offload.faulty[0], offload.faulty[-1]
    assert releases_in_words(offload) == f"{low} to {high}"
    steps = [
        measured.Measurement(
            subject="DeepSpeed",
            versions={"deepspeed": version},
            configuration={},
            verdict="FAULT" if faulty else "RIGHT",
            kinds=("kept_last",) * faulty,
        )
        for version, faulty in (("1.0", True), ("1.1", False), ("1.2", True), ("1.10", True), ("1.11", False))
    ]
    (again,) = measured.faults(steps)
    assert releases_in_words(again) == "1.0, 1.2 to 1.10"
    assert fixes(again) == ["deepspeed 1.11"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A result that may be changed and is then written by ``refused``."""
    monkeypatch.setattr(stack_data, "RESULTS", tmp_path)
    monkeypatch.setattr(stack_data, "ROOT", tmp_path)
    monkeypatch.setattr(stack_data, "BISECTED", tmp_path / "none")
    path = stack_pages.ROOT / "results/audit/verl-0.6.0.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document["to"] = tmp_path / "verl.json"
    return document


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    document.pop("to").write_text(json.dumps(document))
    return list(stack_data.measurements())


def test_a_key_without_a_condition_is_refused(results: dict[str, Any]) -> None:
    results["findings"][0]["configuration"]["adapters"] = True
    with pytest.raises(
        stack_data.Incomplete, match=r"verl.json: add how a run's files show 'adapters' to KEYS"
    ):
        rows(results)


def test_a_faulty_subject_without_a_trainer_is_refused(results: dict[str, Any]) -> None:
    results["findings"][0]["subject"] = "TRL GRPO"
    with pytest.raises(stack_data.Incomplete, match="add 'TRL GRPO' to TRAINERS"):
        rows(results)


def test_a_fault_without_a_kind_is_refused(results: dict[str, Any]) -> None:
    results["findings"][0]["fault"] = "something new"
    with pytest.raises(stack_data.Incomplete, match="'something new' is not a sentence"):
        rows(results)


def test_causes_say_the_kinds_of_a_new_result(results: dict[str, Any]) -> None:
    found = results["findings"][0]
    found["causes"] = [{"code": "x", "kinds": ["advantages_of_rank"], "values": {}}]
    found["fault"] = "advantages are normalised by rank"
    found["cases"]["unsplit"] = ""
    row = rows(results)[0]
    assert (row["kinds"], row["unsplit"]) == (["advantages_of_rank"], [])
    (one, *_) = measured.faults([measured.parse(json.dumps({"measurements": [row]}))[0]])
    assert stack_pages.heading(one) == "verl agg_loss (function level): advantages are normalised by rank"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("the intermediate micro-batches are dropped, and mean of micro-batch means", ["kept_first_and_last", "micro_mean"]),
        ("rank-wise mean (average_tokens_across_devices = false)", ["rank_mean"]),
        ("everything is multiplied by 3 (not in every step)", ["scale"]),
        ("micro-batches are dropped (rank 0: 1, 2; rank 1: 2, 3)", ["dropped"]),
        ("data is lost: 4 rows reached no optimizer step; steps were taken after 4, 4 micro-batches, asked for were 4, 2",
         ["rows_lost", "step_sizes"]),
    ],
)  # fmt: skip
def test_the_kinds_of_older_results(text: str, kinds: list[str]) -> None:
    assert stack_data.kinds_of({"subject": "x", "fault": text}, text) == kinds


def test_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    codes = []
    for words in (["--check"], [], ["--check"]):
        monkeypatch.setattr(sys, "argv", ["stack.py", *words])
        with pytest.raises(SystemExit) as ended:
            pages.write_or_check("", lambda: {page: "new"})
        codes.append((ended.value.code, page.exists()))
    assert codes == [(1, False), (0, True), (0, True)]
