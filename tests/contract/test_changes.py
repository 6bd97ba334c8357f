"""A begun stage gets more steps, another rate or another evaluation, by saying so: ``truestep run RECIPE --change KEY=VALUE``.
The change is in the run's history and provenance, and the run goes on as if it had never been stopped since."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ahead_cases
import pytest
import torch
from rank_jobs import Job
from tiny_runs import RECIPE, differing, fingerprint, go, interrupted_at, write_recipe

from truestep import rundir
from truestep.checkpoint.manifest import list_checkpoints
from truestep.cli.main import main
from truestep.errors import UserError
from truestep.pipeline.history import changed, continued, read_history
from truestep.pipeline.models import stage_identity
from truestep.pipeline.prepare import Prepared, prepare
from truestep.pipeline.run import check_begun_stages, lost_steps, open_run_folder
from truestep.settings import load_settings
from truestep.signals import Interrupted

torch.set_num_threads(1)
SFT = "evaluate.data=[]"
HASH = re.compile(r"\b[0-9a-f]{12}\b")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("recipe"))
    head, sft, rl = RECIPE.split("[[stages]]")
    path.write_text(
        f"{head}[[stages]]{sft}\n[evaluate]\nsampling = {{ max_new_tokens = 2, temperature = 0.6 }}\n"
    )
    (path.parent / "both.toml").write_text(f"{head}[[stages]]{sft}[[stages]]{rl}")
    rows = [{"id": f"h{i}", "problem": f"{i}+5", "answer": "1", "solution": "1" * (1 + i)} for i in range(4)]
    (path.parent / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = path.read_text().replace("[data.test]", '[data.held]\nsource = "held.jsonl"\n\n[data.test]')
    path.write_text(text)
    return path


def made(recipe: Path, folder: Path, wanted: Sequence[str] = (), overrides: Sequence[str] = ()) -> Prepared:
    """What the command line prepares."""
    settings = load_settings(recipe, overrides)
    history = changed(settings, folder, wanted, ["truestep", "run"])
    return prepare(continued(settings, history, wanted), base_dir=recipe.parent, history=history)


def stopped(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepared, folder: Path, at: int, *, resume: bool = False
) -> bool:
    """Run until the place ``at``; return whether the run was stopped there."""
    with monkeypatch.context() as patch:
        interrupted_at(patch, at)
        try:
            go(prepared, folder, resume=resume)
        except Interrupted:
            return True
    return False


def metrics(folder: Path, stage: str = "01-sft") -> list[dict[str, Any]]:
    return rundir.read_jsonl(folder / "stages" / stage / "metrics.jsonl")


def contents(folder: Path) -> dict[Path, bytes]:
    """Without the lock, which has no content."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != rundir.LOCK}


