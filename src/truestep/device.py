"""Chooses a rank's device and the collective backend. Only this module may name an accelerator."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _HAS_ONEDNN else None


def compute_device() -> torch.device:
    """Return this rank's accelerator, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


_VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use: those in CUDA_VISIBLE_DEVICES, otherwise their
    numbers. No GPU is initialized."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def use_only_gpus(names: Sequence[str]) -> None:
    """Hide all other GPUs from this process, which must not have used one yet, and from its children."""
    os.environ[_VISIBLE] = ",".join(names)


def only_gpus(names: str) -> dict[str, str]:
    """Return the variables of a child process that may use only these GPUs ("2,3"), or all if it is ""."""
    return {_VISIBLE: names} if names else {}


def collective_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def backend_of(device: torch.device) -> str:
    """Return the collective backend for tensors of a device."""
    return "gloo" if device.type == "cpu" else "nccl"


def is_collective_error(error: Exception) -> bool:
    """Return whether an error comes from a collective, so that its cause may be another rank's end."""
    named = any(word in str(error) for word in ("gloo", "NCCL"))
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and named)


def set_threads(wanted: int | Literal["auto"]) -> int:
    """Set the number of intra-op threads and return it. Results are bit-exact only for a fixed number.

    "auto" means OMP_NUM_THREADS if it is set, otherwise the usable cores divided among the ranks of this
    machine. With several ranks OMP_NUM_THREADS is ignored, because torchrun sets it to 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] if ranks == 1 else ""
    automatic = int(given) if given.isdigit() and int(given) else max(1, usable_cores() // ranks)
    number = automatic if wanted == "auto" else wanted
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
    return number


def usable_cores() -> int:
    """Return how many cores this process may use according to its affinity mask and its CPU quota (rounded
    up)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, max(1, math.ceil(min(cpu_quota(), cores))))


def cpu_quota(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many CPUs this process's cgroup and its parents allow, or infinity if there is no limit.

    In cgroup v2, ``cpu.max`` contains "QUOTA PERIOD" or "max PERIOD". In v1 there are two files, and -1 means
    unlimited."""
    quota = math.inf
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "cpu" if controllers else root
            folder = top / path.strip("/")
            for place in (folder, *folder.parents):
                quota = min(quota, _quota_in(place))
                if place == top:
                    break
    return quota


def _quota_in(folder: Path) -> float:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if float(quota) > 0:
            return float(quota) / float(period)
    return math.inf


def make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs time, and no kernel used here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def world() -> tuple[int, int]:
    """Return (rank, world size) as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def matmul_rate(dtype: torch.dtype, size: int = 512, seconds: float = 0.1) -> float:
    """Measure the matrix-product rate of this process's device. Units: FLOP/s."""
    a = torch.ones(size, size, dtype=dtype, device=compute_device())
    float((a @ a).sum())  # the first call compiles or dispatches
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        float((a @ a)[0, 0])
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - began)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``torch.nn.functional.linear``. In float32 on a CPU without autograd, use oneDNN, not MKL.

    On an AMD EPYC, oneDNN was 1.3 to 1.6 times as fast for the output layer (49,152 columns of 576).
    Shapes: input [N, D], weight [V, D], bias [V] or None → [N, V]."""
    on_cpu = input.device.type == "cpu" and input.dtype == torch.float32
    if _ONEDNN is None or not on_cpu or torch.is_grad_enabled():
        return torch.nn.functional.linear(input, weight, bias)
    return _ONEDNN(input, weight, bias, "none", [], "")


def keep_free_memory() -> None:
    """Make glibc keep freed pages for the next tensor. Mapping new pages for every large tensor would cost up
    to a tenth of a training step's processor time."""
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_free_memory() -> None:
    """Return freed pages to the system. Otherwise, glibc keeps the pages between longer-lived tensors."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all work that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device, or of this machine, is free."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(device: torch.device) -> dict[str, str]:
    """Return what an accelerator is, and the versions of the libraries that its kernels come from."""
    if device.type == "cpu":
        return {"device": "cpu"}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name, "memory": f"{found.total_memory / 2**30:.1f} GiB",
        "capability": f"{found.major}.{found.minor}", "runtime": str(torch.version.cuda or torch.version.hip),
        "collectives": ".".join(map(str, torch.cuda.nccl.version())),
    }  # fmt: skip


def stall(device: torch.device, cycles: int) -> None:
    """Make an accelerator idle for some clock cycles, without making this process wait."""
    if device.type != "cpu":
        torch.cuda._sleep(cycles)


@contextlib.contextmanager
def waits_counted(device: torch.device) -> Iterator[list[str]]:
    """List what makes this process wait for the device: on an accelerator, torch's own warnings of it; on a processor,
    which is never waited for, the operators that would."""
    found: list[str] = []
    if device.type == "cpu":
        with _Waits(found):
            yield found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{one.filename}:{one.lineno}" for one in said if "synchroniz" in str(one.message)]


class _Waits(TorchDispatchMode):
    """Names the operators whose result, or the size of it, the processor has to know."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if name == "index" else []
        if masks or name.startswith(self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def peak_memory_bytes() -> int:
    """Return the largest resident set (CPU) or allocation (accelerator) of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
