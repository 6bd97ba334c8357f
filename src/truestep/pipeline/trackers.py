"""The experiment trackers: one adapter for each package, which is imported when the first value is sent.

Held by: tests/contract/test_trackers_real.py (`make test-trackers`)"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Values = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about a run. After a resume, all but ``has_config`` is the same."""

    folder: Path  # of the tracker, in the run directory; it exists
    id: str
    name: str
    group: str
    config: Mapping[str, Any]  # every setting by its key, such as stages.sft.optimizer.lr
    has_config: bool  # whether the tracker was given this config before


class Tracker(Protocol):
    """A tracker of one run. It can also have ``restart(step)``, which is called if the steps from there on will be
    logged again. If a kill loses values that were logged, it has ``stored()``, which returns the keys and steps that it
    has (None if unknown), or ``is_late = True``; then those of a killed session are logged again."""

    def log(self, step: int, values: Values) -> None: ...

    def finish(self, status: str) -> None:
        """End the session. ``status`` is done, interrupted or failed."""


class TensorBoard:
    is_late = True

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.folder))
        if not run.has_config:
            rows = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in run.config.items()]
            self._writer.add_text("config", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def log(self, step: int, values: Values) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def restart(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)  # readers leave out what was logged from this step on
        event = Event(wall_time=time.time(), step=step, session_log=start)
        self._writer.file_writer.event_writer.add_event(event)

    def finish(self, status: str) -> None:
        self._writer.close()


class Wandb:
    is_late = True

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_CACHE_DIR", str(run.folder / "cache"))
        import wandb

        quiet = wandb.Settings(  # no command line and no terminal output, which can contain secrets
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True,
        )  # fmt: skip
        self._run = wandb.init(
            dir=str(run.folder.parent), id=run.id, resume="allow", name=run.name, group=run.group or None,
            project=os.environ.get("WANDB_PROJECT", "truestep"), mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(run.config), allow_val_change=True, settings=quiet,
        )  # fmt: skip

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


class Trackio:
    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.folder))  # read when trackio is imported
        import trackio

        self._name = f"{run.name}-{run.id}"  # by which trackio finds a run again
        self._project = os.environ.get("TRACKIO_PROJECT", "truestep")
        self._run = trackio.init(
            project=self._project, name=self._name, group=run.group or None, config=dict(run.config),
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def stored(self) -> set[tuple[str, int]] | None:
        from trackio.sqlite_storage import SQLiteStorage

        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            return None
        rows = SQLiteStorage.get_logs(self._project, self._name)
        return {(key, row["step"]) for row in rows for key in row}

    def finish(self, status: str) -> None:
        import trackio

        trackio.finish()  # with run.finish(), it prints again when the process ends


class Mlflow:
    def __init__(self, run: TrackedRun) -> None:
        # By default, a request to a server that is down takes 14 minutes, and mlflow sends usage data.
        patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
        for key, value in {**patience, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        local = f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        remote = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=remote or local)
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "truestep")
        found = self._client.get_experiment_by_name(title)
        place = None if remote else (run.folder.resolve() / "artifacts").as_uri()
        where = found.experiment_id if found else self._client.create_experiment(title, place)
        same = self._client.search_runs([where], f"tags.truestep_id = '{run.id}'")
        tags = {"truestep_id": run.id, "group": run.group}
        own = same[0] if same else self._client.create_run(where, tags=tags, run_name=run.name)
        self._id = own.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        if not run.has_config:
            # A parameter cannot be changed, so a setting with another value (--change) becomes a tag.
            texts = {_mlflow_key(key): str(value)[:5000] for key, value in run.config.items()}
            there = own.data.params
            new = [Param(key, text) for key, text in texts.items() if key not in there]
            for first in range(0, len(new), 100):  # the most in a request
                self._client.log_batch(self._id, params=new[first : first + 100])
            for key, text in texts.items():
                if there.get(key, text) != text:
                    self._client.set_tag(self._id, f"changed.{key}", text)

    def log(self, step: int, values: Values) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(_mlflow_key(key), float(value), now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=rows)

    def finish(self, status: str) -> None:
        names = {"done": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._id, status=names.get(status, "FAILED"))


def _mlflow_key(key: str) -> str:
    """Return the key with only the characters that MLflow permits."""
    return re.sub(r"[^\w.\- :/]", "_", key)[:250]


class Swanlab:
    is_late = True

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        nothing = ("hardware", "runtime", "requirements", "git", "monitor")  # runtime has the command line
        quiet = swanlab.Settings(
            interactive=False, terminal={"proxy_type": "none"}, probe=dict.fromkeys(nothing, False)
        )
        self._run = swanlab.init(
            mode=os.environ.get("SWANLAB_MODE", "offline"), log_dir=str(run.folder), id=run.id, resume="allow",
            project=os.environ.get("SWANLAB_PROJ_NAME", "truestep"), name=run.name, group=run.group or None,
            config=dict(run.config), settings=quiet, reinit=True,
        )  # fmt: skip

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish({"done": "success", "interrupted": "aborted"}.get(status, "crashed"))


# By the name in the recipe: the package, and its adapter.
TRACKERS: dict[str, tuple[str, type[Any]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
    "mlflow": ("mlflow", Mlflow),
    "swanlab": ("swanlab", Swanlab),
}