@pytest.fixture(scope="module")
def begun(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its SFT stage, between the checkpoint of step 6 and the next one."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert stopped(monkeypatch, made(recipe, folder), folder, 38)
    assert 6 < int(list_checkpoints(folder / "stages/01-sft/checkpoints")[-1].name[5:]) < 14
    return folder


CHANGES = {
    "steps": ["stages.sft.steps=17"],
    "fewer steps": ["stages.sft.steps=11"],
    "rate": ["stages.sft.optimizer.lr=0.004", "stages.sft.optimizer.schedule=wsd"],
    "decay": ["stages.sft.optimizer.weight_decay=0.5", 'stages.sft.optimizer.no_decay=["norms"]'],
    "epochs": ["stages.sft.steps=0", "stages.sft.epochs=10"],
    "validation": ['stages.sft.validation={ data = "held", every_steps = 2, select_best = true }'],
    "dev": ['stages.sft.dev={ data = "test", every_steps = 4, samples_per_problem = 3 }'],
    "patience": [
        'stages.sft.validation={ data = "held", every_steps = 1 }',
        "stages.sft.early_stopping={ patience = 2, min_change = 5 }",
    ],
}


@pytest.mark.parametrize(
    "kind", [*[*CHANGES][:2], *(pytest.param(one, marks=pytest.mark.slow) for one in [*CHANGES][2:])]
)
def test_a_changed_stage_that_is_stopped_again_is_one_that_was_not(
    recipe: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole, before = (
        tmp_path / "whole",
        int(list_checkpoints(begun / "stages/01-sft/checkpoints")[-1].name[5:]),
    )
    shutil.copytree(begun, whole)
    with monkeypatch.context() as patch:
        looks = interrupted_at(patch, 10**9).looks
        go(made(recipe, whole, CHANGES[kind]), whole, resume=True)
    for at in {1, len(looks) // 2, len(looks) - 1}:
        folder = tmp_path / f"stopped-{at}"
        shutil.copytree(begun, folder)
        assert stopped(monkeypatch, made(recipe, folder, CHANGES[kind]), folder, at, resume=True)
        go(made(recipe, folder), folder, resume=True)  # the recipe still has the old value
        assert differing(fingerprint(folder), fingerprint(whole)) == []
    keys = {key for change in read_history(whole).of("sft") for key in change.values}
    assert {item.partition("=")[0] for item in CHANGES[kind]} <= {k.rpartition(".")[0] for k in keys} | keys
    assert {change.step for change in read_history(whole).changes} == {before}
    assert metrics(whole)[:before] == metrics(begun)[:before]
    assert len(metrics(whole)) == {"steps": 17, "fewer steps": 11, "epochs": 15, "patience": before + 3}.get(
        kind, 14
    )


def test_a_stage_with_more_steps_is_one_that_had_them_from_the_start(recipe: Path, tmp_path: Path) -> None:
    """With a constant rate, and although the stage had ended."""
    plain = ("stages.sft.optimizer={ lr = 2e-2 }",)
    go(made(recipe, tmp_path / "x", overrides=plain), tmp_path / "changed")
    reporter = go(
        made(recipe, tmp_path / "changed", ["stages.sft.steps=19"], plain), tmp_path / "changed", resume=True
    )
    assert not any("skipped" in line for line in reporter.said)
    go(made(recipe, tmp_path / "y", overrides=(*plain, "stages.sft.steps=19")), tmp_path / "direct")
    assert differing(fingerprint(tmp_path / "changed"), fingerprint(tmp_path / "direct")) == []
    again = go(
        made(recipe, tmp_path / "changed", ["stages.sft.steps=19"], plain), tmp_path / "changed", resume=True
    )
    assert any("already done, skipped" in line for line in again.said)
    assert len(read_history(tmp_path / "changed").changes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("had_ended", [False, True])
def test_a_stage_that_samples_ahead_gets_more_steps(
    had_ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, wherever it is stopped after the change. A stage that had ended has no samples that wait; one that was
    stopped has some, and its steps are those of a stage that had the steps from the start."""
    recipe, begun, more = ahead_cases.write(tmp_path), tmp_path / "begun", ["stages.rl.steps=4"]
    fewer = ["stages.rl.steps=3", "stages.rl.save_every=1"]
    first = made(recipe, begun, overrides=fewer)
    assert stopped(monkeypatch, first, begun, 10**9 if had_ended else 70) != had_ended
    whole = shutil.copytree(begun, tmp_path / "whole")
    with monkeypatch.context() as patch:
        looks = interrupted_at(patch, 10**9).looks
        go(made(recipe, whole, more, fewer), whole, resume=True)
    for at in {1, len(looks) // 2}:
        folder = shutil.copytree(begun, tmp_path / f"stopped-{at}")
        assert stopped(monkeypatch, made(recipe, folder, more, fewer), folder, at, resume=True)
        go(made(recipe, folder, overrides=fewer), folder, resume=True)
        assert differing(fingerprint(folder), fingerprint(whole)) == []
    rows = metrics(whole, "01-rl")
    stale = [row["rl/sampling/staleness"] for row in rows]
    assert stale == ([0, 1, 1, 0] if had_ended else [0, 1, 1, 1])
    if not had_ended:
        go(made(recipe, tmp_path / "straight", overrides=[*more, fewer[1]]), tmp_path / "straight")
        assert metrics(tmp_path / "straight", "01-rl") == rows


def test_a_rate_counts_from_the_step_of_its_change(recipe: Path, begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before = len(metrics(folder))
    go(made(recipe, folder, ["stages.sft.optimizer.lr=0.004"]), folder, resume=True)
    old, new = ([row["sft/learning_rate"] for row in metrics(path)] for path in (begun, folder))
    assert new[:before] == old
    others = [made(recipe, begun, [f"stages.sft.optimizer.lr={rate}"]) for rate in (0.004, 0.005)]
    assert len({stage_identity(one, 0) for one in (made(recipe, begun), *others)}) == 3
    whole = made(recipe, tmp_path / "x", overrides=["stages.sft.optimizer.lr=0.004"])
    go(whole, tmp_path / "direct")
    assert new[before:] == [row["sft/learning_rate"] for row in metrics(tmp_path / "direct")][before:]


def test_another_set_begins_a_new_best(recipe: Path, tmp_path: Path) -> None:
    """Otherwise a low loss on the first set would be unbeatable on the second."""
    first = (
        'stages.sft.validation={ data = "easy", every_steps = 2, select_best = true }',
        "data.other.source=held.jsonl",
    )
    rows = [
        {"id": "o", "problem": "?", "answer": "1", "solution": "~{%}^@`" * 4}
    ]  # nothing like what is trained on
    (recipe.parent / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("stages.sft.steps=14", "data.easy.source=train.jsonl")
    go(made(recipe, tmp_path / "x", overrides=(*first, *more)), tmp_path / "run")
    kept = rundir.read_json(tmp_path / "run/stages/01-sft/done.json")["best"]
    wanted = ["stages.sft.validation.data=other", "stages.sft.steps=18"]
    go(made(recipe, tmp_path / "run", wanted, (*first, *more)), tmp_path / "run", resume=True)
    best = rundir.read_json(tmp_path / "run/stages/01-sft/done.json")["best"]
    assert kept["loss"] < best["loss"], "the case is too easy"
    assert best["step"] > 14 >= kept["step"]
    losses = {row["step"]: row.get("sft/validation/loss") for row in metrics(tmp_path / "run")}
    assert best["loss"] == min(losses[step] for step in (16, 18))


# ------------------------------------------------------------------------------------------------ command line


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["truestep", "run", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_change_is_in_the_history_and_the_provenance(
    recipe: Path,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before, untouched = len(metrics(folder)), contents(folder)
    words = [
        recipe,
        "--out",
        folder,
        "--change",
        "stages.sft.optimizer.lr=0.01",
        "--change",
        "stages.sft.steps=15",
    ]
    assert command(monkeypatch, *words, "--dry-run", "--json") == 0
    (plan,) = json.loads(capsys.readouterr().out)["changes"]
    values = {"stages.sft.optimizer.lr": [0.02, 0.01], "stages.sft.steps": [14, 15]}
    assert plan == {"stage": "sft", "step": before, "values": values}
    assert contents(folder) == untouched
    assert command(monkeypatch, *words, "--json") == 0
    shown = capsys.readouterr()
    assert f"changed: stages.sft.steps: 14 → 15, after step {before} of sft" in shown.err
    (change,) = rundir.read_json(folder / "history.json")["changes"]
    assert {key: change[key] for key in plan} == plan
    assert change["command"][1:3] == ["run", str(recipe)]
    assert rundir.read_json(folder / "provenance.json")["changes"] == [change]
    assert load_settings(folder / "resolved.toml").stages[0].optimizer.lr == 0.01
    card = (folder / "stages/01-sft/export/README.md").read_text()
    assert f"stages.sft.optimizer.lr from 0.02 to 0.01 after step {before}" in card.replace("\\", "")
    # The change is part of the run: neither --change nor an edited recipe is needed to continue, and both are possible.
    assert command(monkeypatch, *words) == command(monkeypatch, recipe, "--out", folder, "--resume") == 0
    assert command(monkeypatch, recipe, "--out", folder, "--resume", "--set", "stages.sft.steps=15") == 0
    assert "already done, skipped" in capsys.readouterr().err
    assert command(monkeypatch, recipe, "--out", folder, "--resume", "--set", "stages.sft.steps=16") == 2
    assert (
        "stages.sft.steps is 15 in this run since a --change, but 16 in the recipe" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("recipe_has", "wanted", "more"),
    [
        (17, "stages.sft.steps=17", []),  # the recipe was edited first
        (60, "stages.sft.steps=17", []),  # the run was begun with --set
        pytest.param(17, "stages.0.steps=17", ["--resume"], marks=pytest.mark.slow),
        # The run's own value wins over the recipe's.
        pytest.param(60, "stages.sft.steps=14", [], marks=pytest.mark.slow),
    ],
)
def test_a_change_counts_from_the_run_and_not_from_the_recipe(
    recipe_has: int,
    wanted: str,
    more: list[str],
    recipe: Path,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(begun, tmp_path / "run")
    edited = recipe.parent / f"edited-{recipe_has}.toml"
    edited.write_text(recipe.read_text().replace("steps = 14", f"steps = {recipe_has}"))
    words, steps = [edited, "--out", folder], int(wanted.rpartition("=")[2])
    for dry in (["--dry-run"], []):
        assert command(monkeypatch, *words, *dry, "--resume") == 2
        assert f"pass --change stages.sft.steps={recipe_has} to change it" in capsys.readouterr().err
    untouched = contents(folder)
    for dry in (["--dry-run"], []):
        assert contents(folder) == untouched
        assert command(monkeypatch, *words, *more, "--change", wanted, *dry) == 0
        assert ("changed: stages.sft.steps: 14 → 17" in capsys.readouterr().err) == (steps == 17)
    assert len(metrics(folder)) == steps
    # A second change counts from the first one, also if the recipe has its value already.
    edited.write_text(recipe.read_text().replace("steps = 14", "steps = 20"))
    assert command(monkeypatch, *words, "--change", "stages.sft.steps=20") == 0
    said = capsys.readouterr().err
    assert f"changed: stages.sft.steps: {steps} → 20" in said
    assert "what will be trained" in said
    assert len(metrics(folder)) == 20
    assert command(monkeypatch, *words, "--resume") == 0
    assert "what will be trained" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--resume"], ["--change", "stages.sft.steps=20"]])
def test_a_dry_run_refuses_the_folders_that_a_run_refuses(
    recipe: Path,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, begun):
        said = []
        for dry in ([], ["--dry-run"]) if folder == tmp_path or not more else ():
            assert command(monkeypatch, recipe, "--out", folder, *more, *dry) == 2
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert len({*said}) == bool(said)


@pytest.mark.slow
def test_two_ranks_make_a_change(recipe: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "--out", str(tmp_path / "run"), "--set", "stages.sft.steps=3", "--resume"]
    for change in ([], ["--change", "stages.sft.steps=5"]):
        with Job([*words, *change], tmp_path / f"job-{len(change)}") as job:
            ended = job.end(120)
        assert ended.codes == [0, 0], ended.outputs
    assert len(metrics(tmp_path / "run")) == 5
    assert [change.step for change in read_history(tmp_path / "run").changes] == [3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "stages.sft.optimizer.lr=0.5"], r"optimizer\.lr = 0\.02, but the recipe has 0\.5; pass --change \S+lr=0\.5 "),
        (["--set", "stages.sft.steps=30"], r"begun with stages\.sft\.steps = 14, but the recipe has 30; pass --change"),
        (["--set", "stages.sft.sequences_per_step=4"], r"stages\.sft\.sequences_per_step = 8, but the recipe has 4; pass --out"),
        (["--set", "seed=7"], r"begun with seed = 0, but the recipe has 7; pass --out"),
        (["--set", "data.train.skip=1"], r"begun with other rows of data\.train; restore"),
        (["--change", "stages.sft.sequences_per_step=4"], r"--change stages\.sft\.sequences_per_step: only steps, epochs"),
        (["--change", 'stages.sft.optimizer={ lr = 0.1, kind = "sgd", weight_decay = 0 }'], r"optimizer\.kind: only steps"),
        (["--change", "stages.sft.stps=4"], r"stps: unknown key; did you mean"),
        (["--change", "stages.sft.steps"], r"--change stages\.sft\.steps is not KEY=VALUE"),
        (["--change", "stages.sft.steps=2"], r"stages\.sft\.steps = 2, but \d+ steps are done; set \d+ or more"),
        (["--change", "stages.warm.steps=2"], r'--change stages\.warm\.steps=2: no stage is called "warm"'),
    ],
)  # fmt: skip
def test_the_key_is_named_and_nothing_is_touched(
    recipe: Path,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before = contents(folder)
    assert command(monkeypatch, recipe, "--out", folder, "--resume", *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(said, line), line
    assert not HASH.search(line.replace(str(folder), ""))
    assert contents(folder) == before


def test_a_change_needs_a_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run that could be changed"):
        made(recipe, tmp_path / "none", ["stages.sft.steps=20"])


def test_a_stage_that_others_began_with_cannot_be_changed(recipe: Path, tmp_path: Path) -> None:
    both, folder, plain = recipe.parent / "both.toml", tmp_path / "run", (SFT, "stages.rl.steps=2")
    go(made(both, folder, overrides=plain), folder)
    with pytest.raises(UserError, match=r"stages\.sft\.steps: .*02-rl began with the model of sft"):
        made(both, folder, ["stages.sft.steps=20"], plain)
    sft = contents(folder / "stages/01-sft")
    reporter = go(
        made(both, folder, ["stages.rl.steps=4", "stages.rl.optimizer.lr=0.001"], plain), folder, resume=True
    )
    assert "sft: already done, skipped" in reporter.said
    assert len(metrics(folder, "02-rl")) == 4
    assert contents(folder / "stages/01-sft") == sft
    # An evaluation of the run is changed without touching a stage.
    go(
        made(both, folder, ['evaluate.data=["test"]', "evaluate.samples_per_problem=2"], plain),
        folder,
        resume=True,
    )
    assert rundir.read_json(folder / "evaluations/rl/test.results.json")["estimate"]["num_problems"] == 2
    assert [change.stage for change in read_history(folder).changes] == ["rl", ""]
    assert len(metrics(folder, "02-rl")) == 4


def test_a_checkpoint_from_before_a_change_is_not_continued_at_another_step(
    recipe: Path, begun: Path, tmp_path: Path
) -> None:
    """The newest checkpoint is damaged, and the one before it is older than the change."""
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    prepared = made(recipe, folder, ["stages.sft.optimizer.lr=0.01"])
    victim = (
        list_checkpoints(folder / "stages/01-sft/checkpoints")[-1]
        / "parameters.rank00000-of-00001.safetensors"
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"the newest intact checkpoint \(step 6\) has different settings"):
        go(prepared, folder, resume=True)


def test_a_stage_without_a_checkpoint_is_not_changed_in_silence(recipe: Path, tmp_path: Path) -> None:
    """A stage that failed before its first checkpoint has logged steps, which belong to the settings that it had."""
    folder, stage = tmp_path / "run", tmp_path / "run/stages/01-sft"
    open_run_folder(made(recipe, folder), folder, resume=False, rank=0)
    other = made(recipe, folder, overrides=['chat.system="Be brief."'])
    check_begun_stages(other, folder)  # nothing has been done
    assert lost_steps(other, folder) == []
    stage.mkdir(parents=True)
    rundir.append_jsonl(stage / "metrics.jsonl", [{"step": step, "sft/loss": 1.0} for step in (1, 1, 2)])
    same = made(recipe, folder)
    check_begun_stages(same, folder)
    (said,) = lost_steps(same, folder)
    assert said == "sft ended before its first checkpoint and starts again; its 2 finished steps are lost"
    check_begun_stages(made(recipe, folder, overrides=["compute.threads=2"]), folder)
    with pytest.raises(UserError, match=r"01-sft was begun with chat\.system = .* delete .*01-sft to train"):
        check_begun_stages(other, folder)
    with pytest.raises(
        UserError, match=r"begun with stages\.sft\.steps.*pass --change stages\.sft\.steps=17"
    ):
        check_begun_stages(made(recipe, folder, overrides=["stages.sft.steps=17"]), folder)
    named = made(recipe, folder, ["stages.sft.steps=17"])
    check_begun_stages(named, folder)
    assert [change.values["stages.sft.steps"][1] for change in named.history.changes] == [17]
