"""What a step trains on: epochs without loss, groups without mix-ups, unscored samples left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from truestep.train.buffers import Memory

from truestep.flops import Ledger
from truestep.objective import plan
from truestep.objective.methods import build
from truestep.records import Distribution, Message, Problem, Prompt, Rollout, Score, Stop, Verdict
from truestep.rollout.engine import GenerationCost, SampleRequest, SamplingParameters
from truestep.rollout.sample import Sampler
from truestep.train.parallel import Ranks
from truestep.train.source import RolloutSource, window


def no_entropy(sequences: Sequence[Any]) -> tuple[list[float], Ledger]:
    return [0.0] * len(sequences), Ledger()


SAMPLING = SamplingParameters(temperature=1.0, max_new_tokens=10, stop_token_ids=(1,))


class ScriptedEngine:
    """Completes every request with one token that ``token`` chooses; order reversed, as an engine may."""

    policy_version = 0

    def __init__(self, token: Callable[[SampleRequest], int]) -> None:
        self.token = token
        self.asked: list[SampleRequest] = []

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingParameters,
                 check_stop: Callable[[], None] = lambda: None) -> Iterator[Rollout]:  # fmt: skip
        self.asked += requests
        for request in reversed(requests):
            token = self.token(request)
            failed = token < 0
            yield Rollout(
                problem_id=request.problem_id, sample_index=request.sample_index,
                completion_ids=() if failed else (token, 1), behavior_logprobs=() if failed else (-0.5, -0.1),
                distribution=Distribution(policy_version=0, temperature=1.0),
                stop=Stop.ERROR if failed else Stop.STOP_TOKEN, error="out of slots" if failed else "",
            )  # fmt: skip

    def publish(self, weights: Mapping[str, Any], version: int) -> None: ...

    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        return []

    def take_cost(self) -> GenerationCost:
        return GenerationCost()


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            problem=Problem(id=f"p{i}", messages=(Message(role="user", content="?"),), answer="1"),
            token_ids=(5, i + 10),
        )
        for i in range(count)
    ]


def source(engine: ScriptedEngine, *, count: int = 6, per_step: int = 4, updates: int = 2, method: str = "paper",
           samples: int = 4) -> RolloutSource:  # fmt: skip
    def grade(pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        return [Score(verdict=Verdict.CORRECT if text == "good" else Verdict.INCORRECT) for _, text in pairs]

    sampler = Sampler(engine=engine, plan=plan.own, sampling=SAMPLING, samples_per_prompt=samples,
                      decode=lambda ids: "good" if ids and ids[0] == 7 else "bad", grade=grade, seed=3)  # fmt: skip
    return RolloutSource(prompts(count), sampler=sampler, method=build(method, {}), prompts_per_step=per_step,
                         updates_per_step=updates, ranks=Ranks(), decode_prompt=lambda p: "?")  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30))
def test_windows_visit_every_item_equally_often(num_items: int, size: int, num_steps: int) -> None:
    seen = Counter(x for step in range(num_steps) for x in window(list(range(num_items)), step, size, seed=1))
    counts = [seen[i] for i in range(num_items)]
    assert sum(counts) == size * num_steps
    assert max(counts) - min(counts) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 60))
def test_a_limit_ends_the_last_window_exactly(num_items: int, size: int, limit: int) -> None:
    steps = -(-limit // size)
    assert (
        sum(len(window(list(range(num_items)), s, size, seed=1, limit=limit)) for s in range(steps)) == limit
    )


def test_a_prompt_that_a_batch_holds_twice_has_two_groups_of_its_own() -> None:
    engine = ScriptedEngine(lambda r: 7 if r.sample_index % 2 else 8)
    made = source(engine, count=5, per_step=4, samples=2)
    for step in range(5):  # some batch spans two epochs
        data = made.take(step, Memory(), no_entropy)
        assert [len({s.group for s in part}) for part in data.minibatches] == [2, 2]
        assert all(len(part) == 4 for part in data.minibatches)
    asked = [(r.step, r.problem_id, r.sample_index) for r in engine.asked]
    assert len(asked) == len(set(asked))  # no two samples share their random numbers
    assert any(index >= 2 for _, _, index in asked)  # the case did occur


def test_unscored_samples_are_not_trained_and_counted() -> None:
    engine = ScriptedEngine(lambda r: -1 if r.sample_index == 0 else 7 if r.sample_index == 1 else 8)
    data = source(engine).take(0, Memory(), no_entropy)
    sequences = [s for part in data.minibatches for s in part]
    assert len(sequences) == 4 * 3
    assert data.metrics["unscored"] == pytest.approx(1 / 4)
    assert data.metrics["reward"] == pytest.approx(1 / 3)  # over scored samples only
    for group in range(2):
        members = [s.advantage for s in data.minibatches[0] if s.group == group]
        assert sum(float(a) for a in members if not isinstance(a, tuple)) == pytest.approx(0)


def test_an_all_equal_batch_trains_its_tokens_with_advantage_zero() -> None:
    data = source(ScriptedEngine(lambda r: 8)).take(0, Memory(), no_entropy)
    sequences = [s for part in data.minibatches for s in part]
    assert len(sequences) == 16
    assert {s.advantage for s in sequences} == {0.0}
    assert data.metrics["mixed_groups"] == 0
