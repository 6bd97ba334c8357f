"""One step off: every token of step s ≥ 1 was sampled by version s − 1, and a stopped run is continued as if it had
not been stopped."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_cases import Elsewhere, made, opened, with_engine, write
from safetensors.torch import load_file
from tiny_runs import differing, fingerprint, go, interrupted_at, prepared

from truestep import rundir
from truestep.checkpoint.manifest import newest_state
from truestep.errors import UserError
from truestep.pipeline.prepare import Prepared
from truestep.rollout.engine import SamplingParameters, StaleWeightsError
from truestep.rollout.engine_torch import TorchEngine
from truestep.signals import Interrupted
from truestep.train import sequences as seq
from truestep.train.loop import run_stage
from truestep.train.parallel import Ranks
from truestep.train.source import RolloutSource, StepData, window
from truestep.train.waiting import Sampled, Whole, gathered

sys.path.insert(0, str(Path(__file__).parent.parent / "numerics"))
from two_processes import launch

torch.set_num_threads(1)
STAGE = "stages/01-rl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return made(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(tiny: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The uninterrupted run, and where it looked for a signal, in order."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        alarm = interrupted_at(monkeypatch, 10**9)
        go(tiny, folder)
    assert all(row["rl/grad_norm"] > 0 for row in rows(folder)), "the case is too easy"
    return folder, alarm.looks


def rows(folder: Path) -> list[dict[str, float]]:
    return rundir.read_jsonl(folder / STAGE / "metrics.jsonl")


# ------------------------------------------------------------------------------- the data are the definition's


def restated(
    tiny: Prepared, folder: Path, is_ahead: bool = True
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Train on samples that a frozen copy of the weights of the version of the definition makes. Return the final
    parameters and, by step, all groups."""
    with opened(tiny, folder) as spec:
        source, versions, steps = spec.source, list[Any](), list[Any]()
        assert isinstance(source, RolloutSource)
        for step in range(spec.num_steps):
            versions.append(copy.deepcopy(spec.policy.model))
            version = max(0, step - 1) if is_ahead else step
            engine = TorchEngine(versions[version], max_running=6)
            engine.policy_version = version
            prompts = window(source.prompts, step, source.prompts_per_step, tiny.settings.seed)
            groups = replace(source.sampler, engine=engine).groups(prompts, step)
            gated = [seq.gated(group, source.method, 1.0) for group in groups]
            size = len(gated) // 2
            parts = [seq.sequences_of(part, source.method, 8) for part in (gated[:size], gated[size:])]
            spec.updater.update(StepData(minibatches=parts), step)
            steps.append(groups)
        return {n: p.detach().clone() for n, p in spec.policy.model.named_parameters()}, steps


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_run_is_the_slow_definition(
    tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ahead: bool
) -> None:
    """Prompts, random numbers, tokens and log-probabilities of every step, and the weights in the end."""
    if not is_ahead:
        tiny = made(tmp_path / "sync", "stages.rl.rollout_ahead=0")
    used: list[Sampled] = []
    data = RolloutSource.data

    def seen(self: RolloutSource, sampled: Sampled, memory: Any) -> StepData:
        used.append(sampled)
        return data(self, sampled, memory)

    monkeypatch.setattr(RolloutSource, "data", seen)
    go(tiny, tmp_path / "run")
    parameters, steps = restated(tiny, tmp_path / "restated", is_ahead)
    assert [u.step for u in used] == [0, 1, 2, 3, 4]
    for step, (found, groups) in enumerate(zip(used, steps, strict=True)):
        assert [g.group for g in found.everything] == groups, f"step {step}"
        told = {v for g in found.everything for r in g.group.rollouts for v in r.policy_version}
        assert told == {max(0, step - 1) if is_ahead else step}
    exported = load_file(tmp_path / "run" / STAGE / "export/model.safetensors")
    assert all(torch.equal(exported[n], p) for n, p in parameters.items() if n in exported)
    if is_ahead:
        other, _ = restated(tiny, tmp_path / "other", is_ahead=False)
        assert not all(torch.equal(other[n], p) for n, p in parameters.items()), "the two ways must differ"


