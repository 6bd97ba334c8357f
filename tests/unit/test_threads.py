"""How many threads compute, and what they do while they wait."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from truestep.device import cpu_quota

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def child(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter without the caller's OpenMP settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def test_openmp_waits_passively_from_the_first_import() -> None:
    """As OpenMP itself says when torch loads it, and in the children that a process starts."""
    code = """
import truestep, sys
assert "torch" not in sys.modules
import torch, subprocess
torch.ones(4).sum()
print(subprocess.run(["sh", "-c", "echo $OMP_WAIT_POLICY $GOMP_SPINCOUNT"], capture_output=True, text=True).stdout.strip())
"""
    done = child(code, OMP_DISPLAY_ENV="TRUE")
    assert done.stdout.strip() == "PASSIVE 10000"
    if "OMP_WAIT_POLICY" in done.stderr:  # not every build of OpenMP displays its settings
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_sets_is_kept(name: str) -> None:
    value = "ACTIVE" if name == "OMP_WAIT_POLICY" else "100"
    done = child(f"import os, truestep; print([os.environ.get(k) for k in {WAITING!r}])", **{name: value})
    assert done.stdout.strip() == str([value if k == name else None for k in WAITING])


THREADS = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM])
from truestep.device import set_threads, usable_cores
import torch
chosen = set_threads("auto")
assert chosen == torch.get_num_threads()
print(usable_cores(), chosen, set_threads(3), torch.get_num_threads())
"""
ALL = THREADS.replace("NUM", "None")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity mask")
def test_threads_follow_the_affinity_mask() -> None:
    cores = len(os.sched_getaffinity(0))
    assert child(THREADS.replace("NUM", "1")).stdout.split() == ["1", "1", "3", "3"]
    assert int(child(ALL).stdout.split()[1]) <= cores


def test_ranks_share_the_cores_and_openmp_is_asked() -> None:
    asked = child(ALL, OMP_NUM_THREADS="3").stdout.split()
    assert asked[1] == "3"
    cores, shared, *_ = map(int, child(ALL, OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="2").stdout.split())
    assert shared == max(1, cores // 2), "torchrun's own OMP_NUM_THREADS=1 was taken for the user's"


@pytest.mark.parametrize(
    ("files", "member", "cpus"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", math.inf),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
        ({"a/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, "0::/a", 2.0),
        ({"cpu.max": "300000 100000"}, "0::/docker/not/visible/here", 3.0),
        ({"cpu/j/cpu.cfs_quota_us": "200000", "cpu/j/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/j", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpuacct,cpu:/", math.inf),
        ({"cpu.max": "nonsense"}, "0::/", math.inf),
        ({"cpu.max": "100000 0"}, "0::/", math.inf),
        ({"cpuset/cpu.max": "1 1"}, "3:cpuset:/", math.inf),
        ({}, "0::/", math.inf),
    ],
)
def test_the_quota_of_a_cgroup(tmp_path: Path, files: dict[str, str], member: str, cpus: float) -> None:
    root = tmp_path / "cgroup"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "self").write_text(f"9:name=systemd:/\n{member}\n")
    assert cpu_quota(tmp_path / "self", root) == cpus


def test_no_cgroups_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) == math.inf
