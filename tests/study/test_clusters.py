"""Resources of cells on one machine: ranks, GPUs that no two cells share, and cells that are killed."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import cells
import pytest
from micro import STUDY as MICRO
from typer.testing import CliRunner

from truestep import device
from truestep.errors import UserError
from truestep.study import engines
from truestep.study.cell_runner import key_of
from truestep.study.estimate import estimate
from truestep.study.inputs import check_inputs
from truestep.study.load import load_study, parse_study
from truestep.study.plan import cell_settings, stage_tables
from truestep.study.processes import LOST, Order, code_of_ranks, start, was_killed
from truestep.study.resources import Places, Resources, Share
from truestep.study.run import run_cells

RANKS = cells.STUDY.replace("seeds = [1]", "seeds = [1]\nresources = { ranks = 2, gpus = 2 }")
PATHS = os.pathsep.join([str(Path(__file__).parent), *sys.path])
# What the command does, without the audit of the trainer, on a machine that seems to have GPUs.
STUDY_IN_A_PROCESS = """
import sys
from pathlib import Path
import cells
from truestep import device
from truestep.study import engines
from truestep.study.load import load_study
from truestep.study.run import run_cells

folder = Path(sys.argv[1])
device.visible_gpus = lambda: ("7", "9")
engine = engines.local(load_study(folder / "study.toml"), print)
text = (folder / "study.toml").read_text()
made = cells.runner(folder, engine.launch, "out", text, gpus=engine.gpus, stop=engine.stop)
run_cells(made)
sys.exit(128 + made.signum if made.stopped.is_set() else 0)
"""
GPU = "seeds = [1]\nresources = { gpus = 1 }"


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"gpus": 1, "ranks": 2}, "resources: 2 ranks cannot share 1 GPUs"),
        ({"stages": {"rl": {"gpus": 1, "ranks": 3}}}, "resources.stages.rl: 3 ranks cannot share 1 GPUs"),
        ({"stages": {"lr": {"ranks": 2}}}, "resources.stages.lr: there is no such stage"),
        ({"ranks": 0}, "resources.ranks"),
        ({"gpu": 1}, "resources.gpu"),
    ],
)
def test_resources_that_cannot_work_are_refused(resources: dict[str, Any], said: str) -> None:
    raw = {**copy.deepcopy(tomllib.loads(MICRO)), "resources": resources}
    with pytest.raises(UserError) as caught:
        parse_study(raw, "micro.toml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resources_depend_on_the_stage() -> None:
    given = {"gpus": 2, "ranks": 2, "stages": {"rejection": {"gpus": 1, "ranks": 1}}}
    study = parse_study({**tomllib.loads(MICRO), "resources": given}, "micro.toml")
    assert engines.shares(study) == {
        "": Share(1, 1), "sft": Share(2, 2), "more": Share(2, 2), "rl": Share(2, 2),
        "rejection": Share(1, 1), "base": Share(2, 2),
    }  # fmt: skip


def test_the_plan_shows_what_a_cell_uses(tmp_path: Path) -> None:
    made = cells.runner(tmp_path, start, "out", RANKS)
    plain_path = cells.write(tmp_path / "plain")
    (row,), (plain,) = (
        estimate(study, check_inputs(study, path))["arms"]
        for study, path in ((made.study, made.where), (load_study(plain_path), plain_path))
    )
    assert (row["ranks"], row["gpus"], plain["ranks"], plain["gpus"]) == (2, 2, 1, 0)
    assert row["gib"] == pytest.approx(2 * plain["gib"], abs=0.01)


def test_other_ranks_are_other_cells_and_the_default_changes_no_name(tmp_path: Path) -> None:
    keys = {}
    for name, text in (
        ("plain", ""),
        ("one", "ranks = 1"),
        ("two", "ranks = 2"),
        ("gpu", "gpus = 1"),
        ("gpus", "gpus = 2"),
    ):
        words = f"seeds = [1]\nresources = {{ {text} }}" if text else "seeds = [1]"
        made = cells.runner(tmp_path, start, "out", cells.STUDY.replace("seeds = [1]", words))
        tables = stage_tables(made.study, made.study.arms[0])
        keys[name] = key_of(made, cell_settings(made.study, "sft", 1, tables, str(made.where)))
    assert keys["plain"] == keys["one"]
    assert keys["gpu"] == keys["gpus"]  # how many GPUs one rank may use does not change its numbers
    assert len(set(keys.values())) == 3
    assert Resources(stages={"sft": {"ranks": 2}}).kinds(["rl"]) == []  # type: ignore[dict-item]


def test_cells_take_different_gpus_and_wait_for_them() -> None:
    places, most, lock = Places(4, ("7", "9", "11")), 0, threading.Lock()
    used: dict[str, int] = {}
    running = 0

    def work(gpus: int) -> None:
        nonlocal most, running
        with places.take(gpus) as names:
            assert names is not None
            assert len(names) == gpus
            with lock:
                for name in names:
                    used[name] = used.get(name, 0) + 1
                    assert used[name] == 1
                most = max(most, sum(used.values()))
                running += 1
                assert running <= 4
            time.sleep(0.01)
            with lock:
                running -= 1
                for name in names:
                    used[name] -= 1

    failed: list[BaseException] = []

    def guarded(gpus: int) -> None:
        try:
            work(gpus)
        except AssertionError as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in (1, 2, 3, 0, 1, 2, 0, 1, 3, 1) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert failed == []
    assert most == 3
    assert set(used) == {"7", "9", "11"}
    with pytest.raises(UserError, match="needs 4 GPUs, but there are 3"), places.take(4):
        pass


def test_a_cell_that_needs_many_gpus_is_not_passed_over() -> None:
    places, order = Places(9, ("0", "1")), []

    def work(name: str, gpus: int) -> None:
        with places.take(gpus):
            order.append(name)

    with places.take(1):
        threads = []
        for name, gpus in (("both", 2), ("one", 1), ("none", 0)):
            threads.append(threading.Thread(target=work, args=(name, gpus)))
            threads[-1].start()
            time.sleep(0.1)
        assert order == ["none"]  # a GPU is free, but it is for the cell that came first
    for thread in threads:
        thread.join(30)
    assert order[:2] == ["none", "both"]


def test_gpus_have_the_names_that_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f ")
    assert device.visible_gpus() == ("3", "GPU-8f")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device.visible_gpus() == ("0", "1")


@pytest.mark.skipif(bool(device.visible_gpus()), reason="this machine has GPUs")
def test_too_few_gpus_are_an_error_before_anything_starts(tmp_path: Path) -> None:
    from truestep.cli.main import _app

    cells.runner(tmp_path, start, "out", cells.STUDY.replace("seeds = [1]", GPU))
    words = ["study", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(_app(), words)
    assert isinstance(found.exception, UserError)
    assert "needs 1 GPUs, but this machine has 0" in str(found.exception)
    assert not (tmp_path / "out").exists()


class Ends:
    """Stands for a child process that ends with these exit codes, one after the other."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)

    def __call__(self, order: Order) -> tuple[int, str]:
        return self.codes.pop(0), "last words"


