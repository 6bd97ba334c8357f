"""A subject that answers with devices, links, floods and strays gets a finding; the audit ends, and nothing is left."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truestep.audit.environments import launch
from truestep.audit.environments.launch import Job, SubjectFailed, run_script, sweep
from truestep.audit.measure import cases, observations
from truestep.audit.measure.findings import Verdict
from truestep.audit.measure.observations import ObservationError, load
from truestep.audit.subjects import Configuration, Subject

CASE = cases.build("ragged", world_size=1, accumulation=4, seed=0)
MIB = 1 << 20


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the audit start this code in place of an adapter."""
    folder = tmp_path / "subjects"
    folder.mkdir()
    for name in ("child.py", "model_sweep.py"):
        (folder / name).write_text(
            f"import os, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{code}\n"
        )
    monkeypatch.setattr(launch, "FOLDER", folder)


def job(timeout: float = 60.0) -> Job:
    return Job("hostile", Path(sys.executable), [CASE], {}, timeout=timeout)


PLACE = "place = folder / 'ragged'; place.mkdir(); result = place / 'rank-0.json'\n"


@pytest.mark.parametrize(
    "code",
    [
        "result.symlink_to('/dev/zero')",
        "result.symlink_to('/dev/full')",
        "os.mkfifo(result)",
        "result.mkdir()",
        "result.symlink_to(result)",
        "result.symlink_to('/proc/self/mem')",
        "(place / 'not-run.txt').symlink_to('/dev/zero')",
        "os.mkfifo(place / 'not-run.txt')",
        "result.write_text('[' * 99999)",
        "result.write_bytes(bytes(range(256)))",
        "result.write_text('null')",
        "result.write_text('')",
        "result.write_text('{\"schema\": 1}')",
        "(place / 'rank-x.json').write_text('{}')",
        "os.truncate(os.open(result, os.O_CREAT | os.O_RDWR), 2**29)",
    ],
)
def test_a_result_that_is_not_a_plain_file_of_json(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(tmp_path, monkeypatch, PLACE + code)
    with pytest.raises(ObservationError) as caught:
        launch.run(job())
    assert caught.value.args[0] == "unreadable"


def observed(folder: Path, autocast: str = "", **changed: Any) -> None:
    """A correct observation of one step without micro-batches, with these fields of the step changed."""
    vector = {"file": "v.bin", "dtype": "<f8", "shape": [3]}
    (folder / "v.bin").write_bytes(np.zeros(3).tobytes())
    step = {
        "microbatches": [],
        "rows": [],
        "row_losses": [],
        "before": vector,
        "after": vector,
        "control": vector,
        "extras": {},
        "masks": {},
    }
    step |= {"gradients": {"file": "g.bin", "dtype": "<f8", "shape": [0, 3]}}
    (folder / "g.bin").write_bytes(b"")
    rank = {
        "schema": 1,
        "world_size": 1,
        "steps": [step | changed],
        "logged": {"loss": [], "learning_rate": []},
    }
    rank |= {
        "forwards_without_step": 0,
        "unmatched_lines": 0,
        "parameters": [["w", [3]]],
        "versions": {},
        "location": "",
    }
    (folder / "rank-0.json").write_text(
        json.dumps(rank | {"autocast": autocast, "dtype": "float32", "seconds": {}})
    )


def test_the_correct_observation_is_read(tmp_path: Path) -> None:
    observed(tmp_path)
    assert load(tmp_path, CASE, learning_rate=1.0).steps[0].after.tolist() == [0, 0, 0]


@pytest.mark.parametrize("autocast", ["", "bfloat16"])
def test_a_model_under_autocast_has_the_noise_of_autocast(autocast: str, tmp_path: Path) -> None:
    """Whether or not the gradient was seen that the optimizer used."""
    observed(tmp_path, autocast)
    assert load(tmp_path, CASE, learning_rate=1.0).steps[0].narrow == autocast


@pytest.mark.parametrize(
    "header",
    [
        {"file": "/dev/zero"},
        {"file": "../../../../etc/passwd"},
        {"file": "link.bin"},
        {"file": "foreign.bin"},
        {"file": "../foreign.bin"},
        {"file": "pipe.bin"},
        {"dtype": "O"},
        {"dtype": "<i1"},
        {"shape": [10**15]},
        {"shape": [-2, 3]},
        {"shape": "3"},
        {"shape": [1, 3]},
        {"file": ""},
        {"file": "other.bin", "shape": [2]},
        {"file": 7},
    ],
)
def test_an_array_that_is_not_this_cases(header: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "link.bin").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path.parent / "foreign.bin").write_bytes(np.zeros(3).tobytes())
    (tmp_path / "foreign.bin").symlink_to(tmp_path.parent / "foreign.bin")
    (tmp_path / "other.bin").write_bytes(np.zeros(2).tobytes())
    observed(tmp_path, after={"file": "v.bin", "dtype": "<f8", "shape": [3], **header})
    with pytest.raises(ObservationError):
        load(tmp_path, CASE, learning_rate=1.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": [99]},
        {"rows": [0]},
        {"microbatches": [[[5]]]},
        {"extras": [1]},
        {"masks": [1]},
        {"masks": {"early": {"counts": ["x"], "gradients": None}}},
        {"microbatches": None},
    ],
)
def test_a_step_that_does_not_fit_its_case(changed: dict[str, Any], tmp_path: Path) -> None:
    observed(tmp_path, **changed)
    with pytest.raises(ObservationError):
        load(tmp_path, CASE, learning_rate=1.0)


