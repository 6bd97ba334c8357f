"""The guard in loops of torch, accelerate and transformers: it changes no bit, and its records are right.

The loops run with the guard and without it, in two child processes that are started once: one alone, and one with
two ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import framework_fsdp1  # noqa: E402, F401
import framework_loops  # noqa: E402, F401
import framework_more  # noqa: E402, F401
from framework_run import LOOPS  # noqa: E402

QUICK = {name: about for name, (_, about) in LOOPS.items() if not about.get("slow")}  # the benchmark runs all
ALONE = [name for name, about in QUICK.items() if about.get("ranks", 1) == 1]
PAIR = [name for name, about in QUICK.items() if about.get("ranks", 1) == 2]
SAME = {"float32": 1e-4, "bfloat16": 2e-2}  # relative


def results(folder: Path, names: list[str], ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Return each loop's result on each rank."""
    port = str(20000 + os.getpid() % 20000)
    each = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    script = [
        sys.executable,
        str(HERE / "framework_run.py"),
        "framework_loops,framework_more,framework_fsdp1",
        str(folder / "out"),
        *names,
    ]
    children = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **(each if ranks > 1 else {}), **(own if ranks > 1 else {})}
        log = (folder / f"log.{rank}").open("w")
        children.append(subprocess.Popen(script, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, child in enumerate(children):
            assert child.wait(timeout=280) == 0, (folder / f"log.{rank}").read_text()[-3000:]
    finally:
        for child in children:
            child.kill()
    lines = [(folder / f"out.{rank}").read_text().splitlines() for rank in range(ranks)]
    return {name: [json.loads(line) for line in given] for name, *given in zip(names, *lines, strict=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return results(tmp_path_factory.mktemp("alone"), ALONE, 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return results(tmp_path_factory.mktemp("pair"), PAIR, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str, alone: dict[str, list[dict[str, Any]]]) -> None:
    check(alone[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIR)
def test_pair(name: str, pair: dict[str, list[dict[str, Any]]]) -> None:
    check(pair[name])
    first, second = pair[name]
    assert first["hash"] == second["hash"]
    for mine, other in zip(first["records"], second["records"], strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}


def check(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert "crash" not in result, result["crash"]
        assert result["bit_equal"]
        assert result["failure"] == ""
        assert [r["step"] for r in result["records"]] == [1, 2, 3, 4]
    result = ranks[0]
    wanted, start = result.get("verdict", "RIGHT"), result.get("at", 1)
    for record in result["records"]:
        if record["step"] < start:
            assert record["verdict"] != "FAULT"
            continue
        assert record["verdict"] == wanted, record["fault"]
        if wanted == "FAULT":
            assert result["code"].split()[0] in record["codes"]
            assert set(record["codes"]) <= set(result["code"].split())
        elif wanted == "RIGHT":
            right(record, ranks)
        else:
            assert record["notes"]
            assert not record["weights"]


def right(record: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Check the numbers of a record against what the loop was given."""
    same = SAME[ranks[0].get("dtype", "float32")]
    weights = np.array(record["weights"])
    assert weights == pytest.approx(weights.mean(), rel=same)
    assert record["residual"] < same
    if not ranks[0].get("sees_tokens", True):
        assert not record["tokens"]
        assert record["notes"]
        return
    tokens, token_weights = np.array(record["tokens"]), np.array(record["token_weights"])
    assert token_weights.size
    scale = ranks[0].get("scale", [1] * 4)[record["step"] - 1] * len(ranks)
    if told := [r["notes"].get("tokens") for r in ranks if r["notes"]]:
        assert record["tokens"] == [each[record["step"] - 1] for each in told]
        assert token_weights * tokens.sum() == pytest.approx(scale, rel=same)
    else:
        assert token_weights == pytest.approx(token_weights.mean(), rel=same)