@pytest.mark.parametrize("code", [-9, 137, -15, 143, 134, LOST])
def test_a_cell_that_is_killed_is_started_again_within_a_bound(tmp_path: Path, code: int) -> None:
    ends = Ends(*[code] * 9)
    made = cells.runner(tmp_path, ends, "out", cells.STUDY.replace("seeds = [1]", "seeds = [1]\nretries = 2"))
    assert run_cells(made) == {}
    assert len(ends.codes) == 9 - 3
    said = [line for line in made.said if "started again" in line and "FAILED" not in line]  # type: ignore[attr-defined]
    assert [line[-8:] for line in said] == ["(1 of 2)", "(2 of 2)"]
    assert said[0].startswith("shared.start-s1: ")
    assert ("last words" in said[0]) == (code == LOST)
    assert "last words; it was started again 2 times" in made.failures["sft-s1"]


@pytest.mark.parametrize("code", [1, 2, 3, 5, 130, -2, 255])
def test_a_cell_with_an_error_of_its_own_is_not_tried_again(tmp_path: Path, code: int) -> None:
    ends = Ends(*[code] * 9)
    made = cells.runner(tmp_path, ends, "out")
    assert run_cells(made) == {}
    assert len(ends.codes) == 9 - 1
    assert f"exit code {code}, last words" in made.failures["sft-s1"]
    assert not was_killed(code)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([-9, -15], 137), ([1, -9], 137), ([-15, 3], 3), ([-6, 2], 2), ([1, -15], 1), ([-15, -15], 143),
        ([143, 143], 143), ([130, 130], 130), ([-15, -9, 1], 137), ([5, -9], 137), ([5, 5], 5),
    ],
)  # fmt: skip
def test_ranks_that_end_because_of_another_one_do_not_decide(codes: list[int], code: int) -> None:
    assert code_of_ranks(codes) == code


