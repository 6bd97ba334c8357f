"""What a run wrote into each tracker, read back with the package's own reader: the config, every metric and score once,
and one run after Ctrl-C, kill -9 and two resumes. `make test-trackers` installs the packages and runs these tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_recipe

from truestep.pipeline.trackers import TRACKERS
from truestep.rundir import read_json, read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
INSTALLED = [name for name, (package, _) in TRACKERS.items() if importlib.util.find_spec(package)]
Found = dict[tuple[str, int], list[float]]  # the values of each key and step

# The last tracker of the recipe: it stops the run after the others were given the step.
STOP = """
import os, signal
from pathlib import Path

class Stop:
    def __init__(self, run):
        self.folder = run.folder

    def log(self, step, values):
        for at, signum in ((5, signal.SIGINT), (17, signal.SIGKILL)):
            mark = self.folder / str(at)
            if step == at and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signum)

    def finish(self, status):
        pass
"""
SECRET = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is stopped by Ctrl-C in its fifth step and killed in its seventeenth (the third of RL)."""
    if not INSTALLED:
        pytest.skip("needs the packages of trackers; run make test-trackers")
    folder = tmp_path_factory.mktemp("tracked")
    recipe = write_recipe(folder)
    names = json.dumps([*INSTALLED, "stop.py:Stop"])
    recipe.write_text(f'trackers = {names}\ngroup = "ours"\n{recipe.read_text()}')
    (folder / "stop.py").write_text(STOP)
    home = folder / "home"
    home.mkdir()
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO", "MLFLOW"))
    }
    environment = {**kept, "HOME": str(home), "HF_TOKEN": SECRET, "MPLCONFIGDIR": str(folder / "mpl")}
    command = [sys.executable, "-m", "truestep", "run", "run.toml", "--out", "out", "--resume", "--json"]
    # The last run has nothing left to do.
    for code in (130, -9, 0, 0):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "warning: tracker" not in done.stderr
    assert json.loads(done.stdout)["status"] == "done"  # trackers print nothing there
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert {path.name for path in folder.iterdir()} <= {
        "run.toml", "train.jsonl", "stop.py", "out", "home", "mpl", "__pycache__",
    }  # fmt: skip
    return folder / "out"


def expected(run: Path) -> Found:
    found: Found = {}
    before = 0
    for stage in ("01-sft", "02-rl"):
        rows = read_jsonl(run / "stages" / stage / "metrics.jsonl")
        times = {row["step"]: row["seconds"] for row in read_jsonl(run / "stages" / stage / "timings.jsonl")}
        for row in rows:
            values = {key: value for key, value in row.items() if key != "step"}
            values[f"{stage[3:]}/seconds"] = times[row["step"]]
            found |= {(key, before + row["step"]): [value] for key, value in values.items()}
        before += len(rows)
    for row in read_json(run / "summary.json")["scores"]:
        step = {"base": 0, "sft": 14, "rl": 19}[row["checkpoint"]]
        for end, value in (("", row["score"]), ("/low", row["low"]), ("/high", row["high"])):
            found[f"evaluate/test/avg_at_1{end}", step] = [value]
    assert len(found) > 19 * 10
    return found


