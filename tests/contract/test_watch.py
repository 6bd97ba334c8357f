"""Every kind of worthless training, in a real tiny run that has it, and in no right one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Silent, go, prepared, write_recipe

from truestep.cli.main import main
from truestep.pipeline.run import open_run_folder, run
from truestep.report.html import write_report
from truestep.report.tables import score_table
from truestep.rundir import read_json, read_jsonl, write_json
from truestep.train.parallel import Ranks
from truestep.train.watch import WINDOW, Watch, WorthlessError

OWN = """
from dataclasses import replace

from truestep.objective.methods import METHODS


def constant(samples):
    return [0.25 for sample in samples]


def by_problem(samples):
    return [float(len(sample.problem.id) % 2) for sample in samples]


def sevens(samples):
    return [0.5 * (sample.completion[:1] == "7") for sample in samples]


def ones(samples):
    return [float(sample.completion[:1] == "1") for sample in samples]


def upside_down(**options):
    method = METHODS["grpo"](**options)
    (term,) = method.terms
    wrong = lambda context: -term.coefficient(context)
    return replace(method, terms=(replace(term, coefficient=wrong),))
"""
RL = "stages.rl."
CASES = {
    "equal": (f"{RL}reward=own.py:constant", f"{RL}steps=12"),
    "unmixed": (f"{RL}reward=own.py:by_problem",),
    "cut": (f"{RL}sampling.max_new_tokens=1", f"{RL}steps=14", "data.train.source=long.jsonl", "stages.sft.steps=40"),
    "collapsed": (f"{RL}reward=own.py:sevens", f"{RL}steps=24", f"{RL}optimizer.lr=2e-2", "stages.sft.steps=1"),
    "below": (
        f"{RL}reward=own.py:ones", f"{RL}method=own.py:upside_down", f"{RL}steps=40", f"{RL}samples_per_prompt=8",
        f"{RL}optimizer.lr=1e-3",
    ),
    "uniform": ("stages.sft.optimizer.lr=1.0",),
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_recipe(tmp_path / "recipe")
    (path.parent / "own.py").write_text(OWN)
    rows = [
        {"problem": f"{i}", "answer": str(i % 2), "checker": "exact", "solution": f"{i % 2}{i % 2}"}
        for i in range(12)
    ]
    (path.parent / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_tests(*overrides: str) -> tuple[str, ...]:
    return ("evaluate.data=[]", *overrides)


@pytest.mark.parametrize(
    "kind", [*[*CASES][:2], *(pytest.param(one, marks=pytest.mark.slow) for one in [*CASES][2:])]
)
def test_a_worthless_stage_is_said_once_and_kept(kind: str, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = go(prepared(recipe, *without_tests(*CASES[kind])), run).said
    summary = read_json(run / "summary.json")
    (warning,) = [w for w in summary["warnings"] if w["kind"] == kind]
    lines = [line for line in said if warning["text"] in line]
    assert lines == [f"warning: {warning['stage']}, step {warning['step']}: {warning['text']}"]
    assert summary["status"] == "done"


def test_a_right_run_is_not_warned_about(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = go(prepared(recipe), run).said
    assert read_json(run / "summary.json")["warnings"] == []
    assert not [line for line in said if line.startswith("warning")]


def test_strict_saves_and_stops_and_the_rest_can_be_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [
        "run",
        str(recipe),
        "--out",
        str(run),
        "--set",
        "evaluate.data=[]",
        "--set",
        "stages.sft.optimizer.lr=1.0",
    ]
    monkeypatch.setattr("sys.argv", ["truestep", *words, "--strict"])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    assert error.startswith("error: sft: the loss, ")
    assert "above that of a uniform guess" in error
    summary = read_json(run / "summary.json")
    assert (summary["status"], f"error: {summary['error']}") == ("failed", error)
    steps = len(read_jsonl(run / "stages/01-sft/metrics.jsonl"))
    assert (run / "stages/01-sft/checkpoints/latest").read_text().strip() == f"step_{steps:08d}"
    assert steps < 14
    monkeypatch.setattr("sys.argv", ["truestep", *words, "--resume"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = read_json(run / "summary.json")
    assert found["status"] == "done"
    assert [w for w in found["warnings"] if w["stage"] == "sft"] == summary["warnings"], (
        "from the log of the first"
    )


def test_a_resumed_stage_is_judged_with_the_steps_before(recipe: Path, tmp_path: Path) -> None:
    words = without_tests(*CASES["equal"])
    whole = tmp_path / "whole"
    go(prepared(recipe, *words), whole)
    made, cut = prepared(recipe, *words), tmp_path / "cut"
    open_run_folder(made, cut, resume=False, rank=0)
    with pytest.raises(WorthlessError):
        run(made, cut, ranks=Ranks(), reporter=Silent(), is_strict=True)
    go(made, tmp_path / "cut", resume=True)
    assert (
        read_json(tmp_path / "cut/summary.json")["warnings"] == read_json(whole / "summary.json")["warnings"]
    )


def test_a_stage_that_made_the_score_worse_leads_the_page(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stage learns to answer 1, which is right, and the second one to answer 0."""
    for name in ("right", "wrong"):
        rows = [
            {"problem": f"{i}+0", "answer": "1", "checker": "exact", "solution": "01"[name == "right"]}
            for i in range(12)
        ]
        (recipe.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = recipe.read_text().partition("[[stages]]")[2].partition("[[stages]]")[0]
    text = recipe.read_text().partition("[[stages]]")[0].replace("train.jsonl", "right.jsonl")
    text = text.partition("[data.test]")[0] + '[data.test]\nsource = "right.jsonl"\n'
    text += f'[data.wrong]\nsource = "wrong.jsonl"\n[[stages]]{stage}'
    text += f'[[stages]]\nname = "more"{stage.replace("train", "wrong")}[evaluate]\ndata = ["test"]\n'
    text += "sampling = { max_new_tokens = 2, temperature = 0.6 }\n"
    recipe.write_text(text)
    run = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["truestep", "run", str(recipe), "--out", str(run)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert not stop.value.code
    kinds = [(w["stage"], w["kind"]) for w in read_json(run / "summary.json")["warnings"]]
    assert ("more", "worse") in kinds
    assert "warning: more made the model worse on test" in err
    assert "more !" in out
    assert "! more: more made the model worse on test" in " ".join(out.split())
    page = (run / "report.html").read_text()
    lead = page.partition('<p class="lead">')[2].partition("</p>")[0]
    assert ", WORSE (" in lead
    assert ", better (" in lead, "the stage before it is compared too"
    assert '<ul class="warnings">' in page


# ------------------------------------------------------------------------------------ right and wrong, by numbers


def seen(watch: Watch, rows: list[dict[str, float]]) -> list[str]:
    return [w["kind"] for step, row in enumerate(rows, start=1) for w in watch.see(step, row)]


def rl(**more: Any) -> dict[str, float]:
    row = {"reward": 0.5, "reward_std": 0.5, "mixed_groups": 0.5, "unscored": 0.0, "solved": 0.5,
           "completions/truncated": 0.0, "entropy": 1.0, "grad_norm": 1.0}  # fmt: skip
    return row | more


def watch(kind: str = "rl", steps: int = 100, **more: Any) -> Watch:
    return Watch(stage="s", kind=kind, num_steps=steps, vocabulary=100, **more)


def test_a_series_that_is_one_step_short_is_not_worthless() -> None:
    for row in (
        rl(reward_std=0.0, mixed_groups=0.0),
        rl(mixed_groups=0.0),
        rl(**{"completions/truncated": 1.0}),
    ):
        assert seen(watch(), [row] * (WINDOW - 1) + [rl()] + [row] * (WINDOW - 1)) == []
        assert len(seen(watch(), [row] * 3 * WINDOW)) == 1, "each kind once"
        assert len(seen(watch(steps=4), [row] * 4)) == 1, "a short stage is judged by all of its steps"


def test_equal_rewards_teach_if_there_are_demonstrations() -> None:
    row = rl(reward=0.0, reward_std=0.0, mixed_groups=0.0)
    assert seen(watch(is_own=False), [row] * 20) == []
    assert seen(watch(is_own=False), [row | {"grad_norm": 0.0}] * 20) == ["equal"]


def test_low_entropy_is_right_if_all_is_solved() -> None:
    rows = [rl()] * 10 + [rl(entropy=0.01)] * 10
    assert seen(watch(), rows) == ["collapsed"]
    assert seen(watch(), [row | {"solved": 0.95} for row in rows]) == []


def test_a_fall_is_one_that_exceeds_the_noise() -> None:
    def rows(fall: float) -> list[dict[str, float]]:
        return [rl(reward=0.5 + 0.05 * (-1) ** i - fall * (i >= 20)) for i in range(30)]

    # Differences of 0.1 between neighbors: s = 0.1/√2, and a difference of two means of 10 has s·√(2/10) = 0.032.
    assert math.isclose(0.1 / math.sqrt(2) * math.sqrt(0.2), 0.0316, abs_tol=1e-4)
    assert seen(watch(), rows(0.10)) == []
    assert seen(watch(), rows(0.30)) == ["below"]
    assert seen(watch(is_steady=False), rows(0.30)) == [], "hints that become shorter make problems harder"


def test_a_new_model_is_not_above_uniform() -> None:
    new, wrong = math.log(100) + 0.04, math.log(100) + 0.2
    assert seen(watch("sft"), [{"nll": new}] * 20) == []
    assert seen(watch("sft"), [{"nll": wrong}] * 20) == ["uniform"]


def test_a_stage_that_recovers_has_no_mark(recipe: Path, tmp_path: Path) -> None:
    """It says from which to which step it was worthless; a reason that comes back is not over."""
    watch = Watch(stage="rl", kind="rl", num_steps=60, vocabulary=10)
    bad, good = (
        {"reward": 0.0, "reward_std": 0.0, "unscored": 0.0},
        {"reward": 0.5, "reward_std": 0.5, "unscored": 0.0},
    )
    for step in range(1, 2 * WINDOW + 1):
        watch.see(step, bad if step <= WINDOW + 2 else good)
    (warning,) = watch.warnings
    assert (warning["step"], warning["until"]) == (WINDOW, WINDOW + 2)
    run = tmp_path / "run"
    go(prepared(recipe), run)
    summary = read_json(run / "summary.json")
    rl = {**warning, "stage": "rl"}
    for warnings, marked in (
        ([rl], False),
        ([rl, {**rl, "until": 3}, {"stage": "rl", "kind": "x", "step": 9, "text": "bad"}], True),
    ):
        write_json(run / "summary.json", {**summary, "warnings": warnings})
        (row,) = [row for row in score_table(run) if row.checkpoint == "rl"]
        assert bool(row.warnings) == marked
        assert row.recovered[0] == f"until step {WINDOW + 2}: {warning['text']}"
        page = write_report(run).read_text()
        assert ("(!)" in page) == marked
        assert f"rl, steps {WINDOW} to {WINDOW + 2}" in page
    for step in range(1, WINDOW + 1):
        watch.see(2 * WINDOW + step, bad)
    assert "until" not in warning
