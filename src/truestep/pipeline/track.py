"""Sends a run's metrics, scores and config to the trackers that the recipe names, each value once.

RUN/trackers/sent.jsonl has what each tracker was given. A resumed run sends what a tracker lacks, from
metrics.jsonl, and not again what it has. A tracker that fails is turned off with a warning; the run goes on, and its
next ``--resume`` sends the rest.

Held by: tests/contract/test_trackers_of_runs.py"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.pipeline.code import with_absolute_paths
from truestep.pipeline.history import Change, flat
from truestep.pipeline.trackers import TRACKERS, TrackedRun, Tracker, Values
from truestep.redaction import redact
from truestep.rundir import append_jsonl, jsonl_lines, read_jsonl
from truestep.settings import Settings, settings_hash
from truestep.signals import Interrupted
from truestep.user_code import Raised, attempt, find_source, load

Open = Callable[[TrackedRun], Tracker]


def require_trackers(names: Sequence[str], base_dir: Path) -> None:
    """Raise UserError for a tracker whose package or file is missing, before anything is trained."""
    for name in names:
        if ":" in name:
            find_source(name, base_dir, what="trackers")
            continue
        package, _ = TRACKERS[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder that the tracker has made is not the package
            raise UserError(f'trackers = ["{name}"] needs the {package} package; run pip install {package}')


@dataclass(kw_only=True)
class _Target:
    """A tracker, and what it was given, as sent.jsonl has it."""

    name: str
    open: Open
    tracker: Tracker | None = None
    is_off: bool = False
    config: str = ""  # hash
    step: int = 0  # the last one of the run whose metrics were sent
    scores: dict[str, Any] = field(default_factory=dict)  # by checkpoint
    ended: tuple[int, dict[str, Any]] = (0, {})  # step and scores at the end of the last session that ended
    has_ended: bool = True

    def learn(self, row: Mapping[str, Any]) -> None:
        self.has_ended = bool(row.get("ended"))
        self.step, self.config = row.get("step", self.step), row.get("config", self.config)
        if "checkpoint" in row:
            self.scores[row["checkpoint"]] = row
        if self.has_ended:
            self.ended = (self.step, dict(self.scores))


def open_trackers(
    settings: Settings, run: Path, base_dir: Path, changes: Sequence[Change], say: Callable[[str], None]
) -> Trackers:
    """Return the trackers of a run, as they were when it was stopped. A tracker is opened with its first value."""
    if not settings.trackers:
        return Trackers()
    folder = run / "trackers"
    rows = [row for _, row in jsonl_lines(folder / "sent.jsonl") if row]
    targets = [_Target(name=name, open=_opener(name, base_dir)) for name in settings.trackers]
    for target in targets:
        for row in rows:
            if row.get("to") == target.name:
                target.learn(row)
    identity = next((row["id"] for row in rows if "id" in row), "")
    # A new run begins with its changes.
    known = {number for row in rows for number in row.get("changes", ())} if identity else range(len(changes))
    if not identity:
        identity = settings_hash(str(run.resolve()), str(time.time_ns()))
        append_jsonl(folder / "sent.jsonl", [{"id": identity, "changes": list(known)}])
    config = {
        key: redact(value) if isinstance(value, str) else value
        for key, value in flat(with_absolute_paths(settings, base_dir)).items()
    }
    about = TrackedRun(
        folder=folder, id=identity, name=settings.name, group=settings.group, config=config, has_config=False
    )
    new = {number: change for number, change in enumerate(changes) if number not in known}
    trackers = Trackers(targets=targets, about=about, changes=new, say=say)
    trackers.reopen()
    return trackers


@dataclass(kw_only=True)
class Trackers:
    """The trackers of a run; ranks other than 0 have none. Steps are counted over the whole run. No error of a tracker
    leaves this class."""

    targets: Sequence[_Target] = ()
    about: TrackedRun | None = None  # with the folder of all trackers
    changes: dict[int, Change] = field(default_factory=dict)  # that the trackers do not have, by number
    say: Callable[[str], None] = print

    def reopen(self) -> None:
        """Open the trackers of a run that was killed: some of them have less than they were given."""
        for target in self.targets:
            if not target.has_ended:
                self._try(target, partial(self._open, target))

    def log(self, step: int, values: Values) -> None:
        """Send the metrics of a step."""
        for target in self.targets:
            if step > target.step:
                self._try(target, partial(self._send, target, step, values, {"step": step}))

    def score(self, step: int, checkpoint: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the rows of the summary with a checkpoint's scores, at the step of the run after which it was made."""
        values: dict[str, float] = {}
        for row in rows:
            key = f"evaluate/{row['data']}/{row['metric'].replace('@', '_at_')}"  # permitted by all
            values |= {key: row["score"], f"{key}/low": row["low"], f"{key}/high": row["high"]}
        for target in self.targets:
            if values and target.scores.get(checkpoint, {}).get("values") != values:
                mark = {"checkpoint": checkpoint, "at": step, "values": values}
                self._try(target, partial(self._send, target, step, values, mark))

    def catch_up(self, stage: str, before: int, folder: Path, below: int | None = None) -> None:
        """Send what the trackers lack of the stage's steps (all, or those below a step), which are in its files.
        ``before`` steps were done in earlier stages."""
        if not self.targets:
            return
        for number, change in [(n, c) for n, c in self.changes.items() if c.stage == stage]:
            for target in self.targets:
                if target.step > before + change.step:
                    self._try(target, partial(self._restart, target, before + change.step))
            self._write({"changes": [number]})
            del self.changes[number]
        times = {row["step"]: row["seconds"] for row in read_jsonl(folder / "timings.jsonl")}
        for row in read_jsonl(folder / "metrics.jsonl"):
            if below is None or row["step"] < below:
                values = {key: value for key, value in row.items() if key != "step"}
                self.log(before + row["step"], values | {f"{stage}/seconds": times[row["step"]]})

    def finish(self, status: str) -> None:
        """End the session of every tracker that was opened."""
        for target in self.targets:
            if target.tracker is not None:
                self._try(target, partial(self._finish, target, status))

    def _finish(self, target: _Target, status: str) -> None:
        self._open(target).finish(status)
        self._mark(target, {"ended": status})

    def _restart(self, target: _Target, step: int) -> None:
        """Forget that steps after this one were sent, because they are done again with changed settings."""
        if hasattr(tracker := self._open(target), "restart"):
            tracker.restart(step + 1)
        self._mark(target, {"step": step})

    def _send(self, target: _Target, step: int, values: Values, mark: Mapping[str, Any]) -> None:
        self._open(target).log(step, values)
        self._mark(target, mark)

    def _open(self, target: _Target) -> Tracker:
        if target.tracker is not None:
            return target.tracker
        assert self.about is not None
        folder = self.about.folder / target.name.rpartition(":")[2]
        folder.mkdir(parents=True, exist_ok=True)
        config = settings_hash(dict(self.about.config))
        run = replace(self.about, folder=folder, has_config=target.config == config)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            tracker = target.tracker = target.open(run)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # SwanLab ends its run with the first Ctrl-C
        if not target.has_ended:
            if getattr(tracker, "is_late", False):
                target.step, target.scores = target.ended[0], dict(target.ended[1])
                if hasattr(tracker, "restart"):
                    tracker.restart(target.step + 1)
            if (stored := tracker.stored() if hasattr(tracker, "stored") else None) is not None:
                target.step = max(
                    (step for key, step in stored if not key.startswith("evaluate/")), default=0
                )
                target.scores = {
                    name: mark
                    for name, mark in target.scores.items()
                    if all((key, mark["at"]) in stored for key in mark["values"])
                }
        self._mark(target, {"config": config, "step": target.step})
        return tracker

    def _mark(self, target: _Target, row: Mapping[str, Any]) -> None:
        self._write({"to": target.name, **row})
        target.learn(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self.about is not None
        append_jsonl(self.about.folder / "sent.jsonl", [row])

    def _try(self, target: _Target, work: Callable[[], Any]) -> None:
        """Do something with a tracker. An error turns it off. What it prints goes to trackers/output.txt."""
        assert self.about is not None
        folder, stopped = self.about.folder, list[BaseException]()

        def all_but_stopping() -> None:
            try:
                with (folder / "output.txt").open("a") as file, contextlib.redirect_stdout(file):
                    work()
            except (Interrupted, KeyboardInterrupt) as stop:
                stopped.append(stop)

        result = None if target.is_off else attempt(all_but_stopping)
        if stopped:
            raise stopped[0]
        if isinstance(result, Raised):
            target.is_off = True
            self.say(
                f"warning: tracker {target.name}: {result.reason.splitlines()[0][:200]}; the run goes on without it, and "
                "--resume sends what it lacks"
            )


def _opener(name: str, base_dir: Path) -> Open:
    """Return what opens a tracker. A user's file is imported only then."""
    if ":" in name:
        return lambda run: load(find_source(name, base_dir, what="trackers"), [str(base_dir)])(run)
    return TRACKERS[name][1]