def of_tensorboard(folder: Path) -> tuple[dict[str, str], Found, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = {
        (tag, event.step): [e.value for e in events.Scalars(tag) if e.step == event.step]
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    (config,) = events.Tensors("config/text_summary")
    table = config.tensor_proto.string_val[0].decode().splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in table]
    return {row[0]: row[1] for row in rows if len(row) == 2}, found, [str(folder)]


def of_wandb(folder: Path) -> tuple[dict[str, str], Found, list[str]]:
    """Without a network, each session is a file; `wandb sync` joins those with the same run id. What a killed session
    had logged, but not always written, is in the next one, so values can be in both."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Found = defaultdict(list)
    config: dict[str, str] = {}
    runs = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in journal(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.append(record.run.run_id)
                assert (record.run.run_group, record.run.display_name) == ("ours", "tiny")
                config |= {item.key: str(json.loads(item.value_json)) for item in record.run.config.update}
            if record.HasField("history"):
                row = {
                    (item.key or item.nested_key[0]): json.loads(item.value_json)
                    for item in record.history.item
                }
                step = row.pop("_step")
                for key, value in row.items():
                    if not key.startswith("_") and value not in found[key, step]:
                        found[key, step].append(value)
    return config, found, sorted(set(runs))


def journal(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB journal: blocks of 32 KiB with pieces that have a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def of_trackio(folder: Path) -> tuple[dict[str, str], Found, list[str]]:
    import sqlite3

    found: Found = defaultdict(list)
    with sqlite3.connect(folder / "truestep.db") as base:
        for step, text in base.execute("select step, metrics from metrics"):
            for key, value in json.loads(text).items():
                found[key, step].append(value)
        (config,) = [json.loads(row[0]) for row in base.execute("select config from configs")]
        runs = [row[0] for row in base.execute("select distinct run_name from metrics")]
    assert config["_Group"] == "ours"
    return {key: str(value) for key, value in config.items()}, found, runs


def of_mlflow(folder: Path) -> tuple[dict[str, str], Found, list[str]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    found: Found = defaultdict(list)
    for key in runs[0].data.metrics:
        for metric in client.get_metric_history(runs[0].info.run_id, key):
            found[key, metric.step].append(metric.value)
    assert (runs[0].info.status, runs[0].info.run_name) == ("FINISHED", "tiny")
    return dict(runs[0].data.params), found, [one.info.run_id for one in runs]


def of_swanlab(folder: Path) -> tuple[dict[str, str], Found, list[str]]:
    """As wandb."""
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found: Found = defaultdict(list)
    runs: list[str] = []
    config: dict[str, str] = {}
    for path in sorted(folder.glob("run-*/*.swanlab")):
        config = {
            key: str(entry["value"])
            for key, entry in yaml.safe_load((path.parent / "files/config.yaml").read_text()).items()
        }
        if path.stat().st_size < 8:  # killed before anything was flushed
            continue
        reader = DataStoreReader()
        reader.open(path)
        for data in reader:
            record = Record.FromString(data)
            if record.HasField("start"):
                runs.append(record.start.id)
            if record.HasField("scalar"):
                value = record.scalar.value.number
                if value not in found[record.scalar.key, record.scalar.step]:
                    found[record.scalar.key, record.scalar.step].append(value)
    return config, found, sorted(set(runs))


READERS: dict[str, Callable[[Path], tuple[dict[str, str], Found, list[str]]]] = {
    "tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow, "swanlab": of_swanlab,
}  # fmt: skip


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_has_every_value_once_in_one_run(name: str, run: Path) -> None:
    if name not in INSTALLED:
        pytest.skip(f"needs {TRACKERS[name][0]}; run make test-trackers")
    config, found, runs = READERS[name](run / "trackers" / name)
    assert len(runs) == 1
    wanted = expected(run)
    assert found.keys() == wanted.keys()
    for key in [k for k in found if k[0].endswith("/seconds") and k[1] in (15, 16, 17)]:
        assert 1 <= len(found.pop(key)) <= 2  # the time of a step that was done twice
        del wanted[key]
    wrong = {
        key: (found[key], values)
        for key, values in wanted.items()
        if found[key] != pytest.approx(values, nan_ok=True)
    }
    assert wrong == {}
    for key, value in {
        "seed": 0,
        "stages.sft.optimizer.lr": 0.02,
        "stages.rl.steps": 5,
        "group": "ours",
    }.items():
        assert config[key] == str(value), key


def test_no_tracker_has_a_secret(run: Path) -> None:
    held: list[Any] = [
        p for p in (run / "trackers").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()
    ]
    assert held == []