def test_metrics_tell_staleness_apart_from_the_gap_to_the_engine(
    tiny: Prepared, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    found = rows(whole[0])
    assert [row["rl/sampling/staleness"] for row in found] == [0, 1, 1, 1, 1]
    # float32: engine and trainer differ by rounding, and the policy changes by orders more in a step.
    assert all(row["rl/sampling/logprob_difference_max"] < 1e-5 for row in found)
    assert found[0]["rl/sampling/policy_change_max"] < 1e-5
    assert all(row["rl/sampling/policy_change_mean"] > 1e-2 for row in found[1:])
    assert all(row["rl/sampling/policy_change_kl"] > 1e-4 for row in found[1:])
    go(made(tmp_path / "sync", "stages.rl.rollout_ahead=0"), tmp_path / "run")
    for row in rows(tmp_path / "run"):
        assert not [key for key in row if "staleness" in key or "policy_change" in key]
        assert row["rl/sampling/logprob_difference_max"] < 1e-5


# --------------------------------------------------------------------------------------------- stopped, resumed


def nth(looks: list[str], place: str, n: int) -> int:
    return [i for i, look in enumerate(looks) if look == place][n]


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("step", 0), ("step", 1), ("step", 2), ("step", 4), ("decode", 3), ("decode", 14), ("decode", -2),
        ("proximal", 0), ("proximal", 3), ("proximal", -1), ("micro-batch", 0), ("micro-batch", 7), ("micro-batch", -2),
    ],
)  # fmt: skip
def test_stopped_anywhere_and_resumed_is_never_stopped(
    tiny: Prepared,
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    n: int,
) -> None:
    expected, looks = whole
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted_at(patch, nth(looks, place, n))
        with pytest.raises(Interrupted):
            go(tiny, folder)
    state = newest_state(folder / STAGE / "checkpoints")
    if state is not None and 0 < state["step"] < 5:
        assert state["waiting"]["step"] == state["step"]
    go(tiny, folder, resume=True)
    assert differing(fingerprint(folder), fingerprint(expected)) == []


def test_killed_after_any_checkpoint_and_resumed_is_never_stopped(
    tmp_path: Path, whole: tuple[Path, list[str]]
) -> None:
    """What kill −9 leaves: a checkpoint, and log lines of later steps."""
    every = prepared(write(tmp_path / "recipe"), "stages.rl.save_every=1", "stages.rl.keep_checkpoints=9")
    go(every, tmp_path / "whole")
    assert differing(fingerprint(tmp_path / "whole"), fingerprint(whole[0])) == []
    for kept in range(1, 5):
        folder = tmp_path / f"killed after {kept}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / STAGE / "done.json").unlink()
        for step in range(kept + 1, 6):
            shutil.rmtree(folder / STAGE / f"checkpoints/step_{step:08d}")
        go(every, folder, resume=True)
        assert differing(fingerprint(folder), fingerprint(tmp_path / "whole")) == []


