"""The self-test finds what does not reach an engine that cannot show its bits; the gap test watches its samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import policy
from tiny_runs import go, prepared, write_recipe
from torch import Tensor, nn

from truestep.objective.methods import build
from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import Receipt, SamplingParameters, StaleWeightsError
from truestep.rollout.engine_torch import TorchEngine
from truestep.seeding import Purpose
from truestep.settings import OptimizerSettings
from truestep.train.engine_test import FEWEST, Disturbance, Gap, GapTest, SelfTest, probe_prompts, sampled_gap
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.step import StepPlan, train_step
from truestep.train.weight_sync import publish

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16)


SAID: list[str] = []


class Silent(TorchEngine):
    """An engine with separate weights that does not tell which bits it has. From the second time on, it does not
    take the tensors whose names contain one of ``lost``."""

    def __init__(self, trained: Policy, *lost: str) -> None:
        super().__init__(copy.deepcopy(trained.model))
        self.lost, self.taken = lost, 0

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
        own = dict(self.model.named_parameters())
        lost = self.lost if self.taken else ()
        super().load(
            own, {n: own[n] if any(part in n for part in lost) else weights[n].clone() for n in weights}
        )
        self.policy_version, self.taken = version, self.taken + 1
        return Receipt(version=version, is_received=True, unread="a test")


class Warmer(Silent):
    """Samples at another temperature than is asked for."""

    times = 1.0

    def generate(self, requests: Any, sampling: SamplingParameters, *more: Any) -> Iterator[Any]:
        yield from super().generate(
            requests, replace(sampling, temperature=sampling.temperature * self.times), *more
        )


def scorer_of(trained: Policy, temperature: float = 1.0) -> Scorer:
    return Scorer(policy=trained, temperature=temperature, tokens_per_microbatch=4096)


def run_test(trained: Policy, engine: TorchEngine, temperature: float = 1.0) -> Gap:
    trained.context_length = 96  # shorter prompts, to save time
    publish(trained, engine, 0)
    return SelfTest(trained, engine, scorer_of(trained, temperature), 0).run(SAID.append)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16], ids=str)
def test_disturbed_weights_are_restored_to_the_bit(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 1)).to(dtype)
    with torch.no_grad():
        module[0].bias.zero_()
        module[0].bias[1] = -0.0
        module[2].weight[0, 0] = -0.0
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    change = Disturbance(module)
    change.sizes = dict.fromkeys(before, 0.5)
    for names in ({"0.weight", "1.bias"}, set(before), set()):
        change.set(names)
        assert {n for n, p in module.named_parameters() if not torch.equal(p, before[n])} == names
    for name, p in module.named_parameters():
        assert before[name].view(torch.int16).tolist() == p.detach().view(torch.int16).tolist()
    change.make("0.bias")
    noise = module[0].bias.detach().float()
    change.undo("0.bias")
    change.make("0.bias")
    assert torch.equal(noise, module[0].bias.detach().float()), "the same noise every time"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_right_engine_passes_and_the_weights_stay(dtype: torch.dtype, temperature: float) -> None:
    trained = policy(dtype=dtype)
    before = [p.detach().clone() for p in trained.parameters()]
    engine = Silent(trained)
    right = run_test(trained, engine, temperature)
    assert right.count >= FEWEST
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True)), "restored"
    assert engine.take_cost().generated_pass_tokens == 0, "a test is not part of the run's work"
    assert "changes of 21 of 21 tensors reached" in SAID[-1], SAID[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_every_tensor_that_does_not_arrive_is_found(dtype: torch.dtype, every: int) -> None:
    trained = policy(dtype=dtype)
    for name in [name for name, _ in trained.model.named_parameters()][::every]:
        with pytest.raises(StaleWeightsError, match=f"self-test failed: {name} was changed and published"):
            run_test(trained, Silent(trained, name))


@pytest.mark.parametrize("wrong", [0, 1, None])
def test_every_server_of_an_engine_is_tested(wrong: int | None) -> None:
    trained = policy(dtype=torch.float32)

    class Two(Silent):
        """Two servers, one of which may lose a tensor."""

        def __init__(self) -> None:
            super().__init__(trained)
            self.both = [Silent(trained, *("o_proj",) * (i == wrong)) for i in range(2)]

        @property
        def parts(self) -> list[TorchEngine]:
            return list(self.both)

        def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
            self.policy_version = version
            receipts = [one.publish(weights, version) for one in self.both]
            return receipts[0]

    if wrong is None:
        run_test(trained, Two())
        return
    with pytest.raises(StaleWeightsError, match=f"o_proj.* but server {wrong + 1} of 2 still computes"):
        run_test(trained, Two())


def test_a_policy_that_is_certain_of_everything_is_judged() -> None:
    """Σ (1 − π) is 0."""
    test = GapTest(torch.float32)
    for _ in range(2):
        assert judged(test, (torch.zeros(FEWEST), torch.zeros(FEWEST))) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", [0.8, 1.2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_another_temperature_is_found(dtype: torch.dtype, times: float, temperature: float) -> None:
    trained = policy(dtype=dtype)
    engine = Warmer(trained)
    engine.times = times
    with pytest.raises(
        StaleWeightsError,
        match=r"self-test failed: with (the weights of the run|changed weights), .*temperature",
    ):
        run_test(trained, engine, temperature)


def test_an_engine_without_samples_is_refused() -> None:
    trained = policy(dtype=torch.float32)

    class Failing(Silent):
        def generate(self, *args: Any, **more: Any) -> Iterator[Any]:
            for made in super().generate(*args, **more):
                yield replace(made, error="lost", stop=type(made.stop).ERROR)

    with pytest.raises(StaleWeightsError, match=r"returned no sample \(lost\)"):
        run_test(trained, Failing(trained))


def gaps(count: int, seed: int, noise: float, slope: float = 0.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a trainer and an engine whose rounding is ``noise`` times 1 − π."""
    draw = np.random.default_rng(seed)
    own = np.log(draw.uniform(0.001, 1, count))
    far = draw.standard_t(3, count) * noise * (1 - np.exp(own))
    return torch.tensor(own), torch.tensor(own - far - slope * own)


