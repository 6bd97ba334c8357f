"""A tracker writes into the run directory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from truestep.pipeline.track import open_trackers

# As in trackio 0.43: the folder is read from the environment when the package is imported.
TRACKIO = """
import os
from pathlib import Path

FOLDER = Path(os.environ.get("TRACKIO_DIR", "cache"))


class Run:
    def log(self, metrics, step):
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{step}.txt").write_text(str(metrics))


def init(**options):
    return Run()
"""


def test_trackio_writes_into_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "restored after the test")
    monkeypatch.delenv("TRACKIO_DIR")
    try:
        (log,) = open_trackers(["trackio"], tmp_path / "run", "name")
    finally:
        sys.modules.pop("trackio", None)  # other tests use the real one
    log(7, {"rl/reward": 0.5})
    assert (tmp_path / "run/trackio/7.txt").read_text() == "{'rl/reward': 0.5}"
