"""Compare the memory that a dry run predicts with steps of fake tensors and with real steps on this processor.

    python benchmarks/memory_measure.py [--out results/memory.json]

Fake tensors have shapes, but no data: models of 7 billion parameters are measured in a minute. Real steps are of a
model of 64 million parameters, in a fresh process each; the peak is that of its resident memory. With glibc's
heaps, freed tensors stay in the process, so the steps are run with MALLOC_MMAP_THRESHOLD_=65536.
Held by: tests/study/test_memory.py (the small cases)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from truestep.device import set_threads
from truestep.doctor.checks import Bench
from truestep.doctor.models import CONTEXT, QWEN_7B, batches_of, plan_of, random_policy
from truestep.doctor.predicted import Case, rows, step_memory
from truestep.model.lora import install
from truestep.pipeline.memory import Sizes, Training, training_bytes
from truestep.pipeline.paper_plan import shape_of
from truestep.rundir import write_atomic
from truestep.settings import OptimizerSettings
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
RANK = LoraSettings(rank=16)
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    "head_dim": 64, "max_position_embeddings": CONTEXT,
}  # fmt: skip
QWEN = {**QWEN_7B, "max_position_embeddings": CONTEXT}
SMALL = {
    "model_type": "qwen2", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 16384, "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip
WARM = {**SMALL, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
ROW = tuple[str, Mapping[str, Any], dict[str, Any]]
FAKE: tuple[ROW, ...] = (
    ("7B", QWEN, {"lengths": (4095,) * 4, "offload": True}),
    ("7B", QWEN, {"lengths": (4607,) * 2, "lora": RANK}),
    ("7B, 4 layers", {**QWEN, "num_hidden_layers": 4}, {"lengths": (4095,) * 4, "checkpointing": "selective"}),
    ("1B, tied", LLAMA_1B, {"lengths": (2048,) * 2}),
    ("1B, tied", LLAMA_1B, {"lengths": (2048,) * 2, "checkpointing": False, "lora": RANK}),
    ("1B, tied", LLAMA_1B, {"lengths": (2048,) * 2, "dtype": torch.float32, "checkpointing": False}),
)  # fmt: skip
REAL: tuple[dict[str, Any], ...] = (
    {"tokens": 256},
    {"tokens": 256, "checkpointing": True, "offload": True},
    {"tokens": 256, "checkpointing": True, "lora": True},
)


def adapters(sizes: Sizes, rank: int) -> Sizes:
    """Return the sizes with an adapter on every layer's matrices."""
    d, i, q, k = sizes.hidden, sizes.inner, sizes.queries, sizes.keys
    added = rank * sizes.layers * ((d + q) + 2 * (d + k) + (q + d) + 3 * (d + i))
    total = sizes.parameters + added
    return replace(sizes, parameters=total, trained=added, trains_head=False, is_adapted=True)


def compared(name: str, config: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Compare a prediction with a step of fake tensors."""
    case = Case(config=config, **options)
    sizes = Sizes.of(config, shape_of(config).num_parameters)
    sizes = sizes if case.lora is None else adapters(sizes, case.lora.rank)
    how = Training(
        dtype=str(case.dtype).removeprefix("torch."), tokens=sum(case.lengths), checkpointing=case.checkpointing,
        offload=case.offload,
    )  # fmt: skip
    device, _ = training_bytes(sizes, how)
    return _row(name, how, case.lora is not None, sum(device.values()), step_memory(case)["peak"])


def _row(name: str, how: Training, lora: bool, predicted: float, measured: float) -> dict[str, Any]:
    return {
        "model": name, "dtype": how.dtype, "tokens": how.tokens, "checkpointing": how.checkpointing, "lora": lora,
        "offload": how.offload, "predicted_gib": round(predicted / 2**30, 3),
        "measured_gib": round(measured / 2**30, 3), "ratio": round(predicted / measured, 3),
    }  # fmt: skip


def real(options: dict[str, Any]) -> dict[str, Any]:
    """Compare a prediction with two real steps in this process."""
    set_threads(1)
    lora, tokens = bool(options.get("lora")), int(options["tokens"])
    how = Training(
        dtype="float32", tokens=tokens, checkpointing=options.get("checkpointing", False),
        offload=options.get("offload", False),
    )  # fmt: skip
    _steps(WARM, how, lora)  # loads what is loaded once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _kib("VmRSS")
    sizes = _steps(SMALL, how, lora)
    peak = 1024.0 * (_kib("VmHWM") - before)
    device, host = training_bytes(sizes, how)
    host.pop("gradients", None)  # host and device are one memory here, so the gradients are not copied
    return _row("64M", how, lora, sum((*device.values(), *host.values())), peak)


def _steps(config: Mapping[str, Any], how: Training, lora: bool) -> Sizes:
    bench = Bench(device=torch.device("cpu"), config=config, folder=Path(), is_small=False)
    policy = random_policy(bench, dtype=torch.float32)
    if lora:
        install(policy.model, RANK, 0)
    policy.saves_memory = bool(how.checkpointing)
    if how.checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = MasterOptimizer(policy, OptimizerSettings(lr=1e-3), offload=how.offload)
    batches = batches_of(policy, rows((how.tokens,) * 2), how.tokens)
    for _ in range(2):
        train_step(policy, optimizer, batches, plan_of())
    sizes = Sizes.of(config, shape_of(config).num_parameters)
    return adapters(sizes, RANK.rank) if lora else sizes


def _kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def in_child(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--real", json.dumps(options)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=ROOT / "results/memory.json")
    parser.add_argument("--real", help="compare one real step, given as JSON, and print the result")
    asked = parser.parse_args()
    if asked.real:
        print(json.dumps(real(json.loads(asked.real))))
        return
    fake = []
    for case in FAKE:
        fake.append(compared(*case))
        print(fake[-1], flush=True)
    true = []
    for options in REAL:
        true.append(in_child(options))
        print(true[-1], flush=True)
    document = {
        "command": "python benchmarks/memory_measure.py",
        "torch": torch.__version__,
        "fake": fake,
        "real": true,
    }
    write_atomic(asked.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
