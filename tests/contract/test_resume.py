"""N + N = 2N, bit for bit: wherever a run is stopped, going on gives the parameters, optimizer state and log
files of the run that was never stopped."""

from __future__ import annotations

import hashlib
import shutil
from itertools import count, groupby
from pathlib import Path

import pytest
import torch
from tiny_runs import differing, files, fingerprint, go, interrupted_at, prepared, write_recipe

from truestep import rundir
from truestep.checkpoint.store import list_checkpoints
from truestep.cli.main import main
from truestep.pipeline.prepare import Prepared
from truestep.signals import Interrupted

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def made(recipe: Path) -> Prepared:
    return prepared(recipe)


@pytest.fixture(scope="module")
def whole(made: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The uninterrupted run, and where it looked for a signal, in order."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        alarm = interrupted_at(monkeypatch, 10**9)
        go(made, folder)
    rows = rundir.read_jsonl(folder / "stages/02-rl/metrics.jsonl")
    assert any(row["rl/grad_norm"] > 0 for row in rows), "the case is too easy: RL has nothing to learn"
    return folder, alarm.looks


def stop_at(
    monkeypatch: pytest.MonkeyPatch, made: Prepared, folder: Path, look: int, *, resume: bool = False
) -> None:
    with monkeypatch.context() as patch:
        interrupted_at(patch, look)
        with pytest.raises(Interrupted):
            go(made, folder, resume=resume)
    assert rundir.read_json(folder / "summary.json")["status"] == "interrupted"


def nth(looks: list[str], place: str, n: int) -> int:
    return [i for i, look in enumerate(looks) if look == place][n]


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("step", 0),  # before anything is trained
        ("step", 5),  # SFT, between two steps
        ("micro-batch", 16),  # SFT, in the middle of a step
        ("step", 16),  # RL, between two steps
        ("decode", 21),  # RL, in the middle of a rollout
        ("proximal", 2),  # RL, between rollout and update
        ("micro-batch", -3),  # RL, in the first update of a step
        ("evaluate", 3),
    ],
)
def test_stopped_anywhere_and_resumed_is_never_stopped(
    made: Prepared,
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    n: int,
) -> None:
    expected, looks = whole
    folder = tmp_path / "run"
    stop_at(monkeypatch, made, folder, nth(looks, place, n))
    done = [p.parent for p in folder.glob("stages/*/done.json")]
    # A model card gets the scores of its model when they are known.
    kept = [p for stage in done for p in files(stage) if p.name != "README.md"]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept}
    reporter = go(made, folder, resume=True)
    assert differing(fingerprint(folder), fingerprint(expected)) == []
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept}
    assert sum("already done, skipped" in said for said in reporter.said) == len(done)


@pytest.mark.parametrize("nth_score", [0, 1, 2])
def test_stopped_in_a_dev_score_and_resumed_is_never_stopped(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth_score: int
) -> None:
    """The step is trained, its weights are published, and its line is not yet written."""
    dev = 'stages.rl.dev={ data = "test", every_steps = 2, select_best = true, samples_per_problem = 3 }'
    made = prepared(recipe, "evaluate.data=[]", "stages.sft.steps=6", "stages.rl.save_every=5", dev)
    with monkeypatch.context() as patch:
        alarm = interrupted_at(patch, 10**9)
        go(made, tmp_path / "whole")
    rows = rundir.read_jsonl(tmp_path / "whole/stages/02-rl/metrics.jsonl")
    scored = [row["step"] for row in rows if "rl/dev/score" in row]
    assert scored == [2, 4, 5]
    looks = [i for i, place in enumerate(alarm.looks) if place == "evaluate"]
    # The looks of one score follow each other; between two scores a step is trained.
    scores = [list(group) for _, group in groupby(looks, key=lambda i, c=count(): i - next(c))]
    assert len(scores) == 3
    assert min(len(places) for places in scores) >= 2
    for place in (scores[nth_score][0], scores[nth_score][-1]):
        folder = tmp_path / f"stopped at {place}"
        stop_at(monkeypatch, made, folder, place)
        (newest,) = list_checkpoints(folder / "stages/02-rl/checkpoints")[-1:]
        assert newest.name == f"step_{scored[nth_score]:08d}"
        assert len(rundir.read_jsonl(folder / "stages/02-rl/metrics.jsonl")) == scored[nth_score] - 1
        go(made, folder, resume=True)
        assert differing(fingerprint(folder), fingerprint(tmp_path / "whole")) == []