@pytest.mark.slow
def test_a_killed_cell_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    """Two cells at once, each with a GPU; one of them is killed twice in the middle of its steps."""
    text = cells.STUDY.replace("seeds = [1]", GPU) + cells.SECOND_ARM
    whole = cells.runner(tmp_path / "whole", start, "out", text, gpus=("7", "9"))
    expected = run_cells(whole)
    assert cells.seen(tmp_path / "whole") == ["7", "9"]
    cut = cells.runner(tmp_path / "cut", start, "out", text, gpus=("7", "9"))
    assert len(cells.kill_in_the_middle(cut, times=2)) == 2
    assert [line for line in cut.said if "killed by SIGKILL" in line]  # type: ignore[attr-defined]
    assert cells.contents(cut.out) == cells.contents(whole.out)
    found = {path.parent.name: path for path in cut.out.glob("cells/*/cell.json")}
    assert len(found) == len(expected) + 1
    assert cut.failures == {}
    assert set(cells.seen(tmp_path / "cut")) == {"7", "9"}


def test_cells_that_ask_for_no_gpu_see_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")
    made = cells.runner(tmp_path, start, "out", gpus=("7", "9"))
    assert run_cells(made)
    assert cells.seen(tmp_path) == [""]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    made = cells.runner(folder, start, "out", RANKS, gpus=("7", "9"))
    assert run_cells(made)
    assert cells.seen(folder) == ["7,9", "7,9"]
    return cells.contents(made.out), folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "torchrun"])
def test_ranks_end_together_and_continue(
    victim: str, on_two_ranks: tuple[dict[str, bytes], Path], tmp_path: Path
) -> None:
    made = cells.runner(tmp_path, start, "out", RANKS, gpus=("7", "9"))
    killed = cells.kill_in_the_middle(made, victim=(lambda pid: pid) if victim == "rank" else cells.parent)
    assert len(killed) == 1
    assert any("killed by SIGKILL" in line and "started again" in line for line in made.said), made.said
    assert made.failures == {}
    # If a rank had gone on without its parent, it would have finished the stage.
    assert any("sft: continuing after step" in log.read_text() for log in made.out.glob("cells/*/run.log"))
    assert cells.contents(made.out) == on_two_ranks[0]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_ranks_of_a_cell(
    signum: signal.Signals, on_two_ranks: tuple[dict[str, bytes], Path], tmp_path: Path
) -> None:
    """As in a terminal, Ctrl-C reaches the study and the process of the cell, and SIGTERM only the study."""
    cells.runner(tmp_path, start, "out", RANKS)
    words = [sys.executable, "-c", STUDY_IN_A_PROCESS, str(tmp_path)]
    study = subprocess.Popen(words, start_new_session=True, env={**os.environ, "PYTHONPATH": PATHS})
    while not (rank := cells.trainer(tmp_path / "out", 10)):
        assert study.poll() is None
        time.sleep(0.02)
    ranks = ranks_of(cells.parent(rank))
    assert len(ranks) == 2
    (os.killpg if signum == signal.SIGINT else os.kill)(study.pid, signum)
    assert study.wait(120) == 128 + signum
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    (log,) = (path for path in tmp_path.glob("out/cells/*/run.log") if "stopping in sft," in path.read_text())
    assert "all finished work is saved" in log.read_text()
    made = cells.runner(tmp_path, start, "out", RANKS)
    assert run_cells(made)
    assert cells.contents(made.out) == on_two_ranks[0]


def ranks_of(agent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if cells.parent(int(path.name)) == agent:
                found.append(int(path.name))
    return found
