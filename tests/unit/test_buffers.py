"""Buffers and stored samples, and the groups that a plan's kinds become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_source import SAMPLING, ScriptedEngine, no_entropy, prompts

from truestep.objective import plan
from truestep.objective.methods import build
from truestep.objective.methods.row import Replay
from truestep.objective.plan import Keep, Round
from truestep.records import Kind, Prompt, Rollout, Score, TrainSequence, Verdict
from truestep.rollout.sample import Sampler
from truestep.train.buffers import Memory, Stored, choose_replays, remember, seen_of, with_waiting
from truestep.train.groups import group_ledger, sequences_of
from truestep.train.parallel import Ranks
from truestep.train.source import RolloutSource

TRACE = (7, 3, 4, 5, 1)


def grade(pairs: Sequence[tuple[Any, str]]) -> list[Score]:
    return [Score(verdict=Verdict.CORRECT if "7" in text else Verdict.INCORRECT) for _, text in pairs]


def sampler(made: plan.Plan, engine: ScriptedEngine, samples: int = 4, **more: Any) -> Sampler:
    return Sampler(
        engine=engine, plan=made, sampling=SAMPLING, samples_per_prompt=samples,
        decode=lambda ids: " ".join(map(str, ids)), grade=grade, seed=3,
        demonstrations={f"p{i}": TRACE for i in range(9)}, **more,
    )  # fmt: skip


def source(
    method: str, engine: ScriptedEngine, options: dict[str, Any], *, per_step: int = 4
) -> RolloutSource:
    row = build(method, options)
    assert row.plan is not None
    return RolloutSource(
        prompts(6), sampler=sampler(row.plan, engine), method=row, prompts_per_step=per_step, updates_per_step=2,
        ranks=Ranks(), decode_prompt=lambda p: "?",
    )  # fmt: skip


def flat(minibatches: Sequence[Sequence[TrainSequence]]) -> list[TrainSequence]:
    return [s for part in minibatches for s in part]


# ------------------------------------------------------------------------------------------- kinds of samples


def test_a_prefix_is_given_and_continued() -> None:
    engine = ScriptedEngine(lambda r: 8)
    made = plan.one_prefix(lambda step: 0.7, 0.7)
    (group,) = sampler(made, engine).groups(prompts(1), 0)
    assert [r.kind for r in group.rollouts] == [Kind.ON] * 3 + [Kind.PREFIX]
    last = group.rollouts[-1]
    assert (last.completion_ids, last.num_expert_tokens) == ((7, 3, 4, 8, 1), 3)
    assert group.scores[-1].verdict is Verdict.CORRECT  # the whole completion is judged
    asked = engine.asked[-1]
    assert (asked.prompt_ids, asked.num_given) == ((5, 10, 7, 3, 4), 3)
    (sequence,) = [s for s in sequences_of([group], build("prefix_rft", {}), 10) if s.kind is Kind.PREFIX]
    assert (sequence.token_ids, sequence.num_trained, sequence.num_expert_tokens) == (
        (5, 10, 7, 3, 4, 8, 1),
        5,
        3,
    )
    assert np.isnan(sequence.behavior_logprobs).tolist() == [True] * 3 + [False] * 2


def test_a_prefix_as_context_is_not_trained() -> None:
    engine = ScriptedEngine(lambda r: 8 if r.num_given == 0 else 7 + r.sample_index % 2)
    (group,) = sampler(plan.anchored(4, 0.01, 0.99), engine).groups(prompts(1), 0)
    assert all(r.kind is Kind.PREFIX and r.expert_is_context for r in group.rollouts) or group.scores
    kept = sequences_of([group], build("bread", {}), 10)
    for s in kept:
        assert s.num_expert_tokens == 0
        assert s.num_trained == 2
    # The group is that of one round; what other rounds sampled is counted as work.
    assert len(group.rollouts) == 4
    ledger = group_ledger([group], [kept])
    assert ledger.rollout_tokens == 2 * len(engine.asked)
    assert ledger.rollout_trained_tokens == 8


def test_a_whole_demonstration_is_not_generated() -> None:
    engine = ScriptedEngine(lambda r: 8)
    (group,) = sampler(plan.with_demonstration, engine).groups(prompts(1), 0)
    assert [r.kind for r in group.rollouts] == [Kind.ON] * 3 + [Kind.DEMO]
    assert len(engine.asked) == 3
    assert group.rollouts[-1].completion_ids == TRACE
    assert group.scores[-1].verdict is Verdict.CORRECT  # it is judged like a sample
    sequences = sequences_of([group], build("luffy", {}), 10)
    assert [s.advantage for s in sequences] == [-0.25] * 3 + [0.75]
    ledger = group_ledger([group], [sequences])
    assert (ledger.rollout_tokens, ledger.rollout_trained_tokens, ledger.demonstration_tokens) == (6, 6, 5)


def test_hinted_samples_are_trained_under_the_prompt_that_they_saw() -> None:
    engine = ScriptedEngine(lambda r: 8 if len(r.prompt_ids) == 2 else 7)

    def hinted(prompt: Prompt, fraction: float) -> tuple[int, ...]:
        return (*prompt.token_ids, 40 + int(100 * fraction))

    (group,) = sampler(plan.hinted((0.25, 0.5)), engine, hinted=hinted).groups(prompts(1), 0)
    assert {r.prompt_ids for r in group.rollouts} == {(5, 10, 65)}
    assert group.num_discarded_tokens == 8
    for s in sequences_of([group], build("ghpo", {}), 10):
        assert s.token_ids == (5, 10, 65, 7, 1)
        assert s.num_trained == 2


def test_a_plan_that_samples_nothing_has_an_empty_group() -> None:
    engine = ScriptedEngine(lambda r: 8)
    (group,) = sampler(lambda asked: Keep(), engine).groups(prompts(1), 0)
    assert (group.rollouts, engine.asked) == ((), [])
    assert sequences_of([group], build("paper", {}), 10) == []
    assert sampler(lambda asked: Keep(), engine).groups([], 0) == []


def test_failed_samples_after_a_prefix_are_unscored() -> None:
    engine = ScriptedEngine(lambda r: -1 if r.num_given else 8)
    (group,) = sampler(plan.one_prefix(lambda step: 0.5, 0.5), engine).groups(prompts(1), 0)
    assert group.rollouts[-1].completion_ids == ()
    assert group.scores[-1].verdict is Verdict.UNSCORED
    assert len(sequences_of([group], build("prefix_rft", {}), 10)) == 3


def test_a_prefix_leaves_room_for_a_token_of_its_own() -> None:
    engine = ScriptedEngine(lambda r: 8)
    once = plan._once(lambda asked: (Round(num_samples=1, kind=Kind.PREFIX, fraction=0.999),))
    (group,) = sampler(once, engine).groups(prompts(1), 0)
    assert group.rollouts[0].num_expert_tokens == len(TRACE) - 1


# ------------------------------------------------------------------------------------------- streams, buffers


def test_chord_s_stream_is_a_fifth_of_each_update() -> None:
    made = source("chord_mu", ScriptedEngine(lambda r: 8), {})
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(3):
        for part in made.take(step, Memory(), no_entropy).minibatches:
            kinds = Counter(s.kind for s in part)
            assert kinds == {Kind.ON: 8, Kind.DEMO: 2}
            assert len({s.group for s in part if s.kind is Kind.DEMO}) == 2
            seen.update(s.token_ids for s in part if s.kind is Kind.DEMO)
    assert set(seen.values()) == {2}  # twelve demonstrations, six problems: each twice


def test_relift_s_buffer_fills_and_empties() -> None:
    made = source("relift", ScriptedEngine(lambda r: 7 if r.problem_id == "p0" else 8), {"buffer_size": 5})
    memory = Memory()
    waits, updates = [], []
    for step in range(4):
        data = made.take(step, memory, no_entropy)
        assert {s.kind for s in flat(data.minibatches)} == {Kind.ON}
        memory = data.memory
        waits.append(len(memory.waiting))
        updates.append(0 if data.buffered is None else len(data.buffered))
        assert "p0" not in memory.waiting
    assert max(updates) == 5
    assert all(n in (0, 5) for n in updates)
    assert max(waits) < 5


def test_taking_a_step_twice_gives_the_same() -> None:
    """A step is a function of its number and the memory: an interrupted one leaves nothing behind."""
    for name, options in (("relift", {"buffer_size": 3}), ("exgrpo", {"replay_start": 0.0}), ("sasr", {})):
        made = source(name, ScriptedEngine(lambda r: 7 + (r.sample_index + r.step) % 2), options)
        row = build(name, options)
        memory = Memory(scalars=dict(row.controller.initial) if row.controller else {})
        for step in range(3):
            first, second = (made.take(step, memory, no_entropy) for _ in range(2))
            assert (first.minibatches, first.memory) == (second.minibatches, second.memory)
            memory = first.memory


def test_waiting_demonstrations_are_newest_first_and_wait_once() -> None:
    assert with_waiting(("a", "b"), ["c", "a"]) == ("a", "c", "b")


def rollout(name: str, *tokens: int) -> Rollout:
    engine = ScriptedEngine(lambda r: tokens[0])
    (group,) = sampler(plan.own, engine, samples=1).groups(prompts(1), 0)
    return group.rollouts[0]


def test_the_store_keeps_the_newest_and_retires_what_is_solved() -> None:
    right = rollout("p0", 7)
    store = remember({}, [seen_of("p0", 2, 4, [right, right])], most_stored=3)
    assert (store["p0"].num_correct, store["p0"].num_samples, len(store["p0"].rollouts)) == (2, 4, 2)
    store = remember(store, [seen_of("p0", 1, 4, [right] * 2)], most_stored=3)
    assert (store["p0"].num_correct, len(store["p0"].rollouts)) == (1, 3)
    store = remember(store, [seen_of("p0", 0, 4, [])], most_stored=3)
    assert store["p0"].num_correct == 0  # what it once solved is kept
    assert remember(store, [seen_of("p0", 4, 4, [right])], most_stored=3) == {}
    assert remember({}, [seen_of("p1", 0, 4, [])], most_stored=3) == {}


def test_replays_are_drawn_from_what_is_half_solved() -> None:
    store = {f"p{k}": Stored(num_correct=k, num_samples=8, rollouts=(rollout("p0", 7),)) for k in range(9)}
    spec = Replay(share=0.5, start=0.0, sigma=1.0, most_stored=8)
    names = [f"p{k}" for k in range(9)]
    counts = Counter(
        name for i in range(3000) for name in choose_replays(store, spec, 1, names, np.random.default_rng(i))
    )
    assert counts["p0"] == counts["p8"] == 0
    weights = {k: np.exp(-0.5 * (k - 4) ** 2) for k in range(1, 8)}
    for k, weight in weights.items():
        assert counts[f"p{k}"] / 3000 == pytest.approx(weight / sum(weights.values()), abs=0.04)
    assert len(choose_replays(store, spec, 99, names, np.random.default_rng(0))) == 7
    assert choose_replays({}, spec, 3, names, np.random.default_rng(0)) == []


def test_exgrpo_replays_the_sample_of_the_lowest_entropy() -> None:
    made = source("exgrpo", ScriptedEngine(lambda r: 7 if r.sample_index == 0 else 8), {"replay_start": 0.0})
    memory = made.take(0, Memory(), no_entropy).memory
    assert memory.replay_open
    asked: list[Any] = []

    def entropy_of(sequences: Sequence[TrainSequence]) -> tuple[list[float], Any]:
        asked.extend(sequences)
        return [float(-i) for i in range(len(sequences))], no_entropy([])[1]

    data = made.take(1, memory, entropy_of)
    replays = [s for s in flat(data.minibatches) if s.kind is Kind.REPLAY]
    assert len(replays) == 2  # half of four prompts
    assert len(asked) >= 2
    for s in replays:
        own = [x for x in flat(data.minibatches) if x.kind is Kind.ON and x.token_ids[:2] == s.token_ids[:2]]
        assert len(own) % 4 == 3  # it takes the place of one sample
        assert s.behavior_logprobs == (-0.5, -0.1)
    part = data.minibatches[0]
    assert sum(s.kind is Kind.REPLAY for s in part) == 1  # every mini-batch has its share
