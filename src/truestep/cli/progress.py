"""Shows progress and the time left on stderr: a live bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import os
import sys
import time

from rich import progress as bars

from truestep.cli.output import PlainConsole, echo, plain

HEARTBEAT_SECONDS = 15.0


def announce(text: str) -> None:
    """Print a command's first line on stderr, before slow imports. Only rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        echo(text, err=True)


class ConsoleReporter:
    """A ``progress.Reporter`` that writes to stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = PlainConsole(stderr=True)
        self.quiet = quiet
        self.live: bars.Progress | None = None
        self.task: bars.TaskID | None = None
        self.what, self.total, self.first, self.began, self.spoke = "", 0, 0, 0.0, 0.0

    def say(self, text: str) -> None:
        if not self.quiet:
            (self.live.console if self.live else self.console).print(
                plain(text), markup=False, soft_wrap=True
            )

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.close()
        self.what, self.total, self.first = what, total, done
        self.began = self.spoke = time.monotonic()
        if self.quiet:
            return
        if sys.stderr.isatty():
            counts = (bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
            columns = (
                bars.TextColumn("{task.description}", markup=False),
                *counts,
                "left",
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[note]}", markup=False),
            )
            self.live = bars.Progress(*columns, console=self.console)
            self.live.start()
            self.task = self.live.add_task(plain(what), total=total, completed=done, note="")
        else:
            self.say(f"{what}: {done}/{total}")

    def advance(self, done: int, note: str = "") -> None:
        if self.quiet:
            return
        if self.live and self.task is not None:
            self.live.update(self.task, completed=done, note=plain(note))
            return
        now = time.monotonic()
        if done == self.total or now - self.spoke >= HEARTBEAT_SECONDS:
            self.spoke = now
            rate = (done - self.first) / max(1e-9, now - self.began)
            left = (self.total - done) / rate if rate > 0 else 0.0
            self.say(f"{self.what}: {done}/{self.total}  {now - self.began:.0f} s, {left:.0f} s left  {note}")

    def close(self) -> None:
        if self.live:
            self.live.stop()
        self.live = self.task = None
