"""Replaces itself by a command that ends when the process that started it ends, however that ends.

    python vllm_start.py PARENT COMMAND...

Linux sends the signal, also after kill −9 of the parent. Elsewhere only an ordered end of the parent ends it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl.h

if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() == int(sys.argv[1]):  # otherwise the parent had ended before
        os.execv(sys.argv[2], sys.argv[2:])
