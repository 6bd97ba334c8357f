"""N + N = 2N, bit for bit, for methods that remember: buffers, stored samples, controllers; a kill loses
nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import recipe_of, start
from safetensors.torch import load_file
from tiny_runs import differing, fingerprint, go, interrupted_at, prepared
from torch import Tensor

from truestep import rundir
from truestep.checkpoint.store import load_latest
from truestep.records import Origin, TrainSequence
from truestep.signals import Interrupted
from truestep.train import loop
from truestep.train.checkpoints import TrainState
from truestep.train.loop import StageSpec
from truestep.train.memory import Memory
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.step import NonFiniteError

torch.set_num_threads(1)
REMEMBERING = ("relift", "exgrpo", "sasr", "super_rl")
STEPS = 5


class Killed(BaseException):
    """Nobody catches it, nobody saves: the process is gone."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory.mktemp("start"))


def last_state(folder: Path) -> Mapping[str, Any]:
    found = load_latest(folder / "stages/01-rl/checkpoints", warn=lambda text: None)
    assert found is not None
    return found.state


@pytest.mark.parametrize("name", REMEMBERING)
def test_resumed_is_never_stopped(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(recipe_of(tmp_path, model, name, steps=STEPS))
    whole, stopped, killed = tmp_path / "whole", tmp_path / "stopped", tmp_path / "killed"
    with monkeypatch.context() as patch:
        alarm = interrupted_at(patch, 10**9)
        go(made, whole)
    state = last_state(whole)["memory"]
    rows = rundir.read_jsonl(whole / "stages/01-rl/metrics.jsonl")
    remembered = (
        any(row.get("rl/buffer/waiting", 0) for row in rows)
        or state["replay"]
        or any(state["scalars"].values())
    )
    assert remembered, "there is nothing to remember"

    # Stopped by a signal in the middle of a rollout, and again between two updates of a step.
    looks = [i for i, place in enumerate(alarm.looks) if place in ("decode", "micro-batch")]
    for times, look in enumerate((looks[len(looks) // 3], 25, 10**9)):
        with monkeypatch.context() as patch:
            interrupted_at(patch, look)
            try:
                go(made, stopped, resume=times > 0)
                break
            except Interrupted:
                continue
    assert differing(fingerprint(stopped), fingerprint(whole)) == []
    assert last_state(stopped)["memory"] == state

    # Killed after step 3 was trained and before anything of it was saved; the newest checkpoint is that of
    # step 2.
    original = loop.finish

    def finish(spec: StageSpec, state: TrainState) -> TrainState:
        if state.step == 3:
            raise Killed
        return original(spec, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", finish)
        with pytest.raises(Killed):
            go(made, killed)
    go(made, killed, resume=True)
    assert differing(fingerprint(killed), fingerprint(whole)) == []
    assert last_state(killed)["memory"] == state


def test_an_entropy_that_is_not_finite_names_its_step_and_leaves_its_batch(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pass that chooses among stored samples, before anything of step 7 is trained."""
    forward, entropy, spoilt = Policy.forward, Scorer.entropy, False

    def spoiling(self: Policy, *given: Any) -> tuple[Tensor, Tensor]:
        logprobs, found = forward(self, *given)
        return logprobs, found * float("nan") if spoilt else found

    def scoring(self: Scorer, sequences: Sequence[TrainSequence], step: int) -> Any:
        nonlocal spoilt
        spoilt = step == 7
        try:
            return entropy(self, sequences, step)
        finally:
            spoilt = False

    monkeypatch.setattr(Policy, "forward", spoiling)
    monkeypatch.setattr(Scorer, "entropy", scoring)
    with pytest.raises(NonFiniteError) as caught:
        go(prepared(recipe_of(tmp_path, model, "exgrpo", steps=9)), tmp_path / "run")
    stage = tmp_path / "run/stages/01-rl"
    saved = stage / "nonfinite-rank-0.safetensors"
    message = "step 8, micro-batch 0: proximal entropy is not finite; the batch is saved in"
    assert str(caught.value) == f"{message} {saved}"
    assert set(load_file(saved)["0.origin"].tolist()) == {int(Origin.STORED)}
    assert [row["step"] for row in rundir.read_jsonl(stage / "metrics.jsonl")] == list(range(1, 8))


def test_memory_is_what_it_was_after_a_checkpoint(model: str, tmp_path: Path) -> None:
    go(prepared(recipe_of(tmp_path, model, "exgrpo", steps=3)), tmp_path / "run")
    found = load_latest(tmp_path / "run/stages/01-rl/checkpoints", warn=lambda text: None)
    assert found is not None
    memory = Memory.load(found.state["memory"], found.tensors["memory"])
    assert any(s.rollouts for s in memory.replay.values())
    assert memory.state() == found.state["memory"]
    assert all(torch.equal(memory.tensors()[key], value) for key, value in found.tensors["memory"].items())
    again = Memory.load(memory.state(), memory.tensors())
    assert again == memory


def test_forgetting_the_memory_is_seen(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relation above can fail: a resume with an empty memory goes another way."""
    made = prepared(recipe_of(tmp_path, model, "relift", steps=STEPS))
    with monkeypatch.context() as patch:
        looks = interrupted_at(patch, 10**9).looks
        go(made, tmp_path / "whole")
    third = [i for i, place in enumerate(looks) if place == "step"][3]
    with monkeypatch.context() as patch:
        interrupted_at(patch, third)
        with pytest.raises(Interrupted):
            go(made, tmp_path / "run")
    monkeypatch.setattr(Memory, "load", lambda state, tensors: Memory(waiting=("q0", "q1")))
    go(made, tmp_path / "run", resume=True)
    assert differing(fingerprint(tmp_path / "run"), fingerprint(tmp_path / "whole")) != []
