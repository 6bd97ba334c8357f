"""Replaces folders so that each exists whole or not at all, and lets only one process write at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from truestep.errors import OutOfSpace, UserError
from truestep.rundir import fsync_folder


def replace_folder(temporary: Path, final: Path) -> None:
    """Replace a folder durably with a finished one. A kill halfway leaves the old folder as NAME.aside."""
    aside = final.with_name(f"{final.name}.aside")
    if final.exists():
        if aside.exists():  # left by an earlier kill; the folder that replaced it is whole
            discard_folder(aside)
        os.rename(final, aside)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    if aside.exists():
        discard_folder(aside)


def discard_folder(path: Path) -> None:
    """Rename a folder and delete it, so that a half-deleted folder never has a valid name."""
    trash = path.with_name(f"{path.name}.tmp-discard")
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(path, trash)
    fsync_folder(path.parent)
    shutil.rmtree(trash)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise OutOfSpace unless twice that many bytes are free, because other programs also write there."""
    free = shutil.disk_usage(folder).free
    if free < 2 * num_bytes:
        needed = f"{2 * num_bytes / 2**30:.2f} GiB (twice the size) are needed"
        raise OutOfSpace(
            f"{folder}: {free / 2**30:.2f} GiB are free, but {needed}; free disk space and resume"
        )


@contextlib.contextmanager
def exclusive(folder: Path, patience: float) -> Iterator[bool]:
    """Hold the folder's lock, which the kernel releases when the process ends. Yields False if there are no
    locks (on some clusters). Raises UserError if another process holds the lock for ``patience`` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor, folder, time.monotonic() + patience)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                remedy = "stop it, or pass a separate folder for this run"
                raise UserError(f"{folder}: another process is saving checkpoints here; {remedy}") from None
        except OSError:
            return False
        time.sleep(0.05)
