"""The terminal table: readable at 80 columns, whatever is in it."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from truestep.audit.measure.findings import Finding, Verdict, cause
from truestep.audit.postmortem.answers import Answer
from truestep.audit.postmortem.measured import MEASURED
from truestep.audit.present.table import BLOCKS, answers_table, bar, bars, findings_table
from truestep.audit.present.words import Row, row_of


def shown(renderable: Any, width: int = 80, colour: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if colour else None
    Console(file=file, width=width, highlight=False, force_terminal=colour, color_system=system).print(
        renderable
    )
    return file.getvalue()


def finding(**more: Any) -> Row:
    values: dict[str, Any] = {
        "subject": "deepspeed==0.18.9",
        "configuration": {"zero_stage": 2, "offload": "cpu", "accumulation": 4},
        "verdict": Verdict.FAULT,
        "fault": "the intermediate micro-batches are dropped",
        "versions": {"torch": "2.13.0", "deepspeed": "0.18.9"},
        "tokens": [[2, 27, 3, 17]],
        "weights": [[1.0, 0.0, 0.0, 1.0]],
        "relative_error": 0.69,
        "residual": 1e-6,
        "logged_loss": 4.16,
        "true_loss": 4.16,
        "logged_loss_could_show_it": False,
    }
    return {**row_of(Finding(subject="", configuration={}, verdict=Verdict.FAULT)), **values, **more}


def test_a_fault_tells_all_that_it_should() -> None:
    text = shown(findings_table([finding()]))
    for words in (
        "deepspeed==0.18.9",
        "ZeRO-2, offload cpu",
        "FAULT",
        "intermediate micro-batches",
        "torch 2.13.0",
    ):
        assert words in text
    rows = {row.split()[0]: row.split()[1:] for row in text.splitlines() if row.split()}
    assert rows["weight"] == ["1", "0", "0", "1"]
    assert rows["tokens"] == ["2", "27", "3", "17"]
    assert "relative error 0.69" in text
    assert "could not have shown the fault" in " ".join(text.split())


def test_each_bar_stands_above_its_number() -> None:
    _, drawn, numbers, counts = (line.plain for line in bars(finding(weights=[[1, 0], [0.5, 6]]), 76))
    for column, (block, number) in enumerate([("███", "1"), (" ·", "0"), ("▄▄▄", "0.5"), ("███▲", "6")]):
        at = 8 + 7 * column
        assert drawn[at : at + 7].rstrip() == block
        assert numbers[at : at + 7].rstrip() == number
    assert counts.split() == ["tokens", "2", "27"]  # those of rank 1 are not known


def test_bars_grow_with_the_weight() -> None:
    heights = [BLOCKS.index(bar(w / 100)[0]) for w in range(5, 101)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 7)
    assert bar(math.nan).strip() == bar(None).strip() == "?"
    assert len({bar(w) for w in (0.0, 0.4, 1.0, 1.5, -0.5)}) == 5


@pytest.mark.parametrize("width", [60, 80, 132])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    wide = finding(
        subject="x" * 100,
        fault="y" * 300,
        configuration={"z" * 90: "z" * 90},
        tokens=[list(range(1, 41)), [5, 6]],
        weights=[[1234.5] * 40, [-0.333, 1e-9]],
    )
    text = shown(findings_table([wide, finding()], width), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert text.count("1234") == 40 if width > 60 else text.count("1234") >= 40
    assert text.count("x") == 100


def test_a_rank_is_not_broken_where_it_fits() -> None:
    heads = [t.plain.split() for t in bars(finding(weights=[[1.0] * 6] * 3, tokens=[[5] * 6] * 3), 76)]
    assert [line for line in heads if line[0] == "rank"] == [["rank", "0"], ["rank", "1"], ["rank", "2"]]
    assert max(len(line) for line in heads) == 7


def test_verdicts_have_colours_and_right_weights_are_green() -> None:
    text = shown(findings_table([finding(), finding(verdict=Verdict.RIGHT, fault="")]), colour=True)
    assert "\x1b[1;31mFAULT" in text
    assert "\x1b[32mRIGHT" in text
    fault_bars = next(line for line in text.splitlines() if "███" in line)
    assert "\x1b[32m███" in fault_bars  # the ones that count
    assert "\x1b[1;31m ·" in fault_bars


def test_a_right_row_says_nothing_about_the_loss() -> None:
    text = shown(findings_table([finding(verdict=Verdict.RIGHT, fault="", weights=[[1.0]])]))
    assert "logged" not in text
    assert "every token counts once" in text
    assert "1 finding: 1 RIGHT" in text


def test_what_did_not_run_gives_its_reason() -> None:
    missing = cause("", "said", text="no module named trl")
    absent = Finding(subject="trl", configuration={}, verdict=Verdict.NOT_RUN, reasons=(missing,))
    text = shown(findings_table([row_of(absent)]))
    assert "NOT RUN" in text
    assert "no module named trl" in text
    assert "weight" not in text


def test_cases_that_differ_are_told_apart() -> None:
    text = shown(
        findings_table([finding(cases={"ragged": "", "masked": "the parameters are no longer finite"})])
    )
    assert "case masked: the parameters are no longer finite" in text
    assert "right in: ragged" in text


def test_hostile_names_move_no_cursor_and_are_no_markup() -> None:
    evil = "[red]x[/red] \x1b[2J\x1b]0;owned\x07\u202e\x00 ]]> <script>"
    text = shown(
        findings_table([finding(subject=evil, fault=evil, versions={evil: evil}, configuration={evil: evil})])
    )
    assert not any(c in text for c in "\x1b\x07\u202e\x00")
    assert "[red]x[/red]" in text
    assert "⟨U+001B⟩" in text


def test_answers_about_a_past_run() -> None:
    fault = next(m for m in MEASURED if m.subject == "DeepSpeed")
    answers = [
        Answer(measured=fault, answer=word, reasons=(cause("", "said", text="because \x1b[1m"),))
        for word in ("affected", "affected if", "not affected", "unknown")
    ]
    text = shown(answers_table(answers))
    assert text.count(fault.subject) == text.count("because ⟨U+001B⟩[1m") == 4
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert [
        text.index(f"\n {word}  ") for word in ("affected", "affected if", "unknown", "not affected")
    ] == sorted(text.index(f"\n {word}  ") for word in ("affected", "affected if", "unknown", "not affected"))
    assert text.count("fix: ") >= 2


def test_packages_that_no_file_names_are_one_row() -> None:
    answers = [
        Answer(measured=m, answer="unknown", reasons=(cause("", "not_pinned", package=m.package, asked=""),))
        for m in MEASURED
    ]
    text = " ".join(shown(answers_table(answers)).split())
    for package in {m.package for m in MEASURED}:
        assert text.count(f" {package}") == 1
    asked = cause("", "not_pinned", package=MEASURED[0].package, asked="r.txt: x>=1")
    assert MEASURED[0].subject in shown(
        answers_table([Answer(measured=MEASURED[0], answer="unknown", reasons=(asked,))])
    )


def test_nothing_audited() -> None:
    assert "nothing was audited" in shown(findings_table([]))
