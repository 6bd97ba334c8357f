"""What trackers get from a run: every value once, also over stops and resumes, and nothing that they raise ends it.
The packages themselves: test_trackers_real.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Silent, go, interrupted_at, prepared, write_recipe

from truestep.errors import UserError
from truestep.pipeline.history import changed, continued
from truestep.pipeline.prepare import Prepared, prepare
from truestep.pipeline.run import open_run_folder
from truestep.pipeline.run import run as run_pipeline
from truestep.pipeline.track import open_trackers, require_trackers
from truestep.rundir import read_json, read_jsonl
from truestep.settings import load_settings
from truestep.signals import Interrupted
from truestep.train.parallel import Ranks

# A tracker that writes down what it is given, and fails if the file "fail" names what it is doing.
MINE = """
import json

class Mine:
    def __init__(self, run):
        self.run = run
        self.write(opened=run.id, name=run.name, group=run.group, config=run.config, has_config=run.has_config)

    def write(self, **row):
        place = self.run.folder
        fail = place.parents[2] / "fail"
        if fail.exists() and fail.read_text() in row:
            raise RuntimeError("no connection\\nfor now")
        with (place / "seen.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        print("a line that is not the run's")

    def log(self, step, values):
        self.write(step=step, values=values)

    def restart(self, step):
        self.write(restart=step)

    def finish(self, status):
        self.write(finished=status)
"""
SHORT = ("stages.sft.steps=4", "stages.sft.save_every=2", "stages.rl.steps=2", "stages.rl.save_every=1")


def made(recipe: Path, *overrides: str) -> Prepared:
    return prepared(recipe, "trackers=['mine.py:Mine']", *SHORT, *overrides)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return write_recipe(tmp_path)


def seen(out: Path) -> list[dict[str, Any]]:
    return read_jsonl(out / "trackers/Mine/seen.jsonl")


Sent = list[tuple[int, dict[str, float]]]


def sent(out: Path) -> Sent:
    """What the tracker has, without the seconds of steps."""
    rows = [(row["step"], row["values"]) for row in seen(out) if "step" in row]
    return [(n, {k: v for k, v in values.items() if not k.endswith("/seconds")}) for n, values in rows]


def expected(out: Path) -> Sent:
    scores = {row["checkpoint"]: row for row in read_json(out / "summary.json")["scores"]}
    found: Sent = []

    def score(step: int, name: str) -> None:
        key, row = "evaluate/test/avg_at_1", scores[name]
        found.append((step, {key: row["score"], f"{key}/low": row["low"], f"{key}/high": row["high"]}))

    score(0, "base")
    for folder in sorted((out / "stages").iterdir()):
        before = found[-1][0]
        found += [(before + row.pop("step"), row) for row in read_jsonl(folder / "metrics.jsonl")]
        score(found[-1][0], folder.name[3:])
    return found


def test_a_run_sends_its_config_metrics_and_scores(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    go(made(recipe, "group=ours"), out)
    first, last = seen(out)[0], seen(out)[-1]
    assert (first["name"], first["group"], last) == ("tiny", "ours", {"finished": "done"})
    assert first["config"]["stages.sft.optimizer.lr"] == 0.02
    assert first["config"]["data.train.source"] == str(tmp_path / "train.jsonl")
    assert sent(out) == expected(out)
    assert {"sft/loss", "sft/seconds"} <= seen(out)[2]["values"].keys()
    assert capsys.readouterr().out == ""  # stdout belongs to the run
    assert "not the run's" in (out / "trackers/output.txt").read_text()
    go(made(recipe, "group=ours"), out, resume=True)  # nothing is left to send
    assert len(seen(out)) == len(sent(out)) + 2


@pytest.mark.parametrize(("at", "was_killed"), [(3, False), (44, True)])
def test_a_stopped_run_goes_on_in_the_same_run_of_the_tracker(
    at: int, was_killed: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run has sent a step that is not in its checkpoint; the step is done again, but not sent again."""
    out, ready = tmp_path / "out", made(recipe)
    with monkeypatch.context() as patch:
        interrupted_at(patch, at)
        with pytest.raises(Interrupted):
            go(ready, out)
    if was_killed:
        step = sent(out)[-1][0] + 1
        assert step > 2
        open_trackers(ready.settings, out, tmp_path, (), print).log(step, {"early": 1.0})
    go(made(recipe), out, resume=True)
    wanted = expected(out)
    if was_killed:
        wanted = [
            (n, {"early": 1.0}) if n == step and "evaluate/test/avg_at_1" not in v else (n, v)
            for n, v in wanted
        ]
    assert sent(out) == wanted
    opened = [row for row in seen(out) if "opened" in row]
    assert len({row["opened"] for row in opened}) == 1
    assert [row["has_config"] for row in opened] == [False, True, True][: len(opened)]
    assert [row["finished"] for row in seen(out) if "finished" in row] == ["interrupted", "done"]


def test_a_tracker_that_fails_is_one_warning_and_is_sent_the_rest_later(recipe: Path, tmp_path: Path) -> None:
    out, fail = tmp_path / "out", tmp_path / "fail"
    fail.write_text("step")
    warnings = [line for line in go(made(recipe), out).said if "tracker" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: tracker mine.py:Mine: RuntimeError: no connection")
    assert "\n" not in warnings[0]
    assert read_json(out / "summary.json")["status"] == "done"
    fail.unlink()
    go(made(recipe), out, resume=True)
    assert sent(out) == expected(out)


@pytest.mark.parametrize("what", ["opened", "finished"])
def test_a_tracker_that_cannot_be_opened_or_closed_is_one_warning(
    what: str, recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "fail").write_text(what)
    said: list[str] = []
    trackers = open_trackers(made(recipe).settings, tmp_path / "out", tmp_path, (), said.append)
    for step in (1, 2):
        trackers.log(step, {"a": 1.0})
    trackers.finish("done")
    assert len(said) == 1


@pytest.mark.parametrize(
    ("late", "stored", "again"), [(True, None, [1, 2, 3]), (False, "{('a', 1)}", [2, 3]), (False, "None", [])]
)
def test_what_a_kill_took_from_a_tracker_is_sent_again(
    late: bool, stored: str | None, again: list[int], recipe: Path, tmp_path: Path
) -> None:
    more = f"    is_late = {late}\n" + (f"    def stored(self): return {stored}\n" if stored else "")
    (tmp_path / "mine.py").write_text(MINE + more)
    ready = made(recipe)
    for _ in range(2):  # the first one is not finished
        trackers = open_trackers(ready.settings, tmp_path / "out", tmp_path, (), print)
        for step in (1, 2, 3):
            trackers.log(step, {"a": float(step)})
    assert [row["step"] for row in seen(tmp_path / "out") if "step" in row] == [1, 2, 3, *again]
    restarts = [row["restart"] for row in seen(tmp_path / "out") if "restart" in row]
    assert restarts == ([1] if late else [])


def test_steps_after_a_change_are_sent_again(recipe: Path, tmp_path: Path) -> None:
    """A run that is changed at a checkpoint after step 2 had sent four steps with the old rate."""
    out, key = tmp_path / "out", "stages.sft.optimizer.lr"

    def again(*changes: str) -> Prepared:
        settings = load_settings(recipe, ["trackers=['mine.py:Mine']", "stages.sft.steps=2"])
        settings = settings.model_copy(update={"stages": settings.stages[:1]})
        history = changed(settings, out, changes, ["truestep"])
        ready = prepare(continued(settings, history, changes), base_dir=recipe.parent, history=history)
        open_run_folder(ready, out, resume=True, rank=0)
        run_pipeline(ready, out, ranks=Ranks(), reporter=Silent())
        return ready

    trackers = open_trackers(again().settings, out, tmp_path, (), print)
    for step in (3, 4):
        trackers.log(step, {"sft/loss": -1.0})
    again("stages.sft.steps=4", f"{key}=0.001")
    again()
    rows = seen(out)
    assert [row["restart"] for row in rows if "restart" in row] == [3]
    assert [row["step"] for row in rows if "sft/loss" in row.get("values", {})] == [1, 2, 3, 4, 3, 4]
    opened = [row["config"] for row in rows if "opened" in row]
    assert (opened[0][key], opened[-1][key]) == (0.02, 0.001)


def test_no_secret_of_the_environment_is_in_a_config(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = made(recipe)
    monkeypatch.setenv("MY_API_KEY", "train.jsonl-is-no-key"[:11])
    open_trackers(ready.settings, tmp_path / "out", tmp_path, (), print).log(1, {"a": 1.0})
    assert seen(tmp_path / "out")[0]["config"]["data.train.source"] == f"{tmp_path}/[redacted]"


def test_a_missing_package_is_refused_before_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(
        UserError, match=r'trackers = \["wandb"\] needs the wandb package; run pip install wandb$'
    ):
        made(recipe, "trackers=['wandb']")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "swanlab").mkdir()  # a folder of runs is not the package
    if "swanlab" not in sys.modules and not importlib.util.find_spec("swanlab").origin:  # type: ignore[union-attr]
        with pytest.raises(UserError, match="pip install swanlab"):
            require_trackers(["swanlab"], tmp_path)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("wandbb", 'not one of .*; did you mean "wandb"'), ("other.py:Mine", "does not exist")],
)
def test_an_unknown_tracker_is_an_error(name: str, fault: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=fault):
        made(recipe, f"trackers=['{name}']")


# As in trackio 0.43: the folder is read from the environment when the package is imported.
TRACKIO = """
import os
from pathlib import Path

FOLDER = Path(os.environ.get("TRACKIO_DIR", "cache"))


class Run:
    def log(self, metrics, step):
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{step}.txt").write_text(str(metrics))


def init(**options):
    return Run()
"""


def test_trackio_writes_into_the_run_directory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "restored after the test")
    monkeypatch.delenv("TRACKIO_DIR")
    try:
        ready = made(recipe, "trackers=['trackio']")
        open_trackers(ready.settings, tmp_path / "run", tmp_path, (), print).log(7, {"rl/reward": 0.5})
    finally:
        sys.modules.pop("trackio", None)  # other tests use the real one
    assert (tmp_path / "run/trackers/trackio/7.txt").read_text() == json.dumps({"rl/reward": 0.5}).replace(
        '"', "'"
    )
