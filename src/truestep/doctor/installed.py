"""What ``truestep doctor`` says about this machine, one line for each thing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "math-verify",
    "vllm",
    "flash-attn",
    "deepspeed",
    "trl",
    "peft",
)
BFLOAT16 = ("amx_bf16", "avx512_bf16")  # as Linux names the units of a processor
GIB = 2.0**30


def lines() -> Iterator[tuple[str, str]]:
    """Yield pairs of a name and what was found."""
    yield (
        "python",
        f"{platform.python_version()} ({platform.system()} {platform.release()}, {platform.machine()})",
    )
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    yield "processor", processor()
    yield "memory", f"{_free_memory() / GIB:.1f} GiB free"
    yield "disk", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free in {Path.cwd()}"
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield (
            "shared memory",
            f"{shutil.disk_usage(shared).free / GIB:.1f} GiB free in {shared} (weights for vLLM)",
        )
    yield "device", device()


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, how many cores may be used, and whether bfloat16 is fast on it."""
    fields: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    units = [unit for unit in BFLOAT16 if unit in fields.get("flags", "").split()]
    told = ", ".join(units) if units else 'no bfloat16 units: use compute.dtype = "float32"'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{fields.get('model name', platform.processor() or 'unknown')}, {cores} cores, {told}"


def _free_memory() -> float:
    import torch

    from truestep.device import free_bytes

    return float(free_bytes(torch.device("cpu")))


def device() -> str:
    """Return what a run would compute on."""
    from truestep.device import compute_device, describe, free_bytes, visible_gpus

    found = compute_device()
    if found.type == "cpu":
        return "the processor (torch sees no GPU)"
    told = ", ".join(f"{key} {value}" for key, value in describe(found).items())
    return f"{told}; {free_bytes(found) / GIB:.1f} GiB free; {len(visible_gpus())} in all"
