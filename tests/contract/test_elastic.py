"""A run continues on any number of ranks, with copies or with shards of the model. What is restored is, bit for
bit, what was saved; and the run goes on as the one that was never stopped: bit for bit on the same ranks, and up
to float32 rounding on others. ``make elastic`` runs the whole matrix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import same, silent
from method_runs import recipe_of, start
from tiny_runs import differing, fingerprint

from truestep import rundir
from truestep.checkpoint.layout import Checkpoint
from truestep.checkpoint.store import load_latest

pytestmark = pytest.mark.timeout(900)  # the first test also makes the runs of all others
WORKER = Path(__file__).with_name("elastic_worker.py")
STAGE = "stages/01-rl"
STEPS, SAVED = 4, 2
# Work that depends on how sequences are packed on a rank, and differences that are rounding and nothing else.
OF_THE_LAYOUT = {"work", "flops_full", "flops_paper", "publish", "sampling", "approx_kl"}
# Between runs that were never stopped, on other ranks, parameters differ by at most 1.5e-5 and metrics by 4e-6 of their
# values (make elastic, and four other seeds of dapo). Ten times that is allowed; other ranks' data moves them by 5e-3.
CLOSE_PARAMETERS, CLOSE_METRICS = 1.5e-4, 4e-5


@dataclass(frozen=True)
class Layout:
    """A number of ranks, with copies (ddp) or shards (fsdp2) of the model."""

    ranks: int
    parallel: str = "ddp"

    def __str__(self) -> str:
        return f"{self.ranks}{self.parallel}"


ONE = Layout(1)
DDP2, DDP3, DDP4 = (Layout(n) for n in (2, 3, 4))
FSDP2, FSDP3, FSDP4 = (Layout(n, "fsdp2") for n in (2, 3, 4))
ALL = (ONE, DDP2, DDP3, DDP4, FSDP2, FSDP3, FSDP4)
Pair = tuple[Layout, Layout]  # saved by, continued by


class Runs:
    """The runs of one method. ``whole`` was never stopped; ``resumed`` was saved by one layout after step SAVED
    and continued by another. ``jobs`` makes them."""

    def __init__(self, folder: Path, model: str, method: str, pairs: list[Pair], *overrides: str) -> None:
        self.folder, self.pairs = folder / "-".join([method, *overrides]), pairs
        recipe = recipe_of(self.folder, model, method, steps=STEPS)
        every = ("stages.rl.save_every=1", "stages.rl.keep_checkpoints=9", *overrides)
        self._shared = {"recipe": str(recipe), "overrides": every}

    @property
    def jobs(self) -> list[dict[str, Any]]:
        saved_by = dict.fromkeys(saved for saved, _ in self.pairs)
        made = [self._job(layout, self.whole(layout)) for layout in saved_by]
        for saved, after in self.pairs:
            whole = str(self.whole(saved))
            made.append(self._job(after, self.resumed(saved, after), cut=whole, step=SAVED))
        return made

    def whole(self, layout: Layout) -> Path:
        return self.folder / f"whole-{layout}"

    def resumed(self, saved: Layout, after: Layout) -> Path:
        return self.folder / f"{saved}-{after}"

    def _job(self, layout: Layout, out: Path, **more: Any) -> dict[str, Any]:
        return {**self._shared, "ranks": layout.ranks, "parallel": layout.parallel, "out": str(out), **more}


def run(folder: Path, jobs: list[dict[str, Any]], *, seconds: float) -> None:
    """Run the jobs one after the other, with as many processes as the largest needs."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, listed, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(max(job["ranks"] for job in jobs))
    ]
    try:
        outputs = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0, output[-4000:]


def checkpoint(folder: Path, step: int) -> Checkpoint:
    """A checkpoint's whole tensors, read by one process."""
    one = folder.parent / f"{folder.parent.name}-{folder.name}-{step}"
    if not one.exists():
        shutil.copytree(folder / f"step_{step:08d}", one / f"step_{step:08d}")
    found = load_latest(one, warn=silent)
    assert found is not None
    return found


def state_of(found: Checkpoint) -> Checkpoint:
    """Without what says where the run was: its log files and its layout."""
    state = {key: value for key, value in found.state.items() if key not in ("logs", "layout")}
    return replace(found, state=state)


def assert_restored(runs: Runs, saved: Layout, after: Layout) -> None:
    before = checkpoint(runs.whole(saved) / STAGE / "checkpoints", SAVED)
    again = checkpoint(runs.resumed(saved, after) / STAGE / "again/checkpoints", SAVED)
    assert same(state_of(before), state_of(again))


