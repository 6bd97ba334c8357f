"""The page and the exports of a study: all there, escaped, and no statistic of their own."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from micro import STUDY
from test_run import Children, analysed, runner

from truestep import rundir
from truestep.errors import UserError
from truestep.report.study import read_cells, write_study
from truestep.report.study_tables import as_csv, contrast_table, latex, markdown
from truestep.study.run import run_cells

EVIL = "<script>alert(1)</script>|=1+1\\input{x}&%$#_{}~^"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    r = runner(folder, Children(fail="rejection-s2"))
    table = analysed(r)
    return folder / "out", table, run_cells(r)


def written(folder: Path, table: dict[str, Any], cells: dict[str, Any]) -> str:
    rundir.write_json(folder / "results.json", table)
    rundir.write_json(
        folder / "provenance.json", {"commit": "abc", "trainer_audit": "RIGHT: every token counts once"}
    )
    return write_study(folder, cells).read_text(encoding="utf-8")


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_what_a_reviewer_asks_for(study: Any) -> None:
    page = written(*study)
    parsed = Text()
    parsed.feed(page)
    text = " ".join(" ".join(parsed.text).split())
    table = study[1]
    for arm in table["arms"]:
        assert arm["name"] in text
    for words in ("together with this study: RIGHT: every token counts once", "does not want to",
                  "control: base", "p (Holm)", "Detectable", "rl-from-base", "no room for it",
                  "Content hash", "Unscored", "untuned: one rate is enough here", "incomplete", "1 of 2 seeds",
                  "rl.reward"):  # fmt: skip
        assert words in text, words
    contrast = table["contrasts"][0]
    assert f"{100 * contrast['all']['value']:+.1f} [{100 * contrast['all']['low']:+.1f}" in text
    assert parsed.tags.count("svg") >= 2 + 5
    assert "script" not in parsed.tags
    assert not re.search(r"(src|href)=\"(?!#)", page)


def test_all_text_is_escaped_everywhere(study: Any) -> None:
    folder, table, cells = study
    evil = json.loads(json.dumps(table).replace("one rate is enough here", json.dumps(EVIL)[1:-1]))
    evil = json.loads(json.dumps(evil).replace("does not want to", json.dumps(EVIL)[1:-1]))
    evil["question"] = EVIL
    evil["arms"][2]["name"] = EVIL
    page = written(folder, evil, cells)
    parsed = Text()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert "<script>" not in page
    assert "<script>" not in markdown(evil)
    assert "\\|=1+1" in markdown(evil)
    tex = latex(evil)
    assert "\\input" not in tex.replace("\\textbackslash{}input", "")
    assert "\\&\\%\\$\\#\\_\\{\\}" in tex
    written(folder, table, cells)


def test_csv_reads_back_and_starts_no_formula(study: Any) -> None:
    table = json.loads(json.dumps(study[1]))
    table["arms"][1]["name"] = "=SUM(A1)"
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert all(not row["arm"].startswith(("=", "+", "-", "@")) for row in rows)
    found = next(r for r in rows if r["arm"] == "sft-rl" and r["seed"] == "all" and r["benchmark"] == "test")
    arm = next(a for a in table["arms"] if a["name"] == "sft-rl")
    assert float(found["score"]) == arm["scores"]["test"]["value"]
    assert float(found["low"]) == arm["scores"]["test"]["low"]
    by_seed = {
        r["seed"]: float(r["flops_paper"]) for r in rows if r["arm"] == "sft-rl" and r["seed"] != "all"
    }
    assert by_seed == {s: spent["paper"] for s, spent in arm["flops_by_seed"].items()}
    assert next(r for r in rows if r["arm"] == "rejection" and r["seed"] == "all")["marks"].endswith(
        "incomplete study"
    )
    seeds = [float(r["score"]) for r in rows if r["arm"] == "sft-rl" and r["seed"] in ("1", "2")]
    assert sum(seeds) / 2 == pytest.approx(arm["scores"]["test"]["value"])


def test_latex_has_as_many_cells_in_every_line(study: Any) -> None:
    for block in latex(study[1]).split("\\begin{tabular}")[1:]:
        lines = [line for line in block.splitlines() if line.endswith("\\\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1
        assert len(lines) > 2


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a study directory"):
        write_study(tmp_path)


def test_the_page_is_the_same_again_from_its_files(study: Any) -> None:
    from truestep.cli.study import write_cell

    folder, table, cells = study
    page = written(folder, table, cells)
    for name, cell in cells.items():
        write_cell(folder / "compact" / "cells" / f"{name}.json", cell)
    assert sorted(write_study(folder).read_text().split()) == sorted(page.split())


def test_one_seed_shows_no_statistics(tmp_path: Path) -> None:
    text = STUDY.replace("seeds = [1, 2]", "seeds = [1]")
    head, rows = contrast_table(analysed(runner(tmp_path, Children(), text=text)))
    shown = dict(zip(head, rows[0], strict=True))
    assert {shown[key] for key in ("df", "p", "p (Holm)", "p (sign flips)", "Detectable")} == {"–"}
    assert "one seed" in shown["Verdict"]


def test_cells_of_an_earlier_recipe_are_not_drawn(study: Any) -> None:
    folder, table, cells = study
    written(folder, table, cells)
    for arm, seed in (("rejection", 2), ("sft", 9)):  # failed in this recipe; a seed that it does not have
        other = {**cells["sft-rl-s1"], "arm": arm, "seed": seed}
        rundir.write_json(folder / "compact/cells" / f"{arm}-s{seed}.json", other)
    assert "rejection" in {arm["name"] for arm in table["arms"]}
    assert read_cells(folder, table).keys() & {"rejection-s2", "sft-s9"} == set()
