"""What a run says of itself: its status and error, in the summary and on the page, and the scores of each export."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_recipe

from truestep.cli.main import main
from truestep.rundir import read_json, read_jsonl

# A method with a fault: its coefficient is NaN in the fourth step.
FAULTY = """
from dataclasses import replace

from truestep.objective.methods import METHODS


def row(**options):
    method = METHODS["sft"](**options)
    (term,) = method.terms
    wrong = lambda context: term.coefficient(context) * (float("nan") if context.step == 3 else 1.0)
    return replace(method, terms=(replace(term, coefficient=wrong),))
"""


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["truestep", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def summary_of(run: Path) -> dict[str, Any]:
    return dict(read_json(run / "summary.json"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe")


def test_an_export_shows_its_own_scores(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SFT's answers are always right here, the base model's and the RL's always wrong."""
    rows = [{"problem": f"{i}+0", "answer": "1", "checker": "exact", "solution": "1"} for i in range(12)]
    (recipe.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "data.test.source=train.jsonl",
        "data.test.split=train",
        "data.test.options={}",
        "stages.rl.steps=1",
    ]
    run = tmp_path / "run"
    options = [word for setting in words for word in ("--set", setting)]
    assert call(monkeypatch, "run", str(recipe), "--out", str(run), *options) == 0
    summary = summary_of(run)
    for stage in ("01-sft", "02-rl"):
        card = (run / "stages" / stage / "export/README.md").read_text()
        shown = [line.split("|")[3].strip() for line in card.splitlines() if line.startswith("| test ")]
        own = [f"{s['score']:.3f}" for s in summary["scores"] if s["checkpoint"] == stage[3:]]
        assert shown == own, "only this checkpoint's score"
    scores = [s["score"] for s in summary["scores"]]
    assert scores[0] != scores[1], "the base model's score is another one"


def test_after_a_nan_status_error_log_and_page_agree(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "own.py").write_text(FAULTY)
    run = tmp_path / "run"
    words = ["--set", "stages.sft.method=own.py:row", "--set", "evaluate.before=false"]
    assert call(monkeypatch, "run", str(recipe), "--out", str(run), *words) == 3
    error = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    logged = read_jsonl(run / "stages/01-sft/metrics.jsonl")
    assert len(logged) == 3
    assert error.startswith("step 4, micro-batch 0: loss is not finite")
    summary = summary_of(run)
    assert (summary["status"], summary["error"]) == ("failed", error)
    page = html.unescape((run / "report.html").read_text())
    assert f"This run failed: {error}." in page
    assert 'class="pill failed"' in page


def test_a_killed_run_is_not_shown_as_running(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (recipe.parent / "own.py").write_text(
        "import os\ndef reward(samples):\n"
        "    if len(samples) > 1:  # not when it is tried on a row\n        os.kill(os.getppid(), 9)\n"
        "    return [0.0] * len(samples)\n"
    )
    command = [sys.executable, "-m", "truestep", "run", str(recipe), "--out", str(run), "--set"]
    done = subprocess.run([*command, "stages.rl.reward=own.py:reward"], capture_output=True, check=False)
    assert done.returncode == -9
    assert summary_of(run)["status"] == "running"
    assert call(monkeypatch, "report", str(run)) == 0
    assert summary_of(run)["status"] == "killed"
    assert "This run was killed before its end." in (run / "report.html").read_text()
