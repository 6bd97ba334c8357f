"""Cells on a Ray cluster of two nodes, one of which has a GPU: where they run, and what dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import pytest

from truestep.errors import UserError
from truestep.study import engines
from truestep.study.cell_runner import Runner
from truestep.study.load import load_study
from truestep.study.processes import start
from truestep.study.run import run_cells

ray = pytest.importorskip("ray", reason="ray is not installed")

pytestmark = pytest.mark.timeout(600)  # each node of the cluster starts several processes

RAY_START = [
    str(Path(sys.executable).parent / "ray"),
    "start",
    "--block",
    "--object-store-memory",
    "100000000",
]
GPU = (
    cells.STUDY.replace("seeds = [1]", "seeds = [1]\nworkers = 2\nresources = { gpus = 1 }")
    + cells.SECOND_ARM
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes, of which the second has a GPU that is only declared; it may be stopped by a test."""
    from ray.cluster_utils import Cluster

    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    made = Cluster()
    made.add_node(num_cpus=2, object_store_memory=10**8)
    made.gpu_node = made.add_node(num_cpus=2, num_gpus=1, object_store_memory=10**8)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same study by the local engine, with GPUs of other names."""
    made = cells.runner(tmp_path_factory.mktemp("local"), start, "out", GPU, gpus=("7", "9"))
    assert run_cells(made)
    return cells.contents(made.out)


def on_ray(folder: Path, text: str = GPU) -> Runner:
    cells.runner(folder, start, "out", text)
    said: list[str] = []
    engine = engines.ray(load_study(folder / "study.toml"), said.append)
    made = cells.runner(folder, engine.launch, "out", text, gpus=engine.gpus, stop=engine.stop)
    made.said[:] = said  # type: ignore[attr-defined]
    made.out.mkdir()
    engine.check(made.out)
    return made


def test_cells_wait_for_the_gpu_and_see_the_one_that_ray_has_set(
    cluster: Any, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    made = on_ray(tmp_path)
    assert made.said == []  # type: ignore[attr-defined]
    assert len(run_cells(made)) == 2
    assert made.failures == {}
    assert cells.contents(made.out) == undisturbed
    assert cells.seen(tmp_path) == ["0", "0"]
    spans = []
    for log in made.out.glob("cells/*/run/stages/*/metrics.jsonl"):
        run = log.parents[2]
        spans.append(((run.parent / "recipe.toml").stat().st_mtime, (run / "resolved.toml").stat().st_mtime,
                      (run / "summary.json").stat().st_mtime))  # fmt: skip
    first, second = sorted(spans, key=lambda span: span[1])
    assert second[0] < first[2], "both are asked for at once"
    assert second[1] > first[2], "but there is one GPU"


def test_cells_without_gpus_see_none(cluster: Any, tmp_path: Path) -> None:
    made = on_ray(tmp_path, cells.STUDY)
    assert len(run_cells(made)) == 1
    assert cells.seen(tmp_path) == [""]


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_a_cell_whose_worker_dies_is_tried_again(
    victim: str, cluster: Any, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    made = on_ray(tmp_path)
    chosen = (lambda pid: pid) if victim == "child" else (lambda pid: cells.parent(cells.parent(pid)))
    assert len(cells.kill_in_the_middle(made, victim=chosen)) == 1
    why = "killed by SIGKILL" if victim == "child" else "lost, its Ray worker or node has ended"
    assert [line for line in made.said if why in line and "it is started again" in line]  # type: ignore[attr-defined]
    assert made.failures == {}
    assert cells.contents(made.out) == undisturbed


def test_an_error_of_a_task_is_a_record_and_the_other_arms_continue(cluster: Any, tmp_path: Path) -> None:
    made = on_ray(tmp_path)
    launch = made.launch
    lost = []

    def without_folder(order: Any) -> tuple[int, str]:
        if "lr = 0.02" in (made.out / order.recipe).read_text():
            lost.append(order.run)
            (made.out / order.recipe).unlink()
        return launch(order)

    made.launch = without_folder
    assert list(run_cells(made)) == ["sft-s1"]
    assert "exit code 2" in made.failures["other-s1"]
    assert len(lost) == 1  # it is not tried again


def test_a_task_that_raises_is_a_record(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "on_worker", lambda order, mark: 1 / 0)
    made = on_ray(tmp_path)
    assert run_cells(made) == {}
    assert "ZeroDivisionError" in made.failures["sft-s1"]
    assert not [line for line in made.said if "started again" in line]  # type: ignore[attr-defined]


def test_a_stopped_study_tells_its_tasks(cluster: Any, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    made = on_ray(tmp_path)

    def interrupt() -> None:
        while not cells.trainer(made.out, 10):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        run_cells(made)
    finally:
        signal.signal(signal.SIGINT, before)
    assert made.stopped.is_set()
    assert made.failures == {}
    logs = [p.read_text() for p in made.out.glob("cells/*/run.log")]
    assert [text for text in logs if "all finished work is saved" in text]
    again = on_ray_again(tmp_path)
    assert len(run_cells(again)) == 2
    assert cells.contents(again.out) == undisturbed


def on_ray_again(folder: Path) -> Runner:
    engine = engines.ray(load_study(folder / "study.toml"), print)
    engine.check(folder / "out")
    return cells.runner(folder, engine.launch, "out", GPU, gpus=engine.gpus, stop=engine.stop)


def test_a_folder_that_this_node_does_not_see_is_named(tmp_path: Path) -> None:
    said = engines.unseen(str(tmp_path / "nothing"), "mark", seconds=0.0)
    assert str(tmp_path / "nothing") in said
    assert "pass --out with a folder on a file system that all nodes share" in said
    (tmp_path / engines.SHARED).write_text("of another study")
    assert engines.unseen(str(tmp_path), "mark", seconds=0.0)
    (tmp_path / engines.SHARED).write_text("mark")
    assert engines.unseen(str(tmp_path), "mark", seconds=0.0) == ""


def can_hide() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_hide(), reason="a node with its own file systems needs the right to make one")
def test_a_node_without_the_shared_folder_is_an_error_before_anything_runs(
    cluster: Any, tmp_path: Path
) -> None:
    """The third node has an empty file system in place of the folder of the study."""
    hidden = f"mount -t tmpfs none '{tmp_path}' && exec \"$@\""
    words = ["unshare", "-m", "sh", "-c", hidden, "sh", *RAY_START]
    words += ["--address", cluster.address, "--num-cpus", "2", "--num-gpus", "1"]
    node = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while len([n for n in ray.nodes() if n["Alive"]]) < 3:
            assert node.poll() is None
            time.sleep(0.2)
        with pytest.raises(UserError) as caught:
            on_ray(tmp_path)
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(60)
    assert f"does not see the study directory {tmp_path / 'out'}" in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [engines.SHARED]


def test_a_node_that_goes_away_is_replaced(
    cluster: Any, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The node with the GPU goes in the middle of a cell; the cell waits until there is another one."""
    made = on_ray(tmp_path)

    new: list[subprocess.Popen[bytes]] = []

    def replace_node() -> None:
        while not cells.trainer(made.out, 25):
            time.sleep(0.02)
        cluster.remove_node(cluster.gpu_node, allow_graceful=False)
        words = [*RAY_START, "--address", cluster.address, "--num-cpus", "2", "--num-gpus", "1"]
        new.append(
            subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
        )

    thread = threading.Thread(target=replace_node)
    thread.start()
    try:
        assert len(run_cells(made)) == 2
    finally:
        thread.join()
        os.killpg(new[0].pid, signal.SIGTERM)
        new[0].wait(60)
    assert [line for line in made.said if "lost, its Ray worker or node has ended" in line]  # type: ignore[attr-defined]
    assert made.failures == {}
    assert cells.contents(made.out) == undisturbed
