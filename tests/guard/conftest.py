"""Two gloo processes that run all loops of two ranks, once for all tests that read their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each rank's guard recorded: key of the loop → records, failure."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    outs = [folder / f"rank-{rank}.json" for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks_worker.py"), str(folder / "store"), str(rank), str(outs[rank])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [p.returncode for p in started] == [0, 0], said[0][-3000:]
    return [json.loads(out.read_text()) for out in outs]
