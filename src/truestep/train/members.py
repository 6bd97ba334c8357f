"""Which processes the ranks are, so that a message can name one and a stopped one can be ended."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Member:
    """The process of a rank. ``machine`` is the same for processes that can signal each other, and ``born``
    tells the process from a later one with the same id; both are empty without /proc."""

    rank: int
    host: str
    pid: int
    machine: str = ""
    born: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def this_process(rank: int) -> Member:
    machine = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    pid = os.getpid()
    return Member(rank=rank, host=platform.node(), pid=pid, machine=machine, born=_born(pid))


def end_stopped(member: Member, here: Member) -> None:
    """Kill a rank's process that no longer answers, if it is on this machine and still the same process."""
    if here.machine and member.machine == here.machine and member.born and _born(member.pid) == member.born:
        with contextlib.suppress(OSError):
            os.kill(member.pid, signal.SIGKILL)


def _born(pid: int) -> str:
    """Return when a process started, in clock ticks since the machine started."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    return ""
