"""What each rank of test_elastic.py runs: a list of jobs, each with as many ranks as it needs.

    python elastic_worker.py JOBS.json RANK

One process per rank does all jobs, because importing torch takes longer than a job."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tiny_runs import Silent, prepared

from truestep.checkpoint.manifest import list_checkpoints, step_of
from truestep.pipeline.run import open_run_folder
from truestep.pipeline.run import run as run_pipeline
from truestep.train import checkpoints, loop
from truestep.train.checkpoints import TrainState
from truestep.train.loop import StageSpec
from truestep.train.parallel import join, leave

restore = checkpoints.restore


def restore_and_save(spec: StageSpec) -> TrainState:
    """Restore, and save what was restored into a folder beside the checkpoints, before anything is trained."""
    state = restore(spec)
    if state.step:
        checkpoints.save(replace(spec, folder=spec.folder / "again"), state)
    return state


def cut(whole: Path, folder: Path, last: int) -> None:
    """Copy a run as it was after step ``last`` of its only stage."""
    shutil.copytree(whole, folder)
    (stage,) = (folder / "stages").iterdir()
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "export")
    for path in list_checkpoints(stage / "checkpoints"):
        if step_of(path) > last:
            shutil.rmtree(path)


def do(job: dict[str, Any], rank: int, store: Path) -> None:
    """``cut``: a finished run, which is first copied to ``out`` as it was after a step. ``clock``: the minutes
    that pass for each rank between two looks at its clock."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
    if job["ranks"] > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job["ranks"])
    ranks, reporter = join(), Silent()
    if "cut" in job and rank == 0:
        cut(Path(job["cut"]), Path(job["out"]), job["step"])
    checkpoints.restore = restore_and_save
    made = prepared(Path(job["recipe"]), f"compute.parallel={job['parallel']}", *job["overrides"])
    open_run_folder(made, Path(job["out"]), resume="cut" in job, rank=rank)
    ranks.barrier()
    loop.time = time
    if "clock" in job:
        looks = count()
        pace = 60.0 * job["clock"][rank]
        loop.time = SimpleNamespace(monotonic=lambda: pace * next(looks), perf_counter=time.perf_counter)
    run_pipeline(made, Path(job["out"]), ranks=ranks, reporter=reporter)
    ranks.barrier()
    leave()
    if rank == 0:
        (Path(job["out"]) / "said.json").write_text(json.dumps(reporter.said))


def main() -> None:
    torch.set_num_threads(1)
    listed, rank = Path(sys.argv[1]), int(sys.argv[2])
    for number, job in enumerate(json.loads(listed.read_text())):
        if rank < job["ranks"]:
            do(job, rank, listed.with_name(f"{listed.stem}-store-{number}"))


if __name__ == "__main__":
    main()
