"""The engine check with two ranks: only the first asks, both come to the same result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engine-ranks")
    outs = [folder / f"rank-{rank}.json" for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "engine_ranks_worker.py"), str(folder / "store"), str(rank), str(outs[rank])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("deliver", ["fresh", "frozen", "failing"])
def test_two_ranks(ranks: list[dict[str, Any]], kind: str, deliver: str) -> None:
    first, second = (rank[f"{kind} {deliver}"] for rank in ranks)
    assert (first["failure"], second["failure"]) == ("", "")
    assert (first["codes"], first["engine"]) == (second["codes"], second["engine"])
    assert [len(n) for n in first["notes"]] == [len(n) for n in second["notes"]]
    assert (first["asked"] > 0, second["asked"]) == (True, 0)
    assert first["same"]
    assert second["same"]
    late = [["stale_engine"]] * 4 if deliver == "frozen" else [[]] * 4
    assert first["codes"] == [[], [], *late]
    if deliver == "fresh":
        assert abs(first["engine"][-1]["slope"] - 1) < 0.1
