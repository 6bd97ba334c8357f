"""What a step trains on: epochs without loss, groups without mix-ups, unscored samples left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.flops import Ledger
from truestep.objective import plan
from truestep.objective.methods import build
from truestep.records import (
    Message,
    Problem,
    Prompt,
    RewardInput,
    Rollout,
    Score,
    TrainSequence,
    Verdict,
    judged,
)
from truestep.rollout.engine import SampleRequest, SamplingParameters, sampled_rollout
from truestep.rollout.sample import Sampler
from truestep.train.memory import Memory
from truestep.train.order import Order, window
from truestep.train.parallel import Ranks
from truestep.train.source import RolloutSource


@dataclass(frozen=True, kw_only=True)
class Entropies:
    """Stands for a ``Scorer``: what a source asks of one. The entropy falls with the place in the list."""

    ranks: Ranks = field(default_factory=Ranks)
    asked: list[TrainSequence] = field(default_factory=list)

    def entropy(self, sequences: Sequence[TrainSequence], step: int) -> tuple[list[float], Ledger]:
        self.asked.extend(sequences)
        return [float(-i) for i in range(len(sequences))], Ledger()


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
            yield sampled_rollout(
                request,
                sampling,
                tokens=() if failed else (token, 1),
                logprobs=() if failed else (-0.5, -0.1),
                policy_version=self.policy_version,
                error="out of slots" if failed else "",
            )

    def publish(self, weights: Mapping[str, Any], version: int) -> None: ...

    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        return []

    def take_cost(self) -> Ledger:
        return Ledger()


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            problem=Problem(id=f"p{i}", messages=(Message(role="user", content="?"),), answer="1"),
            token_ids=(5, i + 10),
        )
        for i in range(count)
    ]


def source(engine: ScriptedEngine, *, count: int = 6, per_step: int = 4, updates: int = 2, method: str = "grpo_token_mean",
           samples: int = 4) -> RolloutSource:  # fmt: skip
    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        return [judged(Verdict.CORRECT if i.completion == "good" else Verdict.INCORRECT) for i in inputs]

    sampler = Sampler(engine=engine, plan=plan.own, sampling=SAMPLING, samples_per_prompt=samples,
                      decode=lambda ids: "good" if ids and ids[0] == 7 else "bad", score=score, seed=3)  # fmt: skip
    return RolloutSource(Order((prompts(count),)), sampler=sampler, scorer=Entropies(), method=build(method, {}),  # type: ignore[arg-type]
                         prompts_per_step=per_step, updates_per_step=updates, decode_prompt=lambda p: "?")  # fmt: skip


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
        data = made.take(step, Memory())
        assert [len({s.group for s in part}) for part in data.minibatches] == [2, 2]
        assert all(len(part) == 4 for part in data.minibatches)
    asked = [(r.step, r.problem_id, r.sample_index) for r in engine.asked]
    assert len(asked) == len(set(asked))  # no two samples share their random numbers
    assert any(index >= 2 for _, _, index in asked)  # the case did occur


def test_unscored_samples_are_not_trained_and_counted() -> None:
    engine = ScriptedEngine(lambda r: -1 if r.sample_index == 0 else 7 if r.sample_index == 1 else 8)
    data = source(engine).take(0, Memory())
    sequences = [s for part in data.minibatches for s in part]
    assert len(sequences) == 4 * 3
    assert data.metrics["unscored"] == pytest.approx(1 / 4)
    assert data.metrics["reward"] == pytest.approx(1 / 3)  # over scored samples only
    for group in range(2):
        members = [s.advantage for s in data.minibatches[0] if s.group == group]
        assert sum(float(a) for a in members if not isinstance(a, tuple)) == pytest.approx(0)


def test_dapo_drops_equal_groups_and_refills_from_other_prompts() -> None:
    engine = ScriptedEngine(lambda r: 7 if r.problem_id in ("p0", "p1") or r.sample_index % 2 else 8)
    made = source(engine, count=12, per_step=4, method="dapo")
    data = made.take(0, Memory())
    first = {r.problem_id for r in engine.asked[: 4 * 4]}
    dropped = first & {"p0", "p1"}
    assert all(s.reward in (0.0, 1.0) or s.reward < 1 for part in data.minibatches for s in part)
    assert sum(len({s.group for s in part}) for part in data.minibatches) == 4  # as many groups as asked for
    assert len({r.problem_id for r in engine.asked}) == 4 + len(dropped) or not dropped


def test_an_all_equal_batch_trains_its_tokens_with_advantage_zero() -> None:
    data = source(ScriptedEngine(lambda r: 8)).take(0, Memory())
    sequences = [s for part in data.minibatches for s in part]
    assert len(sequences) == 16
    assert {s.advantage for s in sequences} == {0.0}
    assert data.metrics["mixed_groups"] == 0
