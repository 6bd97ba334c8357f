"""What a run and its pages say in rows: measurements, means without a spread, provenance and stages without scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truestep.api import Run
from truestep.checkpoint.export import model_card
from truestep.cli.progress import ConsoleReporter
from truestep.evaluate.estimate import mean_rewards
from truestep.pipeline.shown import head, row, weights
from truestep.report.html import _in_words, flat
from truestep.report.study import _stamped


def test_a_row_with_a_measurement_is_always_printed(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    metrics = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "num_tokens": 4.0}
    reporter.begin("sft", 9, 0, head("sft", ["validation"]))
    for step in range(1, 10):
        seen = metrics | ({"validation/loss": 2.0 + step} if step % 4 == 0 else {})
        reporter.advance(step, row("sft", ["validation"], seen, 1.0))
    printed = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert printed == ["step", "1/9", "4/9", "8/9", "9/9"]


def test_equal_means_have_no_interval() -> None:
    """As their differences in a comparison; different means have one."""

    def rows(*values: float) -> list[dict[str, object]]:
        return [
            {"problem_id": f"p{i}", "sample_index": 0, "rewards": {"x": value}}
            for i, value in enumerate(values)
        ]

    same, different = (mean_rewards(rows(*values))["x"] for values in ((1.0, 1.0), (0.0, 1.0)))
    assert (same["value"], same["low"], same["high"]) == (1.0, None, None)
    assert different["low"] < different["value"] < different["high"]


def test_weights_are_named_by_their_step() -> None:
    done = {"steps": 180, "exported": {"step": 160, "why": "the lowest validation loss, 0.1"}}
    early = {**done, "ended_early": {"planned_steps": 400}}
    assert weights(done) == "step 160 of 180, the lowest validation loss, 0.1"
    assert (
        weights(early) == "step 160 of 180 (ended early; 400 were planned), the lowest validation loss, 0.1"
    )
    assert weights({"steps": 3}) == ""
    assert f"Weights: {weights(early)}." in model_card("n", "b", [], [], {}, weights(early))
    assert "Weights" not in model_card("n", "b", [], [], {})


def test_provenance_is_in_words() -> None:
    change = {"stage": "sft", "step": 3, "values": {"stages.sft.steps": [5, 9]}}
    assert flat(_in_words({"changes": [change]}))["changes"] == "stages.sft.steps from 5 to 9 after step 3"
    assert _in_words({"seed": 1}) == {"seed": 1}
    found = _stamped({"seed": "1", "commit": "abc"}, [{"seeds": [2, 1]}, {"seeds": [2]}])
    assert found == {"seeds": "1, 2", "commit of truestep": "abc"}


def test_a_notebook_shows_a_run_without_scores(tmp_path: Path) -> None:
    (tmp_path / "resolved.toml").write_text('name = "r"')
    (tmp_path / "summary.json").write_text(
        json.dumps({"name": "r", "status": "done", "scores": [], "stages": []})
    )
    stage = tmp_path / "stages/01-sft"
    stage.mkdir(parents=True)
    rows = [{"step": 1, "sft/loss": 2.0, "sft/validation/loss": 3.5}, {"step": 2, "sft/loss": 1.25}]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    shown = Run(tmp_path)._repr_html_()
    assert "<th>stage</th><th>step</th><th>loss</th><th>validation/loss</th>" in shown
    assert "<td>sft</td><td>2</td><td>1.25</td><td>3.5</td>" in shown