def test_the_sums_are_those_of_numpy_and_add_up() -> None:
    own, engine = gaps(500, 0, 0.02)
    gap = Gap.of(own, engine)
    g, logs = (own - engine).numpy(), own.numpy()
    assert gap.size == pytest.approx(np.abs(g).sum() / (1 - np.exp(engine.numpy())).sum(), rel=1e-12)
    slope, error, share = gap.tilt
    assert slope == pytest.approx(np.polyfit(logs, g, 1)[0], rel=1e-9)
    middle = logs - logs.mean()
    assert error == pytest.approx(np.sqrt((middle**2 * g**2).sum()) / (middle**2).sum(), rel=1e-9)
    assert share == pytest.approx(np.corrcoef(logs, g)[0, 1] ** 2, rel=1e-9)
    parts = Gap.of(own[:200], engine[:200]) + Gap.of(own[200:], engine[200:])
    assert parts.sums == pytest.approx(gap.sums, rel=1e-12)


def judged(test: GapTest, pair: tuple[Tensor, Tensor]) -> str:
    test.add(*pair)
    try:
        test.judge(3, Ranks())
    except StaleWeightsError as error:
        return str(error)
    return ""


def test_rounding_is_never_accused() -> None:
    """Heavy-tailed rounding, as bfloat16's, over few and many tokens and several sizes."""
    for noise in (0.001, 0.03):
        for count in (64, 100, 1000):
            for seed in range(30):
                test = GapTest(torch.bfloat16)
                found = [judged(test, gaps(count, 100 * seed + i, noise)) for i in range(10)]
                assert found == [""] * 10, (noise, count, seed)


def test_one_token_far_off_is_not_another_temperature() -> None:
    test = GapTest(torch.bfloat16)
    own, engine = gaps(200, 1, 0.01)
    assert judged(test, (own, engine)) == ""
    engine[int(own.argmin())] -= 1.2
    assert judged(test, (own, engine)) == ""


@pytest.mark.parametrize("times", [0.9, 1.1])
def test_a_temperature_is_named(times: float) -> None:
    test = GapTest(torch.bfloat16)
    assert judged(test, gaps(2000, 0, 0.02)) == ""
    found = judged(test, gaps(2000, 1, 0.02, slope=1 - 1 / times))
    assert f"step 4, the engine sampled at {times:.1f}" in found.replace("0.899", "0.9").replace(
        "1.099", "1.1"
    )
    assert found.endswith("no update was made")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gap_that_grows_is_old_weights(dtype: torch.dtype) -> None:
    noise = 1e-5 if dtype == torch.float32 else 0.02
    test = GapTest(dtype)
    for seed in range(3):
        assert judged(test, gaps(1000, seed, noise)) == ""
    assert judged(test, gaps(1000, 9, 2 * noise)) == "", "rounding may double"
    assert "does not use the trainer's weights" in judged(test, gaps(1000, 9, 12 * noise))
    assert judged(test, gaps(1000, 5, noise)) == "", "what was found is forgotten"


