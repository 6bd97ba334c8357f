"""Checks of training: memory, shards, offloading, and whole runs that are stopped, resumed and split over ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truestep import rundir
from truestep.device import set_threads, stall
from truestep.doctor.allocations import measured_peak
from truestep.doctor.checks import Bench, Number, Skip
from truestep.doctor.exact import PLAIN, one_rank
from truestep.doctor.models import (
    CONTEXT,
    accumulate,
    batches_of,
    config_of,
    distance,
    documents,
    gradient,
    plan_of,
    random_policy,
)
from truestep.model.forward import decoder_layers
from truestep.model.lora import install
from truestep.pipeline import memory as predicted
from truestep.pipeline.method_check import LIMIT, STEPS, cut_back, difference, recipe, run_in
from truestep.progress import Note
from truestep.rollout.tensor_group import SENDER, TensorGroup
from truestep.rundir import read_jsonl
from truestep.settings import OptimizerSettings, Settings, parse_settings, table_of
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import local, shard
from truestep.train.step import train_step

ADAMW = OptimizerSettings(lr=1e-3, max_grad_norm=0.0)
OFF = 0.1  # relative, of a predicted peak
END_SECONDS = 60.0  # after which a rank must have noticed that another one was lost


class Silent:
    """Reports nothing."""

    def say(self, text: str) -> None: ...

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None: ...

    def advance(self, done: int, note: Note = "") -> None: ...


def memory(bench: Bench) -> Iterator[Number]:
    """The peak of real layers and the output layer must be the one that a dry run predicts."""
    tokens = 256 if bench.is_small else CONTEXT
    for lora in (None, LoraSettings(rank=16)):
        policy = random_policy(bench, num_hidden_layers=4, checkpointing=True)
        if lora:
            install(policy.model, lora, 0)
        parameters = list(policy.parameters())
        total = sum(p.numel() for p in parameters)
        sizes = replace(
            predicted.Sizes.of(config_of(bench, num_hidden_layers=4), total), is_adapted=lora is not None,
            trained=sum(p.numel() for p in parameters if p.requires_grad), trains_head=lora is None,
        )  # fmt: skip
        rows = documents(sizes.vocabulary, (tokens // 4 + 1,) * 4)
        batches = batches_of(policy, rows, tokens)
        with measured_peak(bench.device, policy) as peak:
            optimizer = MasterOptimizer(policy, ADAMW)
            for _ in range(2):
                train_step(policy, optimizer, batches, plan_of())
        dtype = str(bench.dtype).removeprefix("torch.")
        how = predicted.Training(dtype=dtype, tokens=batches[0].num_tokens, checkpointing=True)
        expected = sum(predicted.training_bytes(sizes, how)[0].values())
        what = "adapters" if lora else "all weights"
        yield Number(name=f"{what}: peak", value=peak.num_bytes / 2**30, unit="GiB")
        ratio = expected / peak.num_bytes
        yield Number(name=f"{what}: predicted ÷ measured", value=ratio, at_least=1 - OFF, at_most=1 + OFF)
        del policy, optimizer, parameters, batches


def sharding(bench: Bench) -> Iterator[Number]:
    """A sharded model must have the gradient of a whole one, on its device, and a stuck collective must end."""
    with one_rank(bench):
        whole, parts = (random_policy(bench, dtype=torch.float32, num_hidden_layers=2) for _ in range(2))
        rows = documents(whole.model.config.vocab_size, (16,) * 4 if bench.is_small else (512,) * 4)
        expected = gradient(whole, MasterOptimizer(whole, PLAIN), batches_of(whole, rows, 4096))
        shard(parts, decoder_layers(parts.model))
        found = gradient(parts, MasterOptimizer(parts, PLAIN), batches_of(parts, rows, 4096))
        away = sum(local(t).device.type != bench.device.type for t in (*parts.parameters(), *found.values()))
        yield Number(name="tensors on another device", value=away, at_most=0)
        wrong = distance({n: g.full_tensor() for n, g in found.items()}, expected)  # type: ignore[attr-defined]
        yield Number(name="relative error of the gradient", value=wrong, at_most=1e-6)
    limit = 1.0
    seconds = seconds_until_error(limit)
    yield Number(name="seconds until a stuck collective ends", value=seconds, at_most=10 * limit)


def seconds_until_error(limit: float) -> float:
    """Return how long a process waits for a tensor that another one never sends, or infinity if it does not end. Both are
    threads of this process, on the processor."""
    cpu = torch.device("cpu")
    sender = TensorGroup("127.0.0.1", 0, SENDER, 2, limit)
    waiting = TensorGroup("127.0.0.1", sender.port, 1, 2, limit)
    found: list[float] = []

    def wait() -> None:
        waiting.meet(cpu)
        began = time.monotonic()
        try:
            waiting.broadcast(torch.zeros(1))
        except RuntimeError:
            found.append(time.monotonic() - began)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    sender.meet(cpu)
    thread.join(20 * limit)
    return found[0] if found else float("inf")


def offload(bench: Bench) -> Iterator[Number]:
    """With the optimizer on the host, every micro-batch must have the weight 1, however the device is delayed."""
    policy = random_policy(bench, dtype=torch.float32, num_hidden_layers=2, vocab_size=512)
    rows = documents(512, (17, 33, 21, 29) if bench.is_small else (601, 1025, 701, 901))
    batches = batches_of(policy, rows, max(len(s.token_ids) for s in rows) - 1)
    columns = torch.stack([_flat(one) for one in _each(policy, batches)], 1)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    worst, results = 0.0, []
    for repeat in range(3 if bench.is_small else 50):
        used, after = _stepped(policy, batches, start, draw, offload=repeat > 0)
        weights = torch.linalg.lstsq(columns, used[:, None]).solution[:, 0]
        worst = max(worst, float((weights - 1).abs().max()))
        results.append(after)
    resident, first, *others = results
    yield Number(name="micro-batches", value=len(batches), at_least=4)
    yield Number(name="largest error of a recovered weight", value=worst, at_most=1e-3)
    differ = sum(not torch.equal(one, first) for one in others)
    yield Number(name="repeats with other bits", value=differ, at_most=0)
    begin = _flat(start)
    moved = float((first - resident).norm() / (resident - begin).norm())
    yield Number(name="relative difference from the resident optimizer", value=moved, at_most=1e-3)


def _each(policy: Any, batches: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the part of the gradient that each micro-batch adds, computed in a step of all of them."""
    optimizer, before = MasterOptimizer(policy, PLAIN), None
    for count in range(1, len(batches) + 1):
        weights = [1.0] * count + [0.0] * (len(batches) - count)
        now = _weighted(policy, optimizer, batches, weights)
        yield now if before is None else {name: now[name] - before[name] for name in now}
        before = now


