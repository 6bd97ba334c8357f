"""Forks the ranks of many small jobs, so that torch and transformers are imported once.

    python rank_zygote.py     one JSON request a line on stdin, one reply a line on stdout

{"words": […], "logs": [FILE, …], "env": {…}} starts one process per log and replies with their ids;
{"poll": [ID, …]} replies with their exit codes, or null. Words are those of ``truestep``, or "worker", a case and a
folder."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import rank_worker
import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

import truestep.pipeline.run
import truestep.report.html  # noqa: F401
from truestep.cli import main

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(request: dict[str, Any]) -> list[int]:
    pids = []
    for rank, log in enumerate(request["logs"]):
        pid = os.fork()
        if pid == 0:
            become(rank, log, request)
        pids.append(pid)
    return pids


def become(rank: int, log: str, request: dict[str, Any]) -> None:
    """Be one rank until its end, as a fresh interpreter would be. It ends with this process (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    os.environ |= {**request["env"], "RANK": str(rank), "LOCAL_RANK": str(rank)}
    code: Any = 1
    try:
        word, *words = request["words"]
        if word == "worker":
            code = rank_worker.run(words[0], Path(words[1]))
        else:
            sys.argv = ["truestep", word, *words]
            main.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        reply = [poll(pid) for pid in asked["poll"]] if "poll" in asked else start(asked)
        print(json.dumps(reply), flush=True)