def test_groups_that_are_refilled_wait_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DAPO replaces groups with equal rewards, so the waiting groups include some that are not trained on."""
    more = ("stages.rl.method=dapo", "stages.rl.save_every=1", "stages.rl.keep_checkpoints=9",
            "stages.rl.samples_per_prompt=2", "stages.rl.updates_per_rollout=1")  # fmt: skip
    dapo = made(tmp_path / "recipe", *more)
    go(dapo, tmp_path / "whole")
    states = [newest_state(tmp_path / "whole" / STAGE / "checkpoints")]
    assert states[0] is not None
    assert "waiting" not in states[0], "nothing waits in the end"
    folder = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / STAGE / "done.json").unlink()
    for step in (4, 5):
        shutil.rmtree(folder / STAGE / f"checkpoints/step_{step:08d}")
    state = newest_state(folder / STAGE / "checkpoints")
    assert state is not None
    cuts = {group["cut"] for group in state["waiting"]["groups"]}
    assert cuts == {-1, 0}, "the case is too easy: no group was replaced"
    go(dapo, folder, resume=True)
    assert differing(fingerprint(folder), fingerprint(tmp_path / "whole")) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_waiting_groups_are_divided_among_any_number_of_ranks(
    tiny: Prepared, tmp_path: Path, world_size: int
) -> None:
    """Saved by one rank, read by several: each has the groups that it would have sampled."""
    with opened(tiny, tmp_path) as spec:
        source = spec.source
        assert isinstance(source, RolloutSource)
        sampled = source.sampled(2, source_memory(spec))
        kept = gathered(sampled, Ranks())
        read = json.loads(json.dumps(kept.state()))
        again = Whole.load(read, {n: t.clone() for n, t in kept.tensors().items()})
        assert again.groups == json.loads(json.dumps(kept.groups))
        shares = []
        for rank in range(world_size):
            source.ranks = Ranks(rank=rank, world_size=world_size)
            shares.append(source.restored(again))
        if world_size == 1:
            assert shares[0] == replace(sampled, work=shares[0].work)
            assert shares[0].work == sampled.work
        for cut in range(2):
            expected = sampled.cuts[cut]
            for rank, share in enumerate(shares):
                assert share.cuts[cut] == expected[rank::world_size]
        assert sorted(g.place for s in shares for g in s.everything) == [(0, i) for i in range(4)]
        assert sum((s.work for s in shares[1:]), shares[0].work) == sampled.work


def source_memory(spec: Any) -> Any:
    from truestep.train.memory import first_memory

    return first_memory(spec.updater.method)


def close(found: Path, expected: Path) -> None:
    """The same run up to float32 rounding. Seen: 3e-5 of a value."""
    for one, two in zip(rows(expected), rows(found), strict=True):
        assert two["rl/reward"] == one["rl/reward"]
        assert two["rl/sampling/staleness"] == one["rl/sampling/staleness"]
        for key in ("rl/loss", "rl/grad_norm", "rl/entropy", "rl/sampling/policy_change_mean"):
            assert two[key] == pytest.approx(one[key], rel=5e-4, abs=1e-6), key


@pytest.mark.slow
def test_two_ranks_run_as_one_and_resume_as_two(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe")
    words = ["-m", "truestep", "run", str(recipe), "--set", "stages.rl.save_every=1", "--out"]
    launch([*words, str(tmp_path / "one")], seconds=200, world_size=1)
    launch([*words, str(tmp_path / "two")], seconds=300)
    close(tmp_path / "two", tmp_path / "one")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "two", again)
    (again / STAGE / "done.json").unlink()
    shutil.rmtree(again / STAGE / "checkpoints/step_00000005")
    launch([*words, str(again), "--resume"], seconds=300)
    assert rows(again) == rows(tmp_path / "two")
    exports = [load_file(run / STAGE / "export/model.safetensors") for run in (tmp_path / "two", again)]
    assert all(torch.equal(exports[0][n], exports[1][n]) for n in exports[0])
    for source, target, world_size in (("two", "as one", 1), ("one", "as two", 2)):  # waiting groups move
        shutil.copytree(tmp_path / source, tmp_path / target)
        (tmp_path / target / STAGE / "done.json").unlink()
        shutil.rmtree(tmp_path / target / STAGE / "checkpoints/step_00000005")
        launch([*words, str(tmp_path / target), "--resume"], seconds=300, world_size=world_size)
        close(tmp_path / target, tmp_path / source)


# ----------------------------------------------------------------------------------------- beside the training


def logged(spec: Any) -> list[dict[str, float]]:
    return rundir.read_jsonl(spec.folder / "metrics.jsonl")


def test_an_engine_beside_the_training_samples_the_same(
    tiny: Prepared, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """In a thread, while the trainer's weights move; the thread is slow at first, then the trainer is."""
    updating, overlaps = threading.Event(), list[bool]()

    def before(step: int) -> None:
        overlaps.append(updating.wait(20) if step else True)
        time.sleep(0.05 * (step % 2))

    with opened(tiny, tmp_path) as spec:
        assert isinstance(spec.engine, TorchEngine)
        engine = Elsewhere(spec.engine, before)
        spec = with_engine(spec, engine)

        class Telling:
            """Tells the thread that an update is running."""

            def __getattr__(self, name: str) -> Any:
                return getattr(updater, name)

            def update(self, *given: Any, **more: Any) -> Any:
                updating.set()
                found = updater.update(*given, **more)
                updating.clear()
                return found

        updater = spec.updater
        run_stage(replace(spec, updater=Telling()))  # type: ignore[arg-type]
        found = logged(spec)
    assert overlaps == [True] * 5, "each rollout after the first ran while the step before it trained"
    assert {name.rpartition("_")[0] for name in engine.threads} == {"rollout-ahead", ""}
    # Other tokens are compared, so their gap differs, and comparing is work; everything else is the same.
    skipped = ("logprob_difference", "sampling/kl", "work/", "flops")
    for row, expected in zip(found, rows(whole[0]), strict=True):
        for key, value in expected.items():
            if not any(part in key for part in skipped):
                assert row[key] == value, key
        assert row["rl/sampling/logprob_difference_max"] < 1e-5


@pytest.mark.parametrize("error", [UserError("no server"), StaleWeightsError("old")])
def test_an_error_of_the_thread_is_raised_before_new_weights_are_published(
    tiny: Prepared, tmp_path: Path, error: Exception
) -> None:
    def before(step: int) -> None:
        if step == 2:
            raise error

    with opened(tiny, tmp_path) as spec:
        assert isinstance(spec.engine, TorchEngine)
        engine = Elsewhere(spec.engine, before)
        with pytest.raises(type(error), match=str(error)):
            run_stage(with_engine(spec, engine))
        assert engine.policy_version == 1
        assert len(logged(spec)) == 1
        assert not [t for t in threading.enumerate() if t.name.startswith("rollout-ahead")]


