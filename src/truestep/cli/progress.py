"""Shows progress and the time left on stderr: a live bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import os
import sys
import time

from rich import progress as bars

from truestep.cli.output import PlainConsole, echo, plain
from truestep.progress import Measured, Note

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
        self.done, self.head, self.has_rows = 0, "", False

    def say(self, text: str) -> None:
        if not self.quiet:
            (self.live.console if self.live else self.console).print(
                plain(text), markup=False, soft_wrap=True
            )

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None:
        self.close()
        self.what, self.total, self.first, self.done = what, total, done, done
        self.began = self.spoke = time.monotonic()
        self.head, self.has_rows = head, bool(head)
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
        if not head and self.live is None:
            self.say(f"{what}: {done}/{total}")

    def place(self, first: str = "evaluation") -> str:
        """Return where the work is, to follow the word "stopping". Before it begins, ``first`` names its first part."""
        if self.quiet:
            return ""
        if not self.what:
            return f"before the first {first}"
        return f"in {self.what}, {min(self.done + 1, self.total)}/{self.total}"

    def advance(self, done: int, note: Note = "") -> None:
        self.done = done
        if self.quiet:
            return
        if self.live and self.task is not None:
            self.live.update(self.task, completed=done, note="" if self.has_rows else plain(note))
            if not self.has_rows:
                return
        now = time.monotonic()
        is_first = self.has_rows and done == self.first + 1
        is_shown = is_first or (self.has_rows and isinstance(note, Measured))
        if done == self.total or is_shown or now - self.spoke >= HEARTBEAT_SECONDS:
            self.spoke = now
            rate = (done - self.first) / max(1e-9, now - self.began)
            left = (self.total - done) / rate if rate > 0 else 0.0
            if self.has_rows:
                if self.head:  # only now, because more may have been said since the beginning
                    self.say(f"{'step':>{self._step_width()}} {self.head} {'left':>7}")
                    self.head = ""
                self.say(f"{f'{done}/{self.total}':>{self._step_width()}} {note} {in_words(left):>7}")
                return
            self.say(f"{self.what}: {done}/{self.total}  {now - self.began:.0f} s, {left:.0f} s left  {note}")

    def _step_width(self) -> int:
        return max(6, 2 * len(str(self.total)) + 1)

    def close(self) -> None:
        if self.live:
            self.live.stop()
        self.live = self.task = None


def size_in_words(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def in_words(seconds: float) -> str:
    """Return a time of at most seven characters."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
