"""The engine samples what the model says, whatever it is decoded with, and its log-probabilities are the
trainer's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import STOPS, VOCABULARY, bare_model, policy, requests, sequence

from truestep.flops import Ledger
from truestep.model.load import keep_float64
from truestep.records import Origin, Rollout, Stop
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rollout.engine_torch import SHARED_TOKENS, TorchEngine
from truestep.train.packing import pack
from truestep.train.policy import Policy

torch.set_num_threads(1)

Key = tuple[str, int]
FAMILIES = ("llama", "sliding")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(family: str) -> Policy:
    return policy(family)


def sampling(
    temperature: float = 1.0, length: int = 24, stops: tuple[int, ...] = STOPS
) -> SamplingParameters:
    return SamplingParameters(temperature=temperature, max_new_tokens=length, stop_token_ids=stops)


def run(
    trained: Policy,
    asked: Sequence[SampleRequest],
    how: SamplingParameters,
    *,
    max_running: int = 8,
    packs: bool = True,
) -> dict[Key, Rollout]:
    engine = TorchEngine(trained.model, max_running=max_running, packs=packs)
    found = list(engine.generate(asked, how))
    by_key = {(r.problem_id, r.sample_index): r for r in found}
    assert len(by_key) == len(found) == len(asked), "one rollout per request"
    for rollout in found:
        num = len(rollout.completion_ids)
        assert (rollout.origin, rollout.policy_version) == ((Origin.POLICY,) * num, (0,) * num)
        assert rollout.behavior_logprobs is not None, "this engine records what it samples by"
    return by_key


def assert_same(a: dict[Key, Rollout], b: dict[Key, Rollout]) -> None:
    for key in a.keys() & b.keys():
        assert a[key].completion_ids == b[key].completion_ids, key
        assert a[key].stop == b[key].stop
        for x, y in zip(a[key].behavior_logprobs, b[key].behavior_logprobs, strict=True):
            assert abs(x - y) <= 1e-9


# ------------------------------------------------------------------------------------------- what is sampled


@pytest.mark.parametrize("packs", [True, False])
def test_greedy_is_what_transformers_generates(family: str, trained: Policy, packs: bool) -> None:
    peer = bare_model(family).eval()
    keep_float64(peer)
    asked = requests(9)
    found = run(trained, asked, sampling(temperature=0), packs=packs)
    lengths = set()
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        got = found[request.problem_id, 0]
        assert list(got.completion_ids) == expected
        assert got.behavior_logprobs == (0.0,) * len(expected), "a point distribution"
        lengths.add(len(expected))
    assert len(lengths) > 1, "the case is too easy: every completion has the same length"


@pytest.mark.parametrize("max_running", [1, 5, 16, 32])
def test_a_sample_does_not_depend_on_how_many_run(trained: Policy, max_running: int) -> None:
    asked = requests(4, samples=9)
    assert_same(
        run(trained, asked, sampling(), max_running=36),
        run(trained, asked, sampling(), max_running=max_running),
    )


def test_a_sample_does_not_depend_on_order_or_company(trained: Policy) -> None:
    asked = requests(6, samples=3)
    expected = run(trained, asked, sampling())
    shuffled = list(asked)
    random.Random(1).shuffle(shuffled)
    assert [r.problem_id for r in shuffled] != [r.problem_id for r in asked]
    assert_same(expected, run(trained, shuffled, sampling()))
    alone = run(trained, asked[7:8], sampling())
    assert len(alone) == 1
    assert_same(expected, alone)
    assert_same(expected, run(trained, asked[1::4], sampling()))


def test_its_own_coordinates_do_change_a_sample(trained: Policy) -> None:
    found = run(trained, requests(1, samples=8), sampling())
    assert len({r.completion_ids for r in found.values()}) > 1
    other = run(trained, [_moved(r) for r in requests(1, samples=8)], sampling())
    assert any(found[k].completion_ids != other[k].completion_ids for k in found)


def _moved(r: SampleRequest) -> SampleRequest:
    return SampleRequest(
        problem_id=r.problem_id, sample_index=r.sample_index, prompt_ids=r.prompt_ids, seed=r.seed, purpose=r.purpose,
        step=r.step + 1,
    )  # fmt: skip


def test_the_fallback_takes_the_same_tokens(trained: Policy) -> None:
    asked = requests(4, samples=2)
    assert_same(run(trained, asked, sampling()), run(trained, asked, sampling(), packs=False))


def test_the_window_of_a_sliding_model_is_felt() -> None:
    """Prompts longer than the window: without it the tokens would be others."""
    sliding = policy("sliding")
    asked = [r for r in requests(6) if len(r.prompt_ids) > 6]
    with_window = run(sliding, asked, sampling(temperature=0))
    sliding.model.config.sliding_window = None
    without = run(sliding, asked, sampling(temperature=0))
    assert any(with_window[k].completion_ids != without[k].completion_ids for k in with_window)


def test_stop_tokens_and_the_length_limit_end_a_sample(trained: Policy) -> None:
    found = run(trained, requests(8, samples=4), sampling())
    assert {r.stop for r in found.values()} == {Stop.STOP_TOKEN, Stop.LENGTH}
    for rollout in found.values():
        *before, last = rollout.completion_ids
        assert not set(before) & set(STOPS)
        if rollout.stop is Stop.STOP_TOKEN:
            assert last in STOPS
        else:
            assert len(rollout.completion_ids) == 24
            assert last not in STOPS
    unstopped = run(trained, requests(8, samples=4), sampling(stops=()))
    for key, rollout in found.items():
        assert unstopped[key].completion_ids[: len(rollout.completion_ids)] == rollout.completion_ids


@pytest.mark.parametrize("packs", [True, False])
def test_a_stop_sequence_ends_a_sample_where_it_first_stands(trained: Policy, packs: bool) -> None:
    free = run(trained, requests(4, samples=4), sampling(stops=()), packs=packs)
    middle = next(iter(free.values())).completion_ids[9:11]
    how = replace(sampling(stops=()), stop_sequences=(middle, (-1, -1)))
    found = run(trained, requests(4, samples=4), how, packs=packs)
    assert {r.stop for r in found.values()} == {Stop.STOP_TOKEN, Stop.LENGTH}
    for key, rollout in found.items():
        ids = free[key].completion_ids
        ends = [i + 2 for i in range(len(ids) - 1) if ids[i : i + 2] == middle]
        assert rollout.completion_ids == ids[: ends[0] if ends else len(ids)]
        assert (rollout.stop is Stop.STOP_TOKEN) is bool(ends)


# ------------------------------------------------------------------------------------------ log-probabilities


def trainer_logprobs(
    trained: Policy, rollout: Rollout, prompt: tuple[int, ...], temperature: float
) -> list[float]:
    (batch,) = pack(
        [sequence(prompt, rollout.completion_ids)], tokens_per_microbatch=999, dtype=torch.float64
    )
    with torch.no_grad():
        return trained(batch, temperature)[0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behavior_logprobs_are_the_trainers(trained: Policy, temperature: float) -> None:
    asked = requests(5, samples=3)
    found = run(trained, asked, sampling(temperature))
    worst = 0.0
    for request in asked:
        rollout = found[request.problem_id, request.sample_index]
        assert rollout.distribution.temperature == temperature
        expected = trainer_logprobs(trained, rollout, request.prompt_ids, temperature)
        worst = max(worst, *(abs(a - b) for a, b in zip(rollout.behavior_logprobs, expected, strict=True)))
    assert worst <= 1e-9


@pytest.mark.parametrize("packs", [True, False])
def test_score_is_what_sampling_recorded_and_costs_nothing(trained: Policy, packs: bool) -> None:
    request = requests(4)[3]
    engine = TorchEngine(trained.model, packs=packs)
    (rollout,) = engine.generate([request], sampling(0.7))
    cost = engine.take_cost()
    assert cost.generated_pass_tokens - cost.prompt_tokens == len(rollout.completion_ids) - 1
    got = engine.score(request.prompt_ids + rollout.completion_ids, len(request.prompt_ids), 0.7)
    assert max(abs(a - b) for a, b in zip(got, rollout.behavior_logprobs, strict=True)) <= 1e-9
    assert engine.take_cost() == Ledger(), "a probe is no work of the run"
    unbent = engine.score(request.prompt_ids + rollout.completion_ids, len(request.prompt_ids), 1.0)
    assert max(abs(a - b) for a, b in zip(unbent, got, strict=True)) > 1e-3


def test_truncated_logprobs_belong_to_the_truncated_distribution(trained: Policy) -> None:
    how = SamplingParameters(temperature=1.0, max_new_tokens=12, stop_token_ids=(), top_k=5)
    request = requests(3)[2]
    rollout = run(trained, [request], how)[request.problem_id, 0]
    assert rollout.distribution.top_k == 5
    whole = trainer_logprobs(trained, rollout, request.prompt_ids, 1.0)
    assert all(bent > plain for bent, plain in zip(rollout.behavior_logprobs, whole, strict=True))


# ------------------------------------------------------------------------------------------ work and stopping


def test_a_shared_prompt_is_prefilled_once(trained: Policy) -> None:
    asked = requests(3, samples=8)
    engine = TorchEngine(trained.model, max_running=32)
    rollouts = list(engine.generate(asked, sampling()))
    cost = engine.take_cost()
    assert cost.prompt_tokens == sum(len(r.prompt_ids) for r in asked if r.sample_index == 0)
    decoded = cost.generated_pass_tokens - cost.prompt_tokens
    assert decoded == sum(len(r.completion_ids) - 1 for r in rollouts), "no padding row is decoded"
    prompts = {r.problem_id: len(r.prompt_ids) for r in asked}
    pairs = sum(n * (n + 1) // 2 for n in prompts.values())
    for rollout in rollouts:
        n = prompts[rollout.problem_id]
        pairs += sum(n + i for i in range(1, len(rollout.completion_ids)))
    assert cost.generated_pairs == pairs
    assert engine.take_cost().prompt_tokens == 0, "taken is taken"


@pytest.mark.parametrize("samples", [1, 3])
def test_what_all_prompts_begin_with_is_prefilled_once(trained: Policy, samples: int) -> None:
    """Worked examples before every problem: the same samples and log-probabilities, less work."""
    draw = torch.Generator().manual_seed(5)
    beginning = tuple(torch.randint(0, VOCABULARY, (SHARED_TOKENS + 7,), generator=draw).tolist())
    asked = [
        replace(r, prompt_ids=beginning + r.prompt_ids)
        for r in [*requests(6, samples), *requests(1, samples, seed=9)]
    ]
    asked = [replace(r, problem_id=f"{r.problem_id}-{len(r.prompt_ids)}-{r.seed}") for r in asked]
    asked.append(
        replace(asked[0], problem_id="beginning", prompt_ids=beginning)
    )  # no token of its own but the last
    assert_same(run(trained, asked, sampling()), alone := run(trained, asked, sampling(), max_running=1))
    assert len(alone) == len(asked)
    engine = TorchEngine(trained.model, max_running=len(asked))
    list(engine.generate(asked, sampling()))
    own = {r.problem_id: len(r.prompt_ids) - len(beginning) + 1 for r in asked}
    assert engine.take_cost().prompt_tokens == len(beginning) - 1 + sum(own.values())


class _StoppedError(Exception):
    pass


def _stop_after(num_calls: int) -> Callable[[], None]:
    calls = iter(range(num_calls))

    def check() -> None:
        if next(calls, None) is None:
            raise _StoppedError

    return check


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("after", [0, 1, 9])
def test_an_interrupted_engine_is_as_good_as_new(trained: Policy, packs: bool, after: int) -> None:
    asked = requests(3, samples=2)
    engine = TorchEngine(trained.model, max_running=3, packs=packs)
    trained.model.train()
    stopped: Iterator[Rollout] = engine.generate(asked, sampling(), _stop_after(after))
    with pytest.raises(_StoppedError):
        list(stopped)
    assert trained.model.training, "the trainer's mode is given back"
    again = {(r.problem_id, r.sample_index): r for r in engine.generate(asked, sampling())}
    assert_same(run(trained, asked, sampling(), max_running=3, packs=packs), again)


def test_no_requests_no_rollouts(trained: Policy) -> None:
    assert run(trained, [], sampling()) == {}


def test_weights_of_another_model_are_refused(trained: Policy) -> None:
    weights = dict(trained.model.named_parameters())
    name, tensor = weights.popitem()
    with pytest.raises(KeyError, match="do not match"):
        TorchEngine(trained.model).publish({**weights, "other." + name: tensor}, 1)


def test_logprobs_are_negative_and_finite(trained: Policy) -> None:
    for rollout in run(trained, requests(4, samples=2), sampling()).values():
        assert all(math.isfinite(v) and v <= 1e-12 for v in rollout.behavior_logprobs)
        assert all(0 <= t < VOCABULARY for t in rollout.completion_ids)
