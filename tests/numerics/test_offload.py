"""The offloaded optimizer takes the steps of the resident one, bit for bit; faults of offloading are found by the audit."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from step_cases import FAMILIES, LLAMAS, batches_of, make_policy, plan_for, run_step, sequences_of
from torch import Tensor

from truestep.audit.environments.in_process import subject_module
from truestep.audit.measure.cases import build
from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.measure.observations import load
from truestep.audit.measure.verdict import judge
from truestep.records import TokenBatch
from truestep.settings import OptimizerSettings
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.policy import Policy

ADAMW = OptimizerSettings(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
SGD = OptimizerSettings(kind="sgd", lr=0.1, weight_decay=0.0)
LORA = LoraSettings(rank=2, targets=("all-linear", "lm_head"))
NUM_STEPS = 50


def train(policy: Policy, optimizer: MasterOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        plan = plan_for(FAMILIES["sft"].method, step=step, learning_rate=1e-2)
        run_step(policy, optimizer, batches(step % 4), plan)


@functools.cache
def batches(seed: int) -> list[TokenBatch]:
    return batches_of(
        sequences_of(FAMILIES["sft"], (5, 2, 9, 4), seed=seed), num_batches=2, dtype=torch.float32
    )


def state(policy: Policy, optimizer: MasterOptimizer) -> dict[str, Tensor]:
    return {**dict(policy.named_parameters()), **optimizer.state_tensors()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


SLOW = pytest.mark.slow


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=SLOW)], ids=["whole", "lora"])
@pytest.mark.parametrize("settings", [ADAMW, pytest.param(SGD, marks=SLOW)], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=SLOW)], ids=str
)
def test_fifty_steps_are_equal_bit_for_bit(
    dtype: torch.dtype, settings: OptimizerSettings, lora: LoraSettings | None
) -> None:
    found = []
    for offload in (False, True):
        policy = make_policy(LLAMAS["tied"], dtype, lora=lora)
        start = {name: p.detach().clone() for name, p in policy.named_parameters()}
        optimizer = MasterOptimizer(policy, settings, offload=offload)
        train(policy, optimizer, 0, NUM_STEPS if dtype is torch.float32 and settings is ADAMW else 5)
        found.append(state(policy, optimizer))
        moved = {name for name, p in policy.named_parameters() if not torch.equal(p, start[name])}
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert moved == trained or (dtype is torch.bfloat16 and moved <= trained)
        if offload:
            pairs = [(optimizer.masters[name], p) for name, p in optimizer.parameters.items()]
            assert not any(master.data_ptr() == p.data_ptr() for master, p in pairs)
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", [(False, True), (True, False)], ids=["to host", "from host"])
def test_a_saved_state_continues_in_either_memory(dtype: torch.dtype, pair: tuple[bool, bool]) -> None:
    whole = make_policy(LLAMAS["tied"], dtype)
    optimizer = MasterOptimizer(whole, ADAMW, offload=pair[0])
    train(whole, optimizer, 0, 3)
    saved = {name: t.detach().clone() for name, t in state(whole, optimizer).items()}
    train(whole, optimizer, 3, 6)
    second = make_policy(LLAMAS["tied"], dtype, seed=9)
    resumed = MasterOptimizer(second, ADAMW, offload=pair[1])
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            parameter.copy_(saved[name])
    resumed.load_state_tensors(saved)
    train(second, resumed, 3, 6)
    assert_equal(state(second, resumed), state(whole, optimizer))


# ---------------------------------------------------------------------------------------- faults of offloading


class Offloaded(MasterOptimizer):
    """An optimizer that copies the gradient of every micro-batch to the host, where they are summed."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.parts: list[dict[str, Tensor]] = []  # one for each backward pass
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _take(self, name: str, parameter: Tensor) -> None:
        if not self.parts or name in self.parts[-1]:
            self.parts.append({})
        assert parameter.grad is not None
        self.parts[-1][name], parameter.grad = parameter.grad.clone(), None

    def kept(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return parts

    def gradients(self) -> dict[str, Tensor]:
        nothing, kept = super().gradients(), self.kept(self.parts)
        return {name: sum((part[name] for part in kept), zero) for name, zero in nothing.items()}

    def zero_grad(self) -> None:
        super().zero_grad()
        self.parts = []


class FirstAndLast(Offloaded):
    """DeepSpeed 0.15.2 to 0.18.9: the micro-batches between the first and the last are overwritten."""

    def kept(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return parts[:1] + parts[1:][-1:]


class LastOnly(Offloaded):
    """Every copy to the host overwrites the one before."""

    def kept(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return parts[-1:]


class ReadTooEarly(Offloaded):
    """The host reads its sum before the copy of the last micro-batch has arrived."""

    def kept(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return parts[:-1] if len(parts) > 1 else parts


class FirstTwice(Offloaded):
    """The buffer of the first micro-batch is copied and also added."""

    def kept(self, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return parts[:1] + parts


class NeverCleared(Offloaded):
    """The sum on the host is not cleared after a step."""

    def zero_grad(self) -> None:
        before = self.parts
        super().zero_grad()
        self.parts = before


class NotCopiedBack(Offloaded):
    """The host's parameters of the first step are used for ever: the copy back happens once."""

    done = False

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        held = {name: p.detach().clone() for name, p in self.parameters.items()}
        super().step(gradients, learning_rate)
        if self.done:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(held[name])
        self.done = True


class StaleMaster(Offloaded):
    """The copy on the host was made before the weights were loaded."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        draw = torch.Generator().manual_seed(0)
        for master in self.masters.values():
            master += 0.01 * torch.randn(master.shape, generator=draw)


MUTANTS = [FirstAndLast, LastOnly, ReadTooEarly, FirstTwice, NeverCleared, NotCopiedBack, StaleMaster]


def audited(kind: type[MasterOptimizer], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """The project's own audit of its step, with this optimizer, in this process."""
    subject, harness, runs = subject_module("truestep_step"), subject_module("harness"), {}
    monkeypatch.setattr(subject, "MasterOptimizer", kind)
    monkeypatch.setattr(harness, "join_ranks", lambda spec: None)
    for name in ("ragged", "unsplit", "masked"):
        case = build(name, world_size=1)
        place = folder / name
        place.mkdir()
        raw = {"options": {"arch": "llama", "offload": True}, "learning_rate": 0.5}
        subject.run(harness.Spec(place, case.to_json(), raw))
        runs[name] = load(place, case, learning_rate=0.5)
    return judge("truestep", {"offload": True}, runs)


@pytest.mark.parametrize("kind", [MasterOptimizer, pytest.param(Offloaded, marks=SLOW)])
def test_the_audit_finds_a_weight_of_one_for_every_micro_batch(
    kind: type[MasterOptimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = audited(kind, tmp_path, monkeypatch)
    assert finding.verdict is Verdict.RIGHT, finding
    assert finding.weights == [[pytest.approx(1.0, abs=1e-4)] * 4]


@pytest.mark.parametrize("kind", [*MUTANTS[:2], *[pytest.param(m, marks=SLOW) for m in MUTANTS[2:]]])
def test_the_audit_finds_faults_of_offloading(
    kind: type[Offloaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = audited(kind, tmp_path, monkeypatch)
    assert finding.verdict is Verdict.FAULT, finding
    if kind in (FirstAndLast, LastOnly, ReadTooEarly):
        assert finding.codes[0] == "kept"
