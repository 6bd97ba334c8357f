"""One rank of a cell: ``python -m truestep.study.rank PARENT LOCK run RECIPE ...`` under torchrun.

A rank ends together with the process that started it, PARENT. It holds a shared lock on the file LOCK until it
has ended, so that the process that tries the cell again can wait for it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, lock = int(sys.argv[1]), sys.argv[2]
    held = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)  # held to the end of this process
    fcntl.flock(held, fcntl.LOCK_SH)
    with contextlib.suppress(OSError, AttributeError):  # a system other than Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before the call
        raise SystemExit(128 + signal.SIGKILL)
    sys.argv[:] = ["truestep", *sys.argv[3:]]
    runpy.run_module("truestep", run_name="__main__")


if __name__ == "__main__":
    main()
