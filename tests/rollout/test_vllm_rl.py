"""RL with a real vLLM server (the build for processors): fresh weights are proven, wrong ways are found, and a
killed server loses nothing. Slow: a server takes half a minute to start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_cases import (
    OPTIONS,
    SMALL,
    WRONG_BITS,
    WRONG_WIRES,
    KeepsTheCache,
    LeavesOut,
    SendsNothing,
    Served,
    served,
    vllm_python,
)

from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import SampleRequest, SamplingParameters, StaleWeightsError
from truestep.rollout.engine_vllm import VllmEngine
from truestep.rollout.vllm_broadcast import Broadcast
from truestep.rollout.vllm_server import ENVIRONMENT
from truestep.rollout.vllm_weights import FileDelivery
from truestep.seeding import Purpose
from truestep.train.engine_test import FIRST, Gap, GapTest, SelfTest
from truestep.train.optim import MasterOptimizer, OptimizerSettings
from truestep.train.weight_sync import publish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DTYPES = (torch.float32, torch.bfloat16)
RATES = (1e-6, 5e-5, 1e-3)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("weights"), request.param) as found:
        yield found


def step(world: Served, rate: float) -> None:
    """One AdamW step with a random gradient, which moves every weight."""
    optimizer = MasterOptimizer(world.policy, OptimizerSettings(lr=rate))
    draw = torch.Generator().manual_seed(int(time.time_ns() % 2**31))
    grads = {n: torch.randn(p.shape, generator=draw) for n, p in world.policy.named_parameters()}
    optimizer.step(grads, rate)


def asked(count: int, tokens: int = 24) -> list[SampleRequest]:
    draw = torch.Generator().manual_seed(7)
    prompts = [tuple(torch.randint(4, 40, (40,), generator=draw).tolist()) for _ in range(4)]
    return [
        SampleRequest(problem_id=f"p{i % 4}", sample_index=i, prompt_ids=prompts[i % 4], seed=0,
                      purpose=Purpose.SAMPLE, step=0)
        for i in range(count)
    ]  # fmt: skip


def sampling(tokens: int = 24, temperature: float = 1.0) -> SamplingParameters:
    return SamplingParameters(temperature=temperature, max_new_tokens=tokens, stop_token_ids=())


def gap_of(world: Served, rollouts: list[Any], temperature: float = 1.0) -> Gap:
    prompts = {r.sample_index: r.prompt_ids for r in asked(64)}
    made = [
        TrainSequence(
            token_ids=prompts[r.sample_index] + r.completion_ids, num_prefix_tokens=0, group=i,
            origin=(Origin.CONTEXT,) * 40 + (Origin.POLICY,) * len(r.completion_ids),
            behavior_logprobs=r.behavior_logprobs, policy_version=r.policy_version,
        )
        for i, r in enumerate(rollouts)
    ]  # fmt: skip
    scorer, found = world.scorer(temperature), Gap()
    for batch in scorer.with_proximal(scorer.pack(made), 0):
        assert batch.proximal_logprobs is not None
        assert batch.behavior_logprobs is not None
        found += Gap.of(batch.proximal_logprobs, batch.behavior_logprobs)
    return found


def dtype_of(world: Served) -> torch.dtype:
    return next(world.policy.parameters()).dtype


def test_a_right_engine_passes_at_every_update(world: Served) -> None:
    """The control of all other tests: the self-test, and updates at every rate, with the cache full."""
    engine = world.engine()
    publish(world.policy, engine, 0)
    test = GapTest(dtype_of(world), right=SelfTest(world.policy, engine, world.scorer(), 0).run(print))
    version = 0
    for rate in RATES:
        for _ in range(4):
            version += 1
            step(world, rate)
            receipt = publish(world.policy, engine, version)
            assert set(receipt.fingerprints) == {n for n, _ in world.policy.model.named_parameters()}
            rollouts = list(engine.generate(asked(16), sampling()))
            assert [r.error for r in rollouts] == [""] * 16
            assert {v for r in rollouts for v in r.policy_version} == {version}
            gap = gap_of(world, rollouts)
            test.found += gap
            test.judge(version, world.scorer().ranks)
            print(f"{dtype_of(world)} rate {rate:g} version {version}: gap {gap.size:.2e}, tilt {gap.tilt}")
            if dtype_of(world) == torch.float32:
                assert gap.size < 1e-4, "float32's noise"


def test_weights_go_from_memory_to_memory(world: Served) -> None:
    """By vLLM's own interface (start, update, finish): the same bits, the same proof, and nothing is written unless
    a server may be started again."""
    engine = world.engine(broadcast=Broadcast)
    assert engine.publisher is not None
    assert engine.publisher.keeps, "its servers may be started again"
    engine.publisher.keeps = False
    written = {path: path.stat().st_mtime_ns for path in world.folder.iterdir()}
    publish(world.policy, engine, 0)
    SelfTest(world.policy, engine, world.scorer(), 0).run(print)
    for version, rate in enumerate(RATES, start=1):
        step(world, rate)
        receipt = publish(world.policy, engine, version)
        assert set(receipt.fingerprints) == {n for n, _ in world.policy.model.named_parameters()}
        rollouts = list(engine.generate(asked(16), sampling()))
        assert {v for r in rollouts for v in r.policy_version} == {version}
        gap = gap_of(world, rollouts)
        assert gap.fault(FIRST[dtype_of(world)], "") == ""
        if dtype_of(world) == torch.float32:
            assert gap.size < 1e-4, "float32's noise"
    assert written == {path: path.stat().st_mtime_ns for path in world.folder.iterdir()}


@pytest.mark.parametrize("wrong", WRONG_WIRES)
def test_wrong_bits_from_memory_are_found_at_the_first_publish(world: Served, wrong: type[Broadcast]) -> None:
    engine = world.engine(broadcast=wrong)
    assert engine.publisher is not None
    engine.publisher.keeps = False  # a server that is not sent anything cannot load it from files
    publish(world.policy, engine, 0)
    step(world, 1e-6 if dtype_of(world) == torch.float32 else 1e-3)
    with pytest.raises(StaleWeightsError, match="version 1 was published, but"):
        publish(world.policy, engine, 1)


def test_a_server_that_dies_in_a_transfer_loads_the_files(world: Served) -> None:
    """kill −9 between two updates and in one: it is started again, and the next update goes from memory again."""
    engine = world.engine(broadcast=Broadcast)
    assert engine.publisher is not None
    assert engine.publisher.broadcast is not None
    publish(world.policy, engine, 0)
    for version, wait in ((1, 0.0), (2, 0.05)):
        process = world.servers.processes[0].process

        def kill(process: Any = process, wait: float = wait) -> None:
            time.sleep(wait)
            os.killpg(process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        step(world, 1e-2)
        killer.start()
        if not wait:
            killer.join()
        publish(world.policy, engine, version)
        killer.join()
        assert world.servers.processes[0].process is not process or wait
        rollouts = list(engine.generate(asked(8), sampling()))
        assert gap_of(world, rollouts).fault(FIRST[dtype_of(world)], "") == ""
        step(world, 1e-2)
        publish(world.policy, engine, version)
        assert list(engine.publisher.broadcast.groups) == world.servers.urls


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("wrong", WRONG_BITS)
def test_wrong_bits_are_found_at_the_first_publish(
    world: Served, wrong: type[FileDelivery], rate: float
) -> None:
    engine = world.engine(wrong)
    publish(world.policy, engine, 0)
    step(world, rate)
    with pytest.raises(StaleWeightsError, match="version 1 was published, but"):
        publish(world.policy, engine, 1)


def test_a_kept_cache_is_found_at_the_first_publish(world: Served) -> None:
    engine = world.engine(KeepsTheCache)
    publish(world.policy, engine, 0)
    with pytest.raises(StaleWeightsError, match=r"has kept .* tokens of a prompt in its cache"):
        publish(world.policy, engine, 1)


@pytest.mark.parametrize("wrong", [SendsNothing, LeavesOut])
def test_the_self_test_finds_what_a_server_cannot_tell(world: Served, wrong: type[FileDelivery]) -> None:
    """A server without the worker extension, so nothing is known of the bits."""
    engine = world.engine(wrong, tells_bits=False)
    receipt = publish(world.policy, engine, 0)
    assert receipt.unread
    with pytest.raises(StaleWeightsError, match="self-test failed: "):
        SelfTest(world.policy, engine, world.scorer(), 0).run(print)


def test_the_self_test_accepts_a_right_server_that_cannot_tell(world: Served) -> None:
    engine = world.engine(tells_bits=False)
    publish(world.policy, engine, 0)
    before = [p.detach().clone() for p in world.policy.parameters()]
    SelfTest(world.policy, engine, world.scorer(), 0).run(print)
    assert all(torch.equal(a, b) for a, b in zip(before, world.policy.parameters(), strict=True))


@pytest.mark.parametrize("times", [0.8, 1.25])
def test_another_temperature_is_found_before_the_first_update(world: Served, times: float) -> None:
    class Other(VllmEngine):
        def generate(self, requests: Any, sampling: SamplingParameters, *more: Any) -> Any:
            return super().generate(
                requests, replace(sampling, temperature=sampling.temperature * times), *more
            )

    engine = world.engine(kind=Other)
    publish(world.policy, engine, 0)
    with pytest.raises(StaleWeightsError, match=r"temperature|differ by"):
        SelfTest(world.policy, engine, world.scorer(), 0).run(print)


def test_samples_of_another_version_are_refused(world: Served) -> None:
    engine = world.engine()
    publish(world.policy, engine, 0)
    engine.policy_version = 1
    with pytest.raises(
        StaleWeightsError, match="version 1 of the weights was to sample 24 tokens, but vLLM says"
    ):
        list(engine.generate(asked(2), sampling()))


def test_a_killed_server_loses_no_sample(world: Served) -> None:
    """kill −9 in the middle of a rollout, after an update: it comes back with the updated weights."""
    engine = world.engine()
    publish(world.policy, engine, 0)
    step(world, 1e-2)
    publish(world.policy, engine, 1)
    whole = {r.sample_index: r for r in engine.generate(asked(64), sampling(200))}
    process = world.servers.processes[0].process

    def kill() -> None:
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rollouts = {r.sample_index: r for r in engine.generate(asked(64), sampling(200))}
    killer.join()
    assert world.servers.processes[0].process is not process
    assert sorted(rollouts) == list(range(64))
    assert {r.error for r in rollouts.values()} == {""}
    assert {v for r in rollouts.values() for v in r.policy_version} == {1}
    gaps = [gap_of(world, [r]).size for r in rollouts.values()]
    limit = 1e-4 if dtype_of(world) == torch.float32 else 0.5
    assert max(gaps) < limit, "asked again of the right weights"
    same = sum(rollouts[i].completion_ids == whole[i].completion_ids for i in whole)
    print(f"{dtype_of(world)}: {same} of 64 samples are those of the undisturbed rollout")
    publish(world.policy, engine, 2)  # and it still takes weights


RECIPE = """
name = "tiny-vllm"
[model]
path = "tiny"
tiny = { hidden_size = 64, num_layers = 2, num_heads = 2, intermediate_size = 128 }
[compute]
threads = 1
[data.train]
source = "train.jsonl"
[[stages]]
kind = "sft"
data = "train"
steps = 30
sequences_per_step = 16
tokens_per_microbatch = 2048
optimizer = { lr = 5e-3 }
[[stages]]
kind = "rl"
data = "train"
steps = 24
prompts_per_step = 16
samples_per_prompt = 8
tokens_per_microbatch = 4096
optimizer = { lr = 2e-3 }
engine = "vllm"
sampling = { max_new_tokens = 3, max_running = 32 }
[vllm]
options = OPTIONS
"""


def write_run(folder: Path, *changed: tuple[str, str]) -> tuple[list[str], dict[str, str]]:
    """Write a recipe and its data; return the command and its environment. The solutions are right half of the time,
    so there is something to learn from the rewards."""
    text = RECIPE.replace("OPTIONS", json.dumps(list(OPTIONS)))
    for old, new in changed:
        assert old in text
        text = text.replace(old, new)
    rows = [
        {"id": f"q{i}", "problem": f"{i}+{i * 7 % 4}", "answer": "1", "checker": "exact", "solution": str(i % 2)}
        for i in range(32)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(text)
    command = [
        sys.executable,
        "-m",
        "truestep",
        "run",
        str(folder / "recipe.toml"),
        "--out",
        str(folder / "run"),
    ]
    return command, {**os.environ, **SMALL, ENVIRONMENT: vllm_python()}


@pytest.mark.parametrize("transfer", ["file", "broadcast"])
def test_an_rl_run_learns_and_its_samples_are_the_trainers(tmp_path: Path, transfer: str) -> None:
    command, told = write_run(tmp_path, ("[vllm]", f'[vllm]\ntransfer = "{transfer}"\nrestarts = 0'))
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the engine's self-test passed" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/stages/02-rl/metrics.jsonl").open()]
    rewards = [row["rl/reward"] for row in rows]
    gaps = [row["rl/sampling/logprob_difference_max"] for row in rows]
    print("rewards", rewards, "largest gaps", gaps)
    assert len(rows) == 24
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1
    assert max(gaps) < 1e-3, "float32's noise at every step"
    assert not list(Path("/dev/shm").glob("truestep-weights-*")), "nothing is left behind"


def servers_of(folder: Path) -> list[int]:
    """Return the processes that have this folder's run in their environment, except for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"OF_THIS_RUN={folder}".encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_with_their_trainer(tmp_path: Path, how: int) -> None:
    command, told = write_run(tmp_path, ("steps = 24", "steps = 3000"))
    log = (tmp_path / "log").open("w")
    run = subprocess.Popen(command, env={**told, "OF_THIS_RUN": str(tmp_path)}, stderr=log, stdout=log)
    metrics, until = tmp_path / "run/stages/02-rl/metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert run.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.2)
    assert len(servers_of(tmp_path)) > 2, "the trainer, a server and its worker"
    run.send_signal(how)
    run.wait(60)
    until = time.monotonic() + 60
    while (left := servers_of(tmp_path)) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == [], [Path(f"/proc/{pid}/cmdline").read_text()[:200] for pid in left]
