"""No hostile answer hangs, takes memory, runs anything or is rewarded; a sitecustomize in the workers watches
them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from grade_one import grade_pair
from hostile_answers import KINDS, cases

from truestep.grade.score import Grader
from truestep.records import Verdict

pytest.importorskip("math_verify")

SECONDS = 2.0  # for any one answer: of processor time here, and the pool's limit of it in a child
MEGABYTES = 512  # resident, of any worker
EXIT = 77
WATCH = f"""
import os, resource, sys
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "socket.bind", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree")
AT_ONCE = "AT_ONCE" in os.environ
NAMES = {{"open", "os", "system", "__import__", "eval", "exec", "globals", "print", "exit"}}
def watch(event, args):
    if not AT_ONCE and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0:
        return  # a worker that still imports
    if event in FORBIDDEN:
        os._exit({EXIT})
    if event == "open" and (args[0] == "CANARY" or (isinstance(args[1], str) and set(args[1]) & set("wax+"))):
        os._exit({EXIT})
    if event == "exec" and getattr(args[0], "co_filename", "") == "<string>" and NAMES & set(args[0].co_names):
        os._exit({EXIT})
sys.addaudithook(watch)
"""
SLOW_KINDS = ("algebra that does not end", "memory")  # a second and a half each: run by make test-slow
ALL = list(cases())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grader]:
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(WATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.chdir(folder)
        with Grader() as grader:
            assert grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", grader).verdict is Verdict.CORRECT
            yield grader
        assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["sitecustomize.py"]


def resident(grader: Grader) -> float:
    """The largest peak of a worker's resident memory, in MiB."""
    peaks = [0.0]
    for pid in grader.pool.process_ids:
        status = Path(f"/proc/{pid}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        peaks += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return max(peaks)


def test_the_collection_is_large() -> None:
    assert len(ALL) >= 120
    assert len(KINDS) >= 12


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    for code in ("import os; os.system('true')", "eval('open(1)')", "open('x', 'w')", "import os; os.fork()"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(tmp_path), "AT_ONCE": "1"},
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == EXIT, code
    assert not (tmp_path / "x").exists()


def attack(grader: Grader, answer: str) -> None:
    for gold in ("7", "x+1"):
        grader.pool.warm()
        begin = time.process_time()
        score = grade_pair(gold, answer, grader)
        assert time.process_time() - begin < SECONDS
        assert grader.pool.seconds < SECONDS
        assert score.verdict is not Verdict.CORRECT, (gold, score)
        assert score.reason, score
        assert f"status {EXIT}" not in score.reason  # the watch has stopped nothing
        assert "crashed" not in score.reason
        json.dumps(score.extracted, ensure_ascii=False).encode("utf-8")
    assert resident(grader) < MEGABYTES


@pytest.mark.parametrize("name", [name for name, _ in ALL if not name.startswith(SLOW_KINDS)])
def test_hostile(watched: Grader, name: str) -> None:
    attack(watched, dict(ALL)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in ALL if name.startswith(SLOW_KINDS)])
def test_hostile_and_slow(watched: Grader, name: str) -> None:
    attack(watched, dict(ALL)[name])
    assert grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", watched).verdict is Verdict.CORRECT  # the pool lives
