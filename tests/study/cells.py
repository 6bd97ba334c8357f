"""Cells of a few seconds with real child processes, and how to kill one in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from truestep.study.cell_runner import Runner
from truestep.study.engines import Launch
from truestep.study.load import load_study
from truestep.study.run import run_cells

STUDY = """
name = "cells"
question = "Does a cell survive?"
seeds = [1]
reference = "sft"
may_differ = ["sft.optimizer.lr", "sft.method"]

[controls_off]
base = "not needed here"
sft-continued = "not needed here"
rl-from-base = "not needed here"
random-reward = "not needed here"
rejection = "not needed here"

[run.model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 }
[run.data.train]
source = "procedural:addition"
seed = 0
limit = 30
options = { digits = 1 }
[run.data.test]
source = "procedural:addition"
seed = 0
split = "test"
limit = 4
options = { digits = 1 }
[run.evaluate]
data = ["test"]
before = false
sampling = { max_new_tokens = 8 }

[stages.sft]
kind = "sft"
data = "train"
method = "row.py:mine"
steps = 60
sequences_per_step = 8
tokens_per_microbatch = 400
save_every = 10
optimizer = { lr = 1e-2 }

[[arms]]
name = "sft"
control = "sft"
stages = ["sft"]
"""

SECOND_ARM = """
[[arms]]
name = "other"
stages = ["sft"]
set = { "sft.optimizer.lr" = 2e-2 }
"""

# A row that notes which GPUs its process sees.
ROW = """
import os
from pathlib import Path
from truestep.objective.methods.sft import sft

with (Path(__file__).parent / f"seen-{os.getpid()}").open("w") as file:
    file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))

def mine():
    return sft()
"""


def write(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "row.py").write_text(ROW)
    path = folder / "study.toml"
    path.write_text(text)
    return path


def runner(folder: Path, launch: Launch, out: str, text: str = STUDY, **given: Any) -> Runner:
    """Return the runner of a study, whose messages are in ``runner.said``."""
    path = write(folder, text)
    said: list[str] = []
    study = load_study(path)
    made = Runner(
        study=study,
        where=path,
        out=folder / out,
        launch=launch,
        workers=study.workers,
        say=said.append,
        **given,
    )
    made.said = said  # type: ignore[attr-defined]
    return made


def seen(folder: Path) -> list[str]:
    """Return the GPUs that each process that trained has seen. The process of the study itself sees all."""
    return sorted(p.read_text() for p in folder.glob("seen-*") if p.name != f"seen-{os.getpid()}")


def trainer(out: Path, at_step: int) -> int:
    """Return the process that trains a cell of this study and has logged this many steps, or 0."""
    for log in out.glob("cells/*/run/stages/*/metrics.jsonl"):
        run = log.parents[2]
        holder = re.match(r"process (\d+) ", (run / ".lock").read_text())
        if (
            holder
            and len(log.read_bytes().splitlines()) >= at_step
            and not (log.parent / "done.json").exists()
        ):
            return int(holder[1])
    return 0


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_in_the_middle(
    made: Runner, victim: Callable[[int], int] = lambda pid: pid, times: int = 1, at_step: int = 25
) -> list[int]:
    """Run a study, and kill the process that ``victim`` chooses from the one that trains, ``times`` times."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and len(killed) < times:
            if (pid := trainer(made.out, at_step)) and pid not in killed:
                killed.append(pid)
                os.kill(victim(pid), signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run_cells(made)
    finally:
        over.set()
        thread.join()
    return killed


def contents(out: Path) -> dict[str, bytes]:
    """Return what must not depend on kills: metrics, samples, exported weights and scores."""
    found = {}
    for pattern in ("**/metrics.jsonl", "**/export/*.safetensors"):
        found |= {str(p.relative_to(out)): p.read_bytes() for p in out.glob(f"cells/*/run/{pattern}")}
    for path in out.glob("cells/*/run/**/*.samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # The identity contains the path of the row's file, and is part of the checksums.
        kept = [{k: v for k, v in row.items() if k not in ("identity", "checksum")} for row in rows]
        found[str(path.relative_to(out))] = json.dumps(kept).encode()
    assert any("metrics" in name for name in found)
    assert any("safetensors" in name for name in found)
    return found