@pytest.mark.parametrize(
    "code",
    [
        "sys.stdout.write('x' * (1 << 24))",
        "Path('big').write_bytes(bytes(1 << 24))",
        "(folder / 'big').write_bytes(bytes(1 << 24))",
        "for n in range(8): (folder / str(n)).write_bytes(bytes(1 << 20))\ntime.sleep(60)",
        "while True: sys.stdout.write('x' * 999)",
        "(folder / 'rank-0.log').symlink_to('/dev/zero'); sys.exit('gone')",
    ],
)
def test_a_subject_that_writes_without_end(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MOST_WRITTEN", 4 * MIB)
    child(tmp_path, monkeypatch, code)
    with pytest.raises(SubjectFailed) as caught:
        launch.run(job())
    assert len(str(caught.value)) < 500


def test_an_output_of_megabytes_is_not_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the end of it is shown."""
    child(tmp_path, monkeypatch, f"print('x' * {4 * MIB}); sys.exit('ValueError: no')")
    with pytest.raises(SubjectFailed, match=r"^exit code 1: ValueError: no$"):
        launch.run(job())


LEAVES = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        Path({marker!r}).write_text(str(os.getpid()))
        while True: time.sleep(0.1)
    os._exit(0)
while not Path({marker!r}).exists() or not Path({marker!r}).read_text(): time.sleep(0.01)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("ending", ["", "sys.exit('gone')", "time.sleep(60)"])
def test_no_process_of_a_subject_is_left(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "pid"
    child(tmp_path, monkeypatch, LEAVES.format(marker=str(marker)) + ending)
    with pytest.raises((SubjectFailed, ObservationError)):
        launch.run(job(timeout=1.0 if "sleep" in ending else 60.0))
    assert not is_alive(int(marker.read_text()))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_no_process_of_a_reproducer_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, marker, home = tmp_path / "script.py", tmp_path / "pid", tmp_path / "home"
    home.mkdir()
    head = "import os, sys, time\nfrom pathlib import Path\n"
    script.write_text(head + LEAVES.format(marker=str(marker)) + "print('weights [1]'); sys.exit(1)")
    assert run_script(script, Path(sys.executable), 1, home) == (True, "weights [1]")
    assert not is_alive(int(marker.read_text()))
    monkeypatch.setattr(launch, "MOST_WRITTEN", 4 * MIB)
    script.write_text("import sys\nwhile True: sys.stdout.write('x' * 999)")
    shows, said = run_script(script, Path(sys.executable), 1, home)
    assert shows is None
    assert len(said) <= 300


@pytest.mark.parametrize(
    "code",
    [
        "(folder / 'models.json').symlink_to('/dev/zero')",
        "(folder / 'models.json').write_text('[' * 99999)",
        "(folder / 'models.json').write_text('7')",
        "",
    ],
)
def test_a_sweep_without_a_usable_result(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(tmp_path, monkeypatch, code)
    with pytest.raises(SubjectFailed, match="exit code 0"):
        sweep(Path(sys.executable), timeout=60)


def test_the_finding_says_what_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(tmp_path, monkeypatch, PLACE + "result.symlink_to('/dev/zero')")
    subject = Subject(name="hostile", script="hostile", needs=(), configurations=[])
    finding = launch.audit_one(subject, Configuration(options={}, only=("ragged",)), Path(sys.executable))
    assert finding.verdict is Verdict.NOT_OBSERVABLE
    assert "cannot be read" in observations_words(finding)


def observations_words(finding: Any) -> str:
    from truestep.audit.present.words import row_of

    return str(row_of(finding))


def test_the_limit_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observations, "MOST_BYTES", 10)
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(11))
    assert observations.read_plain(tmp_path / "a") == bytes(10)
    with pytest.raises(OSError, match="plain file"):
        observations.read_plain(tmp_path / "b")