def test_nan_is_wrong() -> None:
    own, engine = gaps(100, 0, 0.01)
    engine[3] = float("nan")
    assert judged(GapTest(torch.float32), (own, engine)) != ""


def test_few_tokens_are_judged_with_those_of_the_next_update() -> None:
    test = GapTest(torch.float32)
    assert judged(test, gaps(FEWEST - 1, 0, 10.0)) == ""
    assert judged(test, gaps(1, 1, 10.0)) != ""
    assert judged(GapTest(torch.float32), gaps(FEWEST, 0, 10.0)) != ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_torch_engines_are_within_what_the_first_showed(dtype: torch.dtype) -> None:
    trained = policy(dtype=dtype)
    engine, test = TorchEngine(trained.model), GapTest(dtype)
    publish(trained, engine, 0)
    for seed in range(4):
        with torch.no_grad():
            for p in trained.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.01)
        publish(trained, engine, seed)
        test.found += sampled_gap(engine, scorer_of(trained), probe_prompts(300, 256))
        test.judge(seed, Ranks())
    assert 0 < test.right.size < 0.3


class Watching:
    """Sees what an update shows, and refuses it if asked to."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses, self.seen, self.judged = refuses, [], 0  # type: ignore[var-annotated]

    def add(self, trainer: Tensor, engine: Tensor) -> None:
        self.seen.append((trainer, engine))

    def judge(self, step: int, ranks: Ranks) -> None:
        self.judged += 1
        if self.refuses:
            raise StaleWeightsError(f"step {step}")


@pytest.mark.parametrize("refuses", [False, True])
def test_an_update_shows_its_sampled_tokens_and_may_be_refused_before_it_is_made(refuses: bool) -> None:
    trained = policy(dtype=torch.float64)
    prompt, completion, expert = (5, 6, 7), (40, 41), (8, 9)
    sampled = TrainSequence(
        token_ids=prompt + completion, num_prefix_tokens=3, group=0, advantage=1.0, policy_version=0,
        origin=(Origin.CONTEXT,) * 3 + (Origin.POLICY,) * 2, behavior_logprobs=(-1.0, -2.0),
    )  # fmt: skip
    shown = replace(
        sampled, token_ids=prompt + expert, origin=(Origin.CONTEXT,) * 3 + (Origin.EXPERT,) * 2, group=1,
        policy_version=-1, behavior_logprobs=(-3.0, -4.0),
    )  # fmt: skip
    before = [p.detach().clone() for p in trained.parameters()]
    watch = Watching(refuses=refuses)
    plan = StepPlan(
        step=3, terms=build("grpo_token_mean", {}).terms, learning_rate=0.1, temperature=1.0, observe=watch
    )
    batches = pack([sampled, shown], tokens_per_microbatch=5, dtype=torch.float64)
    assert len(batches) == 2
    optimizer = MasterOptimizer(trained, OptimizerSettings(lr=0.1))
    if refuses:
        with pytest.raises(StaleWeightsError, match="step 3"):
            train_step(trained, optimizer, batches, plan)
    else:
        train_step(trained, optimizer, batches, plan)
    assert watch.judged == 1, "once for all micro-batches"
    engine = torch.cat([engine for _, engine in watch.seen])
    assert engine.tolist() == [-1.0, -2.0], "only tokens that the engine sampled"
    own = TorchEngine(trained.model)
    same = [torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True)]
    assert all(same) == refuses
    if refuses:
        trainer = torch.cat([trainer for trainer, _ in watch.seen])
        assert trainer.tolist() == pytest.approx(own.score(prompt + completion, 3, 1.0), abs=1e-9)


def test_a_run_stops_before_it_trains_on_another_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = TorchEngine.generate

    def warmer(self: TorchEngine, requests: Any, sampling: SamplingParameters, *more: Any) -> Iterator[Any]:
        is_rollout = bool(requests) and requests[0].purpose is Purpose.SAMPLE
        wrong = replace(sampling, temperature=sampling.temperature * 1.5)
        yield from generate(self, requests, wrong if is_rollout else sampling, *more)

    recipe = write_recipe(tmp_path / "recipe")
    wider = "stages.rl.samples_per_prompt=24"
    go(prepared(recipe, wider), tmp_path / "right")
    monkeypatch.setattr(TorchEngine, "generate", warmer)
    with pytest.raises(StaleWeightsError, match=r"step 1, .*; no update was made"):
        go(prepared(recipe, wider), tmp_path / "wrong")