def _weighted(policy: Any, optimizer: MasterOptimizer, batches: Any, weights: Any) -> dict[str, Tensor]:
    optimizer.zero_grad()
    accumulate(policy, batches, weights=weights)
    return {name: grad.detach().double().cpu() for name, grad in optimizer.gradients().items()}


def _stepped(
    policy: Any, batches: Any, start: dict[str, Tensor], draw: torch.Generator, *, offload: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient that AdamW used in a first step, and the parameters after it. Shapes: [P], [P]."""
    device = next(policy.parameters()).device
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(start[name])
    optimizer = MasterOptimizer(policy, ADAMW, offload=offload)

    def delayed() -> None:
        stall(device, int(torch.randint(0, 20_000_000, (), generator=draw)))

    train_step(policy, optimizer, batches, plan_of(), delayed)
    state = optimizer.state_tensors()
    beta = ADAMW.betas[0]
    used = {name: state[f"exp_avg/{name}"] / (1 - beta) for name in start}
    return _flat(used), _flat(dict(policy.named_parameters()))


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors.values()])


def checkpoint(bench: Bench) -> Iterator[Number]:
    """A run that continues from its second step must end with the bits of an uninterrupted one."""
    settings = _settings(optimizer={"lr": 0.01, "kind": "adamw"}, dtype="float32")
    set_threads(1)
    began = time.monotonic()
    run_in(settings, bench.folder, bench.folder / "whole", Silent())
    yield Number(name="seconds of a run", value=time.monotonic() - began)
    again = cut_back(bench.folder / "whole", bench.folder / "again", STEPS // 2)
    files = [f for f in (again / "stages/01-check/checkpoints").rglob("*") if f.is_file()]
    yield Number(name="bytes of the checkpoints", value=sum(f.stat().st_size for f in files), at_least=1)
    run_in(settings, bench.folder, again, Silent(), resume=True)
    error = difference(bench.folder / "whole", again)
    yield Number(name="relative difference after resuming", value=error, at_most=0)
    moved = float(read_jsonl(again / "stages/01-check/metrics.jsonl")[-1]["check/grad_norm"])
    yield Number(name="gradient norm of the last step", value=moved, at_least=1e-9)


def _settings(optimizer: dict[str, Any], dtype: str, **stage: Any) -> Settings:
    table: dict[str, Any] = recipe("sft", {}, samples=False)
    table["stages"][0] |= {"optimizer": optimizer, **stage}
    table["compute"] |= {"dtype": dtype}
    return parse_settings(table, where="doctor")


def ranks(bench: Bench) -> Iterator[Number]:
    """Two ranks must make the update of one, also if a run goes from two to one and back, and a lost rank must end it."""
    if bench.device.type != "cpu" and bench.num_gpus < 2:
        raise Skip(f"needs two GPUs; there is {bench.num_gpus}")
    settings = _settings({"lr": 0.05, "kind": "sgd", "weight_decay": 0.0}, "float64")
    path, folder = _written(settings, bench.folder), bench.folder
    _torchrun(path, folder / "two")
    _torchrun(path, folder / "one", num=1)
    error = difference(folder / "one", folder / "two")
    yield Number(name="relative difference of two ranks", value=error, at_most=LIMIT)
    _torchrun(path, cut_back(folder / "two", folder / "changed", 1), num=1, resume=True)
    _torchrun(path, cut_back(folder / "changed", folder / "back", STEPS - 1), resume=True)
    error = difference(folder / "one", folder / "back")
    yield Number(name="relative difference after 2, 1 and 2 ranks", value=error, at_most=LIMIT)
    seconds = _seconds_after_loss(settings, folder)
    yield Number(name="seconds until a run ends that lost a rank", value=seconds, at_most=END_SECONDS)


def _written(settings: Settings, folder: Path, name: str = "recipe.toml") -> Path:
    path = folder / name
    rundir.write_atomic(path, rundir.to_toml(table_of(settings)))
    return path


def _command(path: Path, out: Path, num: int) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num)] if num > 1 else []
    return [sys.executable, *launch, "-m", "truestep", "run", str(path), "--out", str(out)]


def _torchrun(path: Path, out: Path, num: int = 2, *, resume: bool = False) -> None:
    command = _command(path, out, num) + ["--resume"] * resume
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise RuntimeError(f"a run on {num} ranks ended with {done.returncode}: {' / '.join(last)}")


def _seconds_after_loss(settings: Settings, folder: Path) -> float:
    """Kill one of two ranks of a long run. Return how long the other one lives on."""
    (stage,) = settings.stages
    long = settings.model_copy(update={"stages": (stage.model_copy(update={"steps": 100_000}),)})
    out = folder / "lost"
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen(
        _command(_written(long, folder, "long.toml"), out, 2), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        metrics, end = out / "stages/01-check/metrics.jsonl", time.monotonic() + 200
        while not (metrics.exists() and len(read_jsonl(metrics)) > 2):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("a long run on two ranks made no steps")
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        began = time.monotonic()
        try:
            code = process.wait(2 * END_SECONDS)
        except subprocess.TimeoutExpired:
            return float("inf")
        if code == 0:
            raise RuntimeError("a run that lost a rank ended as if it were complete")
        return time.monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
