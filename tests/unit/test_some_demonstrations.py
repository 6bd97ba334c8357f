"""Methods that need demonstrations, if only some of a stage's data sets have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_buffers import TRACE, sampler
from test_source import Entropies, ScriptedEngine, prompts

from truestep.errors import UserError
from truestep.objective import plan
from truestep.objective.advantage import GroupView
from truestep.objective.gate import imitate_where_unsolved
from truestep.objective.methods import METHODS, build
from truestep.records import Origin, Prompt
from truestep.settings import parse_settings
from truestep.train.memory import first_memory
from truestep.train.order import Order
from truestep.train.source import RolloutSource

GUIDED = [name for name in METHODS if build(name, {}).plan and build(name, {}).needs_demonstrations]
OPTIONS: dict[str, dict[str, Any]] = {"relift": {"buffer_size": 2}}
POOL = [replace(p, data="pool", problem=replace(p.problem, id=f"pool/{p.problem.id}")) for p in prompts(6)]
TRAIN = [replace(p, data="train", problem=replace(p.problem, id=f"train/{p.problem.id}")) for p in prompts(3)]


def source(method: str, engine: ScriptedEngine) -> RolloutSource:
    row = build(method, OPTIONS.get(method, {}))
    assert row.plan is not None
    order: Order[Prompt] = Order((POOL, TRAIN), (3.0, 1.0), ("pool", "train"))
    made = replace(
        sampler(row.plan, engine, unguided=frozenset({"pool"})),
        demonstrations={p.problem.id: TRACE for p in TRAIN},
        hinted=lambda p, share: (p.problem.messages, (*p.token_ids, 9)),
    )
    return RolloutSource(
        order, sampler=made, scorer=Entropies(), method=row, prompts_per_step=8, updates_per_step=2,
        decode_prompt=lambda p: "?",
    )  # fmt: skip


@pytest.mark.parametrize("solves", [False, True])
@pytest.mark.parametrize("method", GUIDED)
def test_only_the_sets_that_are_named_use_demonstrations(method: str, solves: bool) -> None:
    engine = ScriptedEngine(lambda r: 7 if solves and r.sample_index % 2 else 8)
    made, expert = source(method, engine), 0
    memory = first_memory(made.method)
    for step in range(6):
        for group in made.sampled(step, memory).everything:
            is_pool = group.group.prompt.data == "pool"
            assert not is_pool or {r.member for r in group.group.rollouts} == {Origin.POLICY}
            assert not is_pool or all(r.round.is_plain for r in group.group.rollouts)
            assert not is_pool or any(group.decision.keep)
        data = made.take(step, memory)
        memory = data.memory
        assert all(name.startswith("train/") for name in memory.waiting)
        trained = [s for part in data.minibatches for s in part] + list(data.buffered or ())
        expert += sum(s.origin.count(Origin.EXPERT) for s in trained)
    guides = {"bread", "ghpo"}  # these train on no token of a demonstration
    only_unsolved = {"hpt", "relift", "super_rl"}
    if not solves or method not in only_unsolved:
        assert (expert > 0) == (method not in guides)


@pytest.mark.parametrize("method", ["luffy", "prefix_rft", "ghpo"])
def test_other_prompts_have_the_samples_of_plain_rl(method: str) -> None:
    engine = ScriptedEngine(lambda r: 7 + r.sample_index % 2)
    made = source(method, engine).sampler
    plain = replace(made, plan=plan.own)
    assert made.groups(POOL, 2) == plain.groups(POOL, 2)


def test_a_group_without_a_demonstration_is_not_imitated() -> None:
    origins = (Origin.POLICY, Origin.POLICY)
    unsolved = GroupView(rewards=(0.0, 0.0), solved=(False, False), origins=origins)
    assert imitate_where_unsolved(0)(unsolved).keep == (True, True)
    with_one = GroupView(rewards=(0.0, 1.0), solved=(False, True), origins=(Origin.POLICY, Origin.EXPERT))
    assert imitate_where_unsolved(0)(with_one).keep == (False, True)


def test_a_set_that_the_stage_does_not_have_is_refused() -> None:
    recipe: dict[str, Any] = {
        "name": "x", "model": {"path": "tiny"}, "data": {"a": {"source": "a.jsonl"}, "b": {"source": "b.jsonl"}},
        "stages": [{
            "kind": "rl", "data": [{"name": "a"}, {"name": "b"}], "steps": 1, "prompts_per_step": 2, "method": "luffy",
            "tokens_per_microbatch": 64, "optimizer": {"lr": 1e-3}, "sampling": {"max_new_tokens": 8},
            "demonstrations": ["a"],
        }],
    }  # fmt: skip
    stage = parse_settings(recipe, where="run.toml").stages[0]
    assert stage.kind == "rl"
    assert stage.guided == ("a",)
    recipe["stages"][0]["demonstrations"] = ["c"]
    with pytest.raises(UserError, match="demonstrations: c is not a data set of the stage; use a, b"):
        parse_settings(recipe, where="run.toml")
