"""An audit that is told to stop: nothing is left running, what is done is shown, and secrets were never
passed on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from truestep.audit import subjects as registry
from truestep.audit.environments import virtual as environment
from truestep.audit.measure.findings import Finding, Verdict
from truestep.cli import audit_actions as actions

HANGS = """import os, pathlib, time

def step(model, optimizer, microbatches):
    pathlib.Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_audit(tmp_path: Path, how: signal.Signals) -> None:
    pytest.importorskip("torch")
    loop, pid = tmp_path / "loop.py", tmp_path / "loop.pid"
    loop.write_text(HANGS)
    command = [sys.executable, "-m", "truestep", "audit", f"{loop}:step", "--json"]
    audit = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (pid.exists() and pid.read_text()):
        assert audit.poll() is None
        time.sleep(0.05)
    child = int(pid.read_text())
    audit.send_signal(how)
    said, _ = audit.communicate(timeout=60)
    for _ in range(200):
        if not _alive(child):
            break
        time.sleep(0.05)
    assert not _alive(child)
    if how == signal.SIGTERM:
        assert audit.returncode == 130
        (finding,) = json.loads(said)["findings"]
        assert (finding["verdict"], finding["reason"]) == ("NOT RUN", "interrupted before it was run")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = next(s for s in registry.TABLE if len(s.configurations) >= 3)
    fault = Finding(subject=subject.name, configuration={}, verdict=Verdict.FAULT)
    answers = iter([fault])

    def audit_one(*_: object, **__: object) -> Finding:
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(actions, "audit_one", audit_one)
    found = actions.run([subject], Path(sys.executable), seed=0, timeout=1)
    assert found[0] is fault
    assert len(found) == len(subject.configurations)
    assert {f.verdict for f in found[1:]} == {Verdict.NOT_RUN}
    assert actions.exit_code(found) == 130


def test_an_audited_environment_never_sees_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-caller")
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost/simple")
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(f'#!/bin/sh\nenv > "{seen}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment.installed(python)
    assert "PATH=" in seen.read_text()
    assert "secret" not in seen.read_text()
    with (tmp_path / "log").open("w") as log, (tmp_path / "lock").open("w") as lock:
        environment._execute("x", log, lock.fileno(), ["sh", "-c", f"env > {seen}"], UV_LINK_MODE="copy")
    assert "secret" not in seen.read_text()
    assert "PIP_INDEX_URL=http://localhost/simple" in seen.read_text()
    assert "UV_LINK_MODE=copy" in seen.read_text()
    assert os.environ["HF_TOKEN"] == "secret-of-the-caller"
