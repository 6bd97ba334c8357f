"""A rank that is killed, stopped or has an error ends all ranks, with one line that names it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from rank_jobs import Ended, Job, lines_in
from tiny_runs import write_recipe

from truestep.train import wire
from truestep.train.channel import LIMIT, LOST_CODE


def job(case: str, folder: Path, *, world_size: int = 2, silence: float = LIMIT) -> Job:
    return Job(["worker", case, str(folder)], folder, world_size=world_size, silence=silence)


def after(signal: str, ranks: Sequence[int], started: Job, *, seconds: float) -> Ended:
    """Signal ranks when all are at work, and wait until all have ended."""
    with started:
        started.wait_for(started.ready)
        started.signal(signal, *ranks)
        return started.end(seconds)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_all_ranks_at_once(lost: int, tmp_path: Path) -> None:
    ended = after("kill", [lost], job("collective", tmp_path, world_size=3), seconds=20)
    assert ended.codes == [-9 if rank == lost else LOST_CODE for rank in range(3)]
    (line,) = ended.errors
    assert f"rank {lost} (" in line
    assert "has ended without an error" in line
    assert "--resume" in line


def test_a_stopped_rank_ends_all_ranks_and_is_ended_itself(tmp_path: Path) -> None:
    ended = after("stop", [1], job("collective", tmp_path, world_size=3, silence=3), seconds=30)
    assert ended.codes == [LOST_CODE, -9, LOST_CODE]
    assert ended.seconds > 2
    (line,) = ended.errors
    assert "rank 1 (" in line
    assert "has not answered for 3 s" in line


@pytest.mark.parametrize("case", ["error", "same_error"])
def test_an_error_of_a_rank_is_reported_once(case: str, tmp_path: Path) -> None:
    with job(case, tmp_path, world_size=3) as started:
        ended = started.end(60)
    assert ended.codes == [3, 3, 3]
    (line,) = ended.errors
    assert "is not finite" in line
    assert "lost" not in "".join(ended.outputs)


def test_a_busy_rank_is_not_lost(tmp_path: Path) -> None:
    with job("busy", tmp_path, silence=1.5) as started:
        ended = started.end(60)
    assert ended.codes == [0, 0]
    assert ended.errors == []


def test_a_connection_without_the_key_is_not_a_rank() -> None:
    with wire.listen("127.0.0.1") as server, socket.socket() as stranger, socket.socket() as other:
        for connection, hello in ((stranger, b"guess 1\n"), (other, b"key 2\n")):
            connection.connect(server.getsockname())
            connection.sendall(hello)
        found = wire.accept(server, "key", 1)
        assert list(found) == [2]
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
        found[2].close()


def test_a_rank_that_is_heard_late_has_not_left() -> None:
    """It beats as soon as it is connected, which may be before rank 0 reads its first line."""
    with wire.listen("127.0.0.1") as server:
        early = wire.connect("127.0.0.1", server.getsockname()[1], "key", 1)
        early.put({"k": "beat"})
        early.write()
        found = wire.accept(server, "key", 1)
        values, is_closed = found[1].read()
        assert (values, is_closed) == ([{"k": "beat"}], False)
        early.close()
        found[1].close()


def run_of(folder: Path, parallel: str) -> list[str]:
    recipe = write_recipe(folder)
    more = ["--set", f"compute.parallel={parallel}", "--set", "stages.rl.steps=400"]
    return ["run", str(recipe), "--out", str(folder / "run"), *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "lost", "world_size", "parallel"),
    [("kill", 1, 2, "ddp"), ("kill", 0, 3, "fsdp2"), ("stop", 1, 2, "fsdp2"), ("stop", 0, 3, "ddp")],
)
def test_a_run_says_what_it_has_saved(
    signal: str, lost: int, world_size: int, parallel: str, tmp_path: Path
) -> None:
    log = tmp_path / "run/stages/02-rl/metrics.jsonl"
    with Job(run_of(tmp_path, parallel), tmp_path / "logs", world_size=world_size) as started:
        started.wait_for(lambda: lines_in(log) >= 3, seconds=200)
        started.signal(signal, lost)
        ended = started.end(60)
    assert ended.codes == [-9 if rank == lost else LOST_CODE for rank in range(world_size)]
    (line,) = ended.errors
    assert f"rank {lost} (" in line
    assert "02-rl/checkpoints/step_" in line