def distance(a: Path, b: Path) -> tuple[float, float]:
    """Largest difference of a parameter, and of a metric relative to its value (or to 0.01)."""
    one, two = (checkpoint(run / STAGE / "checkpoints", STEPS).tensors["parameters"] for run in (a, b))
    assert one.keys() == two.keys()
    of_parameters = max(float((one[name] - two[name]).abs().max()) for name in one)
    of_metrics = 0.0
    rows = [rundir.read_jsonl(run / STAGE / "metrics.jsonl") for run in (a, b)]
    for left, right in zip(*rows, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            if key.removeprefix("rl/").partition("/")[0] not in OF_THE_LAYOUT:
                of_metrics = max(of_metrics, abs(left[key] - right[key]) / max(abs(left[key]), 1e-2))
    return of_parameters, of_metrics


def assert_continued(runs: Runs, saved: Layout, after: Layout) -> None:
    whole, resumed = runs.whole(saved), runs.resumed(saved, after)
    rows = [(run / STAGE / "rollouts.jsonl").read_text() for run in (whole, resumed)]
    assert rows[0] == rows[1], "other samples"
    said = json.loads((resumed / "said.json").read_text())
    assert any("equal an uninterrupted one only up to rounding" in text for text in said) == (saved != after)
    if saved == after:
        assert differing(fingerprint(whole), fingerprint(resumed)) == []
        return
    of_parameters, of_metrics = distance(whole, resumed)
    assert of_parameters < CLOSE_PARAMETERS
    assert of_metrics < CLOSE_METRICS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return start(tmp_path_factory.mktemp("start"))


PAIRS = [(FSDP2, ONE), (ONE, FSDP2), (DDP2, FSDP3), (FSDP2, FSDP2)]
PACES = (0, 10)  # the minutes that pass on rank 1's clock while one passes on rank 0's


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    folder = tmp_path_factory.mktemp("elastic")
    made = {
        "buffered": Runs(folder, model, "relift", PAIRS),
        "stored": Runs(folder, model, "exgrpo", [(FSDP2, ONE), (DDP2, FSDP2)], "compute.dtype=bfloat16"),
        "refilled": Runs(folder, model, "dapo", [(ONE, DDP2), (DDP2, ONE)], "seed=1"),
    }
    jobs = [job for runs in made.values() for job in runs.jobs]
    every = ("stages.rl.save_every=50", "stages.rl.keep_checkpoints=9", "stages.rl.save_every_minutes=2.5")
    recipe = recipe_of(folder / "clocks", model, "grpo", steps=7)
    for pace in PACES:
        job = {"recipe": str(recipe), "overrides": every, "ranks": 2, "parallel": "ddp"}
        jobs.append({**job, "out": str(folder / f"clock-{pace}"), "clock": [1, pace]})
    run(folder, jobs, seconds=900)
    return made


@pytest.fixture(scope="module")
def buffered(runs: dict[str, Runs]) -> Runs:
    """Two optimizers, and demonstrations that wait."""
    return runs["buffered"]


@pytest.mark.parametrize(("saved", "after"), PAIRS, ids=lambda layout: str(layout))
def test_other_ranks_restore_every_bit_and_continue(buffered: Runs, saved: Layout, after: Layout) -> None:
    assert_restored(buffered, saved, after)
    assert_continued(buffered, saved, after)


def test_the_case_has_something_to_lose(buffered: Runs) -> None:
    for layout, writers in ((FSDP2, 2), (DDP2, 1), (ONE, 1)):
        folder = buffered.whole(layout) / STAGE / "checkpoints"
        found = checkpoint(folder, SAVED)
        names = {p.name for p in (folder / f"step_{SAVED:08d}").glob("*.safetensors")}
        assert len([name for name in names if name.startswith("parameters.")]) == writers
        assert found.state["memory"]["waiting"]
        moments = [t for n, t in found.tensors["buffer-optimizer"].items() if n.startswith("exp_avg/")]
        assert any(bool(t.any()) for t in moments)
        assert any(bool(t.any()) for n, t in found.tensors["optimizer"].items() if n.startswith("exp_avg/"))


def test_stored_samples_and_low_precision_masters_are_restored(runs: dict[str, Runs]) -> None:
    stored = runs["stored"]
    for saved, after in stored.pairs:
        assert_restored(stored, saved, after)
        found = checkpoint(stored.whole(saved) / STAGE / "checkpoints", SAVED)
        assert found.state["memory"]["replay"]
        assert found.tensors["memory"]["tokens"].numel()
        assert any(name.startswith("master/") for name in found.tensors["optimizer"])


def test_groups_that_replace_dropped_ones_are_the_same_on_any_number_of_ranks(runs: dict[str, Runs]) -> None:
    refilled = runs["refilled"]
    for saved, after in refilled.pairs:
        assert_continued(refilled, saved, after)
    of_parameters, of_metrics = distance(refilled.whole(ONE), refilled.whole(DDP2))
    assert of_parameters < CLOSE_PARAMETERS
    assert of_metrics < CLOSE_METRICS


@pytest.mark.parametrize("pace", PACES)
def test_rank_0s_clock_decides_for_all_ranks(runs: dict[str, Runs], pace: int) -> None:
    folder = runs["buffered"].folder.parent / f"clock-{pace}" / STAGE / "checkpoints"
    steps = [path.name for path in sorted(folder.glob("step_*"))]
    assert steps == ["step_00000003", "step_00000006", "step_00000007"]


# ------------------------------------------------------------------------------------------------- everything


EVERY_PAIR = [(saved, after) for saved in ALL for after in ALL]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("method", ["relift", "exgrpo", "dapo"])
def test_every_pair_of_layouts(model: str, tmp_path: Path, method: str) -> None:
    runs = Runs(tmp_path, model, method, EVERY_PAIR)
    run(tmp_path, runs.jobs, seconds=7200)
    noise = [distance(runs.whole(a), runs.whole(b)) for a in ALL for b in ALL if a != b]
    after_resume = [distance(runs.whole(a), runs.resumed(a, b)) for a, b in runs.pairs if a != b]
    for what, found in (("never stopped, other ranks", noise), ("continued by other ranks", after_resume)):
        parameters, metrics = (max(values) for values in zip(*found, strict=True))
        print(f"{method}, {what}: parameters {parameters:.1e}, metrics {metrics:.1e} ({len(found)} pairs)")
    for saved, after in runs.pairs:
        assert_restored(runs, saved, after)
        assert_continued(runs, saved, after)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_pair_of_layouts_restores_low_precision_masters(model: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, model, "relift", EVERY_PAIR, "compute.dtype=bfloat16")
    run(tmp_path, runs.jobs, seconds=7200)
    for saved, after in runs.pairs:
        assert_restored(runs, saved, after)