def test_a_stop_does_not_wait_for_a_rollout_and_the_metrics_tell(
    tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes while the training waits for the samples of step 3: they are dropped, and sampled anew by
    the newer weights."""
    from truestep import signals

    ask, asked = threading.Event(), list[int]()
    monkeypatch.setattr(signals, "_pending", asked)

    def before(step: int) -> None:
        if step == 3 and not asked:
            while not ask.is_set():  # the update of step 2 has begun
                time.sleep(0.01)
            time.sleep(0.5)
            asked.append(15)
            time.sleep(0.5)

    class Told:
        def __getattr__(self, name: str) -> Any:
            return getattr(updater, name)

        def update(self, data: StepData, step: int, **more: Any) -> Any:
            found = updater.update(data, step, **more)
            if step == 2:
                ask.set()
            return found

    with opened(tiny, tmp_path) as spec:
        assert isinstance(spec.engine, TorchEngine)
        engine, updater = Elsewhere(spec.engine, before), spec.updater
        spec = replace(with_engine(spec, engine), updater=Told())  # type: ignore[arg-type]
        with pytest.raises(Interrupted):
            run_stage(spec)
        state = newest_state(spec.folder / "checkpoints")
        assert state is not None
        assert state["step"] == 3
        assert "waiting" not in state
    asked.clear()
    with opened(tiny, tmp_path) as spec:
        assert isinstance(spec.engine, TorchEngine)
        run_stage(with_engine(spec, Elsewhere(spec.engine)))
        assert [row["rl/sampling/staleness"] for row in logged(spec)] == [0, 1, 1, 0, 1]


class Off(TorchEngine):
    """Samples at another temperature than it is asked to."""

    def generate(self, requests: Any, sampling: SamplingParameters, *more: Any) -> Iterator[Any]:
        yield from super().generate(requests, replace(sampling, temperature=1.3), *more)


class OffBeside(Elsewhere, Off):
    """The same, beside the training."""


class Forgetful(Elsewhere):
    """Says that it has the new weights, but samples from those of version 1."""

    def publish(self, weights: Any, version: int) -> Any:
        if version < 2:
            return super().publish(weights, version)
        self.policy_version = version
        self.model.requires_grad_(False)
        receipt = super().publish(dict(self.model.named_parameters()), version)
        return replace(receipt, addresses={}, fingerprints={}, unread="a server that cannot tell")


@pytest.mark.parametrize("kind", ["temperature", "temperature beside", "weights"])
def test_a_wrong_engine_is_found_before_an_update(tmp_path: Path, kind: str) -> None:
    with opened(made(tmp_path / "recipe", "stages.rl.prompts_per_step=8"), tmp_path) as spec:
        assert isinstance(spec.engine, TorchEngine)
        engine: Any
        if kind == "temperature":
            engine = Off(spec.engine.model, max_running=6)
        else:
            engine = (OffBeside if "beside" in kind else Forgetful)(spec.engine)
        with pytest.raises(StaleWeightsError, match=r"no update was made"):
            run_stage(with_engine(spec, engine))
        assert len(rundir.read_jsonl(spec.folder / "metrics.jsonl")) == (2 if kind == "weights" else 0)


def test_a_policy_that_changes_much_is_not_a_wrong_engine(tmp_path: Path) -> None:
    fast = made(tmp_path / "recipe", "stages.rl.optimizer.lr=0.2", "stages.rl.prompts_per_step=8")
    go(fast, tmp_path / "run")
    assert max(row["rl/sampling/policy_change_mean"] for row in rows(tmp_path / "run")) > 0.5


def test_a_step_without_an_update_is_compared_too(tmp_path: Path) -> None:
    """If no token is trained, no update compares engine and trainer; the samples must not be used before."""

    class Untrained:
        def __getattr__(self, name: str) -> Any:
            return getattr(updater, name)

        def update(self, data: StepData, *given: Any, **more: Any) -> Any:
            return updater.update(replace(data, minibatches=[[] for _ in data.minibatches]), *given, **more)

    class Late(Elsewhere):
        """Samples at another temperature from version 1 on."""

        def generate(self, requests: Any, sampling: SamplingParameters, *more: Any) -> Iterator[Any]:
            times = 1.3 if self.policy_version else 1.0
            yield from super().generate(requests, replace(sampling, temperature=times), *more)

    with opened(made(tmp_path / "recipe", "stages.rl.prompts_per_step=8"), tmp_path) as spec:
        assert isinstance(spec.engine, TorchEngine)
        updater, engine = spec.updater, Late(spec.engine)
        with pytest.raises(StaleWeightsError):
            run_stage(replace(with_engine(spec, engine), updater=Untrained()))  # type: ignore[arg-type]
        assert engine.policy_version == 1
        assert len(logged(spec)) == 1