def test_stopped_again_and_again_is_never_stopped(
    made: Prepared, whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, times = tmp_path / "run", 0
    while True:
        with monkeypatch.context() as patch:
            interrupted_at(patch, 29)  # a step of RL looks 15 times: each start gets a little further
            try:
                go(made, folder, resume=times > 0)
                break
            except Interrupted:
                times += 1
    assert times >= 4
    assert differing(fingerprint(folder), fingerprint(whole[0])) == []


def test_a_finished_run_is_left_as_it_is(
    made: Prepared, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = {p: p.read_bytes() for p in files(folder / "stages")}
    reporter = go(made, folder, resume=True)
    assert {p: p.read_bytes() for p in files(folder / "stages")} == before
    assert [s for s in reporter.said if "skipped" in s] == [
        "sft: already done, skipped",
        "rl: already done, skipped",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    made: Prepared,
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    folder = tmp_path / "run"
    stop_at(
        monkeypatch, made, folder, nth(whole[1], "step", 10)
    )  # SFT step 10; the checkpoint before is step 6
    older, newest = list_checkpoints(folder / "stages/01-sft/checkpoints")
    assert (older.name, newest.name) == ("step_00000006", "step_00000010")
    victim = newest / (
        "manifest.json" if damage == "manifest" else "parameters.rank00000-of-00001.safetensors"
    )
    raw = bytearray(victim.read_bytes())
    if damage == "cut":
        raw = raw[:-1]
    else:
        raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    reporter = go(made, folder, resume=True)
    assert any("damaged and was skipped" in said for said in reporter.said)
    assert differing(fingerprint(folder), fingerprint(whole[0])) == []


def test_a_torn_last_line_of_a_log_is_written_again(
    made: Prepared, whole: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    stop_at(monkeypatch, made, folder, nth(whole[1], "step", 10))
    log = folder / "stages/01-sft/metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 11, "sft/lo')
    go(made, folder, resume=True)
    assert differing(fingerprint(folder), fingerprint(whole[0])) == []


# -------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def half(made: Prepared, whole: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT is done, RL has begun."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, made, folder, nth(whole[1], "step", 17))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, recipe: Path, folder: Path, *words: str) -> int:
    monkeypatch.setattr(
        "sys.argv", ["truestep", "run", str(recipe), "--out", str(folder), "--resume", *words]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ("stages.rl.optimizer.lr=0.1", "02-rl"),  # not finished: its checkpoints are another stage's
        ("stages.rl.sampling.temperature=0.9", "02-rl"),
        ("stages.sft.steps=5", "01-sft"),  # finished
        ("seed=1", "01-sft"),
        ("model.tiny.hidden_size=16", "01-sft"),
        ("compute.dtype=float64", "01-sft"),
        ("data.train.skip=1", "01-sft"),
        ("chat.user='Q: {problem}'", "01-sft"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    recipe: Path,
    half: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    stage: str,
) -> None:
    before = _hashes(half)
    assert command(monkeypatch, recipe, half, "--set", change, "--set", "evaluate.data=[]") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert stage in line
    assert "--out" in line
    assert _hashes(half) == before


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files(folder / "stages")}


def test_a_refused_resume_leaves_the_record_of_what_was_run(
    recipe: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    before = {p: p.read_bytes() for p in files(folder)}
    assert command(monkeypatch, recipe, folder, "--set", "seed=1") == 2
    assert {p: p.read_bytes() for p in files(folder)} == before


def test_other_rows_are_refused(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = write_recipe(tmp_path)
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows.replace('"problem": "3+', '"problem": "4+'))
    assert command(monkeypatch, changed, half) == 2
    assert "begun with other rows of data.train; restore them" in capsys.readouterr().err


def test_what_changes_no_result_may_change(
    recipe: Path, whole: tuple[Path, list[str]], half: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    stage = ("save_every=1", "save_every_minutes=5", "keep_checkpoints=4")
    compute = ("parallel=fsdp2", "gradient_checkpointing=true")
    changed = [*(f"stages.rl.{s}" for s in stage), *(f"compute.{s}" for s in compute)]
    go(prepared(recipe, *changed), folder, resume=True)
    assert differing(fingerprint(folder), fingerprint(whole[0])) == []
    assert len(list_checkpoints(folder / "stages/02-rl/checkpoints")) > 2
