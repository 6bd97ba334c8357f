"""Buffers and stored samples, and the groups that a plan's rounds become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from test_source import SAMPLING, Entropies, ScriptedEngine, prompts

from truestep.objective import plan
from truestep.objective.methods import Method, build
from truestep.objective.methods.row import Replay
from truestep.objective.plan import Done, Plan
from truestep.records import (
    NOT_SAMPLED,
    Group,
    Message,
    Origin,
    Prompt,
    RewardInput,
    Rollout,
    Round,
    Score,
    Stop,
    TrainSequence,
    Verdict,
    judged,
)
from truestep.rollout.sample import Sampler
from truestep.train import sequences
from truestep.train import source as source_module
from truestep.train.memory import (
    Memory,
    Stored,
    choose_replays,
    first_memory,
    remember,
    seen_of,
    with_waiting,
)
from truestep.train.metrics import Meter, of_groups
from truestep.train.order import Order
from truestep.train.parallel import Ranks
from truestep.train.sequences import group_ledger
from truestep.train.source import RolloutSource

TRACE = (7, 3, 4, 5, 1)


def score(inputs: Sequence[RewardInput]) -> list[Score]:
    return [judged(Verdict.CORRECT if "7" in i.completion else Verdict.INCORRECT) for i in inputs]


def sequences_of(groups: Sequence[Group], method: Method, limit: int = 10) -> list[TrainSequence]:
    return sequences.sequences_of([sequences.gated(g, method, 1.0) for g in groups], method, limit)


def sampler(made: plan.Plan, engine: ScriptedEngine, samples: int = 4, **more: Any) -> Sampler:
    return Sampler(
        engine=engine, plan=made, sampling=SAMPLING, samples_per_prompt=samples,
        decode=lambda ids: " ".join(map(str, ids)), score=score, seed=3,
        demonstrations={f"p{i}": TRACE for i in range(9)}, **more,
    )  # fmt: skip


def source(
    method: str, engine: ScriptedEngine, options: dict[str, Any], *, per_step: int = 4
) -> RolloutSource:
    row = build(method, options)
    assert row.plan is not None
    return RolloutSource(
        Order((prompts(6),)), sampler=sampler(row.plan, engine), scorer=Entropies(), method=row,  # type: ignore[arg-type]
        prompts_per_step=per_step, updates_per_step=2, decode_prompt=lambda p: "?",
    )  # fmt: skip


def only_origin(sequence: TrainSequence) -> Origin:
    """Where all its trained tokens come from."""
    (origin,) = set(sequence.origin) - {Origin.CONTEXT}
    return origin


def flat(minibatches: Sequence[Sequence[TrainSequence]]) -> list[TrainSequence]:
    return [s for part in minibatches for s in part]


# ------------------------------------------------------------------------------------------- rounds of samples


def test_a_prefix_is_given_and_continued() -> None:
    engine = ScriptedEngine(lambda r: 8)
    made = plan.one_prefix(lambda step: 0.7, 0.7)
    (group,) = sampler(made, engine).groups(prompts(1), 0)
    assert [r.member for r in group.rollouts] == [Origin.POLICY] * 4  # its end is the policy's
    assert [r.round.is_plain for r in group.rollouts] == [True] * 3 + [False]
    last = group.rollouts[-1]
    assert last.completion_ids == (7, 3, 4, 8, 1)
    assert last.origin == (Origin.EXPERT,) * 3 + (Origin.POLICY,) * 2
    assert last.policy_version == (NOT_SAMPLED,) * 3 + (0, 0)
    assert group.scores[-1].verdict is Verdict.CORRECT  # the whole completion is judged
    asked = engine.asked[-1]
    assert (asked.prompt_ids, asked.num_given) == ((5, 10, 7, 3, 4), 3)
    (sequence,) = [s for s in sequences_of([group], build("prefix_rft", {})) if s.origin.count(Origin.EXPERT)]
    assert (sequence.token_ids, sequence.num_trained) == ((5, 10, 7, 3, 4, 8, 1), 5)
    assert sequence.origin == (Origin.CONTEXT,) * 2 + (Origin.EXPERT,) * 3 + (Origin.POLICY,) * 2
    assert sequence.behavior_logprobs == (0.0, 0.0, 0.0, -0.5, -0.1)


def test_a_prefix_as_context_is_not_trained() -> None:
    engine = ScriptedEngine(lambda r: 8 if r.num_given == 0 else 7 + r.sample_index % 2)
    traces = {"p0": (3, 4, 5, 6, 1)}  # without the right answer's token, so that the policy decides
    made = replace(sampler(plan.anchored(4, 0.01, 0.99), engine), demonstrations=traces)
    (group,) = made.groups(prompts(1), 0)
    num = group.rollouts[0].origin.count(Origin.CONTEXT)
    assert num > 0
    assert all(r.origin == (Origin.CONTEXT,) * num + (Origin.POLICY,) * 2 for r in group.rollouts)
    assert all(r.completion_ids[:num] == traces["p0"][:num] for r in group.rollouts)
    kept = sequences_of([group], build("bread", {}))
    assert len(kept) == 4
    for s in kept:
        assert s.origin.count(Origin.EXPERT) == 0
        assert s.num_trained == 2
        assert s.num_prefix_tokens == 2 + num  # all of it is shared with the others
        assert s.behavior_logprobs == (-0.5, -0.1)
    # The group is that of one round; what other rounds sampled is counted as work.
    assert len(group.rollouts) == 4
    ledger = group_ledger([group], [kept])
    assert ledger.rollout_tokens == 2 * len(engine.asked)
    assert ledger.rollout_trained_tokens == 8


def test_a_whole_demonstration_is_not_generated() -> None:
    engine = ScriptedEngine(lambda r: 8)
    (group,) = sampler(plan.with_demonstration, engine).groups(prompts(1), 0)
    assert [r.member for r in group.rollouts] == [Origin.POLICY] * 3 + [Origin.EXPERT]
    assert group.rollouts[-1].behavior_logprobs is None
    assert len(engine.asked) == 3
    assert group.rollouts[-1].completion_ids == TRACE
    assert group.scores[-1].verdict is Verdict.CORRECT  # it is judged like a sample
    sequences = sequences_of([group], build("luffy", {}))
    assert [s.advantage for s in sequences] == [-0.25] * 3 + [0.75]
    ledger = group_ledger([group], [sequences])
    assert (ledger.rollout_tokens, ledger.rollout_trained_tokens, ledger.demonstration_tokens) == (6, 6, 5)


def test_hinted_samples_are_trained_under_the_prompt_that_they_saw() -> None:
    engine = ScriptedEngine(lambda r: 8 if len(r.prompt_ids) == 2 else 7)

    def hinted(prompt: Prompt, fraction: float) -> tuple[tuple[Message, ...], tuple[int, ...]]:
        return prompt.problem.messages, (*prompt.token_ids, 40 + int(100 * fraction))

    (group,) = sampler(plan.hinted((0.25, 0.5)), engine, hinted=hinted).groups(prompts(1), 0)
    assert {r.prompt_ids for r in group.rollouts} == {(5, 10, 65)}
    assert group.num_discarded_tokens == 8
    for s in sequences_of([group], build("ghpo", {})):
        assert s.token_ids == (5, 10, 65, 7, 1)
        assert s.num_trained == s.origin.count(Origin.POLICY) == 2


def test_a_plan_that_samples_nothing_has_an_empty_group() -> None:
    engine = ScriptedEngine(lambda r: 8)
    (group,) = sampler(Plan(next_rounds=lambda state: Done()), engine).groups(prompts(1), 0)
    assert (group.rollouts, engine.asked) == ((), [])
    assert sequences_of([group], build("grpo_token_mean", {})) == []
    assert sampler(Plan(next_rounds=lambda state: Done()), engine).groups([], 0) == []


def test_failed_samples_after_a_prefix_are_unscored() -> None:
    engine = ScriptedEngine(lambda r: -1 if r.num_given else 8)
    (group,) = sampler(plan.one_prefix(lambda step: 0.5, 0.5), engine).groups(prompts(1), 0)
    assert group.rollouts[-1].completion_ids == ()
    assert group.rollouts[-1].member is Origin.POLICY
    assert group.scores[-1].verdict is Verdict.UNSCORED
    assert len(sequences_of([group], build("prefix_rft", {}))) == 3
    meter = Meter()
    of_groups(meter, [sequences.gated(group, build("prefix_rft", {}), 1.0)])
    assert meter.reduce(Ranks())["unscored"] == 1 / 4  # it is an own sample that failed


def test_a_prefix_leaves_room_for_a_token_of_its_own() -> None:
    engine = ScriptedEngine(lambda r: 8)
    once = plan._once(lambda state: (Round(num_samples=1, prefix=0.999),))
    (group,) = sampler(once, engine).groups(prompts(1), 0)
    assert group.rollouts[0].origin.count(Origin.EXPERT) == len(TRACE) - 1


# ------------------------------------------------------------------------------------------- streams, buffers


def test_chord_s_stream_is_a_fifth_of_each_update() -> None:
    made = source("chord_mu", ScriptedEngine(lambda r: 8), {})
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(3):
        for part in made.take(step, Memory()).minibatches:
            origins = Counter(only_origin(s) for s in part)
            assert origins == {Origin.POLICY: 8, Origin.EXPERT: 2}
            assert len({s.group for s in part if s.origin.count(Origin.EXPERT)}) == 2
            seen.update(s.token_ids for s in part if s.origin.count(Origin.EXPERT))
    assert set(seen.values()) == {2}  # twelve demonstrations, six problems: each twice


def test_relift_s_buffer_fills_and_empties() -> None:
    made = source("relift", ScriptedEngine(lambda r: 7 if r.problem_id == "p0" else 8), {"buffer_size": 5})
    memory = Memory()
    waits, updates = [], []
    for step in range(4):
        data = made.take(step, memory)
        assert {only_origin(s) for s in flat(data.minibatches)} == {Origin.POLICY}
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
        memory = first_memory(build(name, options))
        for step in range(3):
            first, second = (made.take(step, memory) for _ in range(2))
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
    spec = Replay(share=0.5, start=0.0, sigma=1.5, most_stored=8)
    names = [f"p{k}" for k in range(9)]
    counts = Counter(
        name for i in range(3000) for name in choose_replays(store, spec, 1, names, np.random.default_rng(i))
    )
    assert counts["p0"] == counts["p8"] == 0
    weights = {k: np.exp(-0.5 * ((k - 4) / 1.5) ** 2) for k in range(1, 8)}
    for k, weight in weights.items():
        assert counts[f"p{k}"] / 3000 == pytest.approx(weight / sum(weights.values()), abs=0.04)
    assert len(choose_replays(store, spec, 99, names, np.random.default_rng(0))) == 7
    assert choose_replays({}, spec, 3, names, np.random.default_rng(0)) == []


def test_the_store_does_not_depend_on_which_rank_had_a_problem() -> None:
    class Reversed(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value[::-1]]

    stores = []
    for ranks in (Ranks(), Reversed()):
        engine = ScriptedEngine(lambda r: 7 if r.sample_index == 0 else 8)
        made = source("exgrpo", engine, {"replay_start": 0.0}, per_step=8)  # two problems occur twice
        made.ranks = ranks
        stores.append(list(made.take(0, Memory()).memory.replay.items()))
    assert len(stores[0]) == 6
    assert stores[0] == stores[1]


def test_exgrpo_replays_the_sample_of_the_lowest_entropy() -> None:
    made = source("exgrpo", ScriptedEngine(lambda r: 7 if r.sample_index == 0 else 8), {"replay_start": 0.0})
    memory = made.take(0, Memory()).memory
    assert memory.replay_open
    data = made.take(1, memory)
    replays = [s for s in flat(data.minibatches) if s.origin.count(Origin.STORED)]
    assert len(replays) == 2  # half of four prompts
    asked = cast(Entropies, made.scorer).asked
    assert len(asked) >= 2
    assert {only_origin(s) for s in asked + replays} == {Origin.STORED}
    assert {s.policy_version for s in replays} == {(0, 0)}
    for s in replays:
        own = [
            x
            for x in flat(data.minibatches)
            if x.origin.count(Origin.POLICY) and x.token_ids[:2] == s.token_ids[:2]
        ]
        assert len(own) % 4 == 3  # it takes the place of one sample
        assert s.behavior_logprobs == (-0.5, -0.1)
    part = data.minibatches[0]
    assert sum(s.origin.count(Origin.STORED) > 0 for s in part) == 1  # every mini-batch has its share


def test_only_finished_right_samples_of_a_plain_round_are_stored() -> None:
    """A hinted sample is the policy's and yet not stored: it was sampled under another prompt. Nor is one that
    continues a prefix, a demonstration, or a stored sample that was used again."""
    method = build("exgrpo", {})
    engine = ScriptedEngine(lambda r: 7)
    hints: Any = lambda prompt, fraction: (prompt.problem.messages, (*prompt.token_ids, 40))  # noqa: E731
    rounds = {
        "plain": Round(num_samples=2),
        "hint": Round(num_samples=2, hint=0.5),
        "prefix": Round(num_samples=2, prefix=0.5),
        "context": Round(num_samples=2, prefix=0.5, prefix_origin=Origin.CONTEXT),
        "demonstration": plan.DEMONSTRATION,
    }
    kept = {}
    for name, asked in rounds.items():
        once = plan._once(lambda state, asked=asked: (asked,))
        (group,) = sampler(once, engine, hinted=hints).groups(prompts(1), 0)
        assert all(r.member is Origin.POLICY for r in group.rollouts) == (name != "demonstration")
        _, num_solved, num_scored, right = source_module._seen(sequences.gated(group, method, 1.0))
        kept[name] = (num_solved, num_scored, len(right))
    assert kept.pop("plain") == (2, 2, 2)
    assert set(kept.values()) == {(0, 0, 0)}

    (group,) = sampler(plan.with_replay, engine).groups(prompts(1), 0, stored={0: rollout("p0", 7)})
    assert group.rollouts[-1].round.stored
    assert len(source_module._seen(sequences.gated(group, method, 1.0))[3]) == 3

    cut = replace(group.rollouts[0], stop=Stop.LENGTH)  # right, and not finished
    group = replace(group, rollouts=(cut, *group.rollouts[1:]))
    assert source_module._seen(sequences.gated(group, method, 1.0))[1:3] == (3, 3)
    assert len(source_module._seen(sequences.gated(group, method, 1.0))[3]) == 2


def test_a_stored_sample_is_stored_by_its_policy_and_used_as_stored() -> None:
    engine = ScriptedEngine(lambda r: 7)
    engine.policy_version = 4
    (group,) = sampler(plan.own, engine).groups(prompts(1), 0)
    store = remember({}, [seen_of("p0", 1, 4, group.rollouts[:1])], most_stored=3)
    (kept,) = store["p0"].rollouts
    assert (kept.origin, kept.policy_version) == ((Origin.STORED,) * 2, (4, 4))
    assert kept.behavior_logprobs == (-0.5, -0.1)
    (group,) = sampler(plan.with_replay, engine).groups(prompts(1), 1, stored={0: kept})
    assert [r.member for r in group.rollouts] == [Origin.POLICY] * 3 + [Origin.STORED]
    (stored,) = [s for s in sequences_of([group], build("exgrpo", {})) if s.origin.count(Origin.STORED)]
    assert (stored.policy_version, stored.behavior_logprobs) == ((4, 4), (-0.5, -0.1))
