"""Sends metrics to the recipe's trackers: TensorBoard, trackio or wandb (by default offline)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from truestep.errors import UserError

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
Log = Callable[[int, Mapping[str, float]], None]


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is missing, before anything is trained."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UserError(
                f'trackers = ["{name}"] needs the {MODULES[name]} package; run pip install "truestep[track]"'
            )


def open_trackers(names: Sequence[str], folder: Path, run_name: str) -> list[Log]:
    """Open the trackers. Each returned function takes the run's global step and a row of metrics."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    return [openers[name](folder, run_name) for name in names]


def _tensorboard(folder: Path, _: str) -> Log:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log


def _wandb(folder: Path, run_name: str) -> Log:
    import wandb

    mode, project = os.environ.get("WANDB_MODE", "offline"), os.environ.get("WANDB_PROJECT", "truestep")
    run = wandb.init(dir=str(folder), name=run_name, project=project, mode=mode)
    return lambda step, metrics: run.log(dict(metrics), step=step)


def _trackio(folder: Path, run_name: str) -> Log:
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
    import trackio

    run = trackio.init(project="truestep", name=run_name, embed=False)
    return lambda step, metrics: run.log(dict(metrics), step=step)
