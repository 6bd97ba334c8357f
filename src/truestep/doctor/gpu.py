"""The checks of ``truestep doctor gpu``, in the order in which they are made: what later ones build on comes first."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from truestep import __version__
from truestep.device import compute_device, describe, make_deterministic, set_threads, visible_gpus
from truestep.doctor import exact, sampling, speed, training
from truestep.doctor.checks import Bench, Check, Outcome, run
from truestep.doctor.models import QWEN_7B
from truestep.errors import UserError, did_you_mean

MINUTES = 10
A_GPU = "a GPU"
CHECKS = (
    Check(name="repeatable", what="two runs of the same passes give the same bits", seconds=20, measure=exact.repeatable),
    Check(name="exact", what="gradients are those of float64 on the processor", seconds=30, measure=exact.exact),
    Check(name="attention", what="attention runs in fused kernels", seconds=30, measure=speed.attention),
    Check(name="precision", what="bfloat16 gradients are near those of float64", seconds=40, measure=exact.precision),
    Check(name="memory", what="a step takes the predicted memory", seconds=40, measure=training.memory),
    Check(name="head", what="the output layer takes little memory and time", seconds=30, measure=speed.head),
    Check(name="speed", what="speed of a whole micro-batch", seconds=60, measure=speed.speed, needs=A_GPU),
    Check(name="waits", what="the processor seldom waits for the device", seconds=10, measure=speed.waits),
    Check(name="sharding", what="a sharded model has the gradient of a whole one", seconds=40, measure=training.sharding),
    Check(name="offload", what="no micro-batch is lost with an offloaded optimizer", seconds=40, measure=training.offload),
    Check(name="sampling", what="the engine samples from the trainer's weights", seconds=60, measure=sampling.sampling),
    Check(name="checkpoint", what="a resumed run has the same bits", seconds=40, measure=training.checkpoint),
    Check(name="vllm", what="wrong weights in vLLM are found", seconds=120, measure=sampling.vllm),
    Check(name="ranks", what="two ranks make the update of one", seconds=90, measure=training.ranks, is_long=True),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Check]:
    """Return the checks of these names, or all if there are none. Raises UserError for an unknown name."""
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"; the checks are {', '.join(known)}"
            raise UserError(f"--only {name}: there is no such check{hint}")
    return [check for check in CHECKS if not names or check.name in names]


def bench_of(folder: Path, config: Path | None = None, vllm: str = "") -> Bench:
    """Return the bench of this machine. Raises UserError if the config.json cannot be read."""
    device = compute_device()
    try:
        found = QWEN_7B if config is None else json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--config {config}: not a config.json: {error}") from None
    return Bench(
        device=device, config=found, folder=folder, is_small=device.type == "cpu", num_gpus=len(visible_gpus()),
        vllm=vllm,
    )  # fmt: skip


def examine(checks: Sequence[Check], bench: Bench) -> Iterator[Outcome]:
    """Make the checks in the mode in which runs compute."""
    before = torch.are_deterministic_algorithms_enabled()
    set_threads("auto")
    make_deterministic()
    try:
        yield from run(checks, bench, 60.0 * MINUTES)
    finally:
        torch.use_deterministic_algorithms(before)


def versions() -> dict[str, str]:
    """Return the versions of what computes, "" for what is not installed."""
    found = {"python": platform.python_version(), "truestep": __version__}
    for name in ("torch", "transformers", "safetensors", "vllm", "flash-attn", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def document(outcomes: Sequence[Outcome], bench: Bench) -> dict[str, Any]:
    """Return the results as JSON, with what they were measured on."""
    return {
        "versions": versions(), "device": describe(bench.device), "gpus": bench.num_gpus,
        "model": dict(bench.config), "checks": [outcome.to_json() for outcome in outcomes],
    }  # fmt: skip
