"""Plans, gates, advantages and controllers: pure functions, checked on small cases by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from truestep.objective import advantage, controller, gate, plan, schedule
from truestep.objective.advantage import GroupView
from truestep.objective.methods import METHODS, build
from truestep.objective.methods.row import DemonstrationBuffer, Stream
from truestep.objective.plan import Done, Plan, PlanState, RoundResult
from truestep.records import Origin, RecordError, Round

OWN, EXPERT, STORED = Origin.POLICY, Origin.EXPERT, Origin.STORED
Judge = Callable[[Round, int], bool | None]  # (round, sample) → whether it solves the problem


def play(
    made: Plan, judge: Judge, *, samples: int = 8, **asked: object
) -> tuple[list[Round], tuple[int, ...]]:
    """All rounds that a plan asks for, and which of them it keeps."""
    history: list[RoundResult] = []
    for _ in range(20):
        answer = made(PlanState(step=0, num_samples=samples, history=tuple(history), **asked))  # type: ignore[arg-type]
        if isinstance(answer, Done):
            rounds = [o.round for o in history]
            return rounds, answer.rounds or tuple(range(len(rounds)))
        history += [
            RoundResult(round=r, solved=tuple(judge(r, i) for i in range(r.num_samples))) for r in answer
        ]
    raise AssertionError("the plan has no end")


def never(asked: Round, sample: int) -> bool:
    return False


def always(asked: Round, sample: int) -> bool:
    return True


def shape(rounds: Sequence[Round]) -> list[tuple[str, int, float]]:
    """What each round begins with, its number of samples, and how much of the demonstration or solution it shows."""
    found = []
    for r in rounds:
        assert [bool(r.prefix), bool(r.hint), r.stored, r.is_plain].count(True) == 1
        name = "prefix" if r.prefix else "hint" if r.hint else "stored" if r.stored else "own"
        found.append((name, r.num_samples, r.prefix or r.hint))
    return found


def test_plans_of_one_round() -> None:
    assert shape(play(plan.own, never)[0]) == [("own", 8, 0.0)]
    assert shape(play(plan.with_demonstration, never)[0]) == [("own", 7, 0.0), ("prefix", 1, 1.0)]
    assert shape(play(plan.beside_demonstration, never)[0]) == [("own", 8, 0.0), ("prefix", 1, 1.0)]
    assert shape(play(plan.with_replay, never)[0]) == [("own", 8, 0.0)]
    assert shape(play(plan.with_replay, never, has_stored=True)[0]) == [("own", 7, 0.0), ("stored", 1, 0.0)]
    either = plan.one_or_the_other("imitate")
    assert shape(play(either, never, controls={"imitate": 1.0})[0]) == [("prefix", 1, 1.0)]
    assert shape(play(either, never, controls={"imitate": 0.0})[0]) == [("own", 8, 0.0)]


def test_a_prefix_is_uniform_between_its_bounds() -> None:
    made = plan.one_prefix(lambda step: 0.3, 0.95)
    lengths = [play(made, never, draw=u)[0][1].prefix for u in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(lengths, np.linspace(0.3, 0.95, 11))


def test_the_number_of_shown_parts_is_binomial() -> None:
    made = plan.shared_prefix(lambda step: 0.6, 5, 300)
    draws = (np.arange(2000) + 0.5) / 2000
    counts = Counter(round(5 * r.prefix) for u in draws for r in play(made, never, draw=u)[0])
    for k in range(6):
        expected = math.comb(5, k) * 0.6**k * 0.4 ** (5 - k)
        assert counts[k] / 2000 == pytest.approx(expected, abs=1e-3)


def test_trapo_guides_where_too_few_were_right() -> None:
    made = build("trapo", {}).plan
    assert made is not None
    assert shape(play(made, never)[0]) == [
        ("own", 4, 0.0),
        ("prefix", 2, 0.25),
        ("prefix", 1, 0.5),
        ("prefix", 1, 1.0),
    ]
    assert shape(play(made, always)[0]) == [
        ("own", 4, 0.0),
        ("own", 2, 0.0),
        ("own", 1, 0.0),
        ("own", 1, 0.0),
    ]
    two = shape(play(made, lambda r, i: r.num_samples == 4 and i < 2)[0])  # 2 of 4, then none
    assert two == [("own", 4, 0.0), ("own", 2, 0.0), ("prefix", 1, 0.5), ("prefix", 1, 1.0)]
    for level, (sampled, least) in enumerate(
        ((12, 6), (18, 12), (21, 21)), start=1
    ):  # 1/2, 2/3 and all of 24
        for solved, prefix in ((least, 0.0), (least - 1, (0.25, 0.5, 1.0)[level - 1])):
            left = iter([True] * solved + [False] * 24)
            rounds, _ = play(made, lambda r, i, left=left: next(left), samples=24)
            assert sum(r.num_samples for r in rounds[:level]) == sampled
            assert rounds[level].prefix == prefix, (level, solved)
    for samples in range(2, 20):
        rounds, kept = play(made, never, samples=samples)
        assert sum(r.num_samples for r in rounds) == samples
        assert all(r.num_samples > 0 for r in rounds)
        assert kept == tuple(range(len(rounds)))


@pytest.mark.parametrize("needed", range(1, 10))
def test_bread_finds_the_shortest_prefix_that_helps(needed: int) -> None:
    """Half of the samples are right after at least ``needed`` tenths, all after eight."""

    def judge(asked: Round, sample: int) -> bool:
        at = round(10 * asked.prefix)
        return False if at < needed else True if at >= 8 else bool(sample % 2)

    made = build("bread", {}).plan
    assert made is not None
    rounds, kept = play(made, judge)
    assert len(rounds) <= 5
    assert all(r.prefix_origin is Origin.CONTEXT for r in rounds[1:])
    # From eight tenths on all are right, which teaches nothing: no prefix is in the band then.
    assert kept == (0,) if needed >= 8 else rounds[kept[0]].prefix == needed / 10


def test_bread_and_ghpo_do_nothing_where_a_sample_is_right() -> None:
    for name in ("bread", "ghpo"):
        made = METHODS[name]().plan
        assert made is not None
        rounds, kept = play(made, lambda r, i: i == 3)
        assert (shape(rounds), kept) == ([("own", 8, 0.0)], (0,))


def test_ghpo_shows_more_until_one_is_right() -> None:
    made = build("ghpo", {}).plan
    assert made is not None
    rounds, kept = play(made, lambda r, i: r.hint >= 0.5)
    assert shape(rounds) == [("own", 8, 0.0), ("hint", 8, 0.25), ("hint", 8, 0.5)]
    assert kept == (2,)
    assert play(made, never)[1] == (3,)


# --------------------------------------------------------------------------------------- gates and advantages


def members(rewards: Sequence[float | None], origins: Sequence[Origin] = ()) -> GroupView:
    """A group whose members solve the problem if their reward is 1."""
    return GroupView(
        rewards=tuple(rewards),
        solved=tuple(None if r is None else r == 1 for r in rewards),
        origins=tuple(origins) or (OWN,) * len(rewards),
    )


def test_members_are_aligned() -> None:
    for solved, origins in (((True,), ()), ((), (OWN,))):
        with pytest.raises(RecordError):
            GroupView(rewards=(1.0,), solved=solved, origins=origins)


def test_gates_ask_who_solved_the_problem_and_not_for_its_reward() -> None:
    """A reward of several parts says nothing about truth: only ``solved`` decides about imitation."""
    cheap = GroupView(rewards=(3.0, 2.0, 0.1), solved=(False, False, True), origins=(OWN, OWN, EXPERT))
    assert gate.imitate_where_unsolved(0)(cheap).keep == (False, False, True)
    assert gate.push_unsolved(cheap).push_demonstration
    dear = GroupView(rewards=(-3.0, 0.0, 0.0), solved=(True, False, False), origins=(OWN, OWN, EXPERT))
    assert gate.imitate_where_unsolved(0)(dear).keep == (True, True, False)
    assert not gate.push_unsolved(dear).push_demonstration


def test_a_demonstration_without_a_score_is_kept_and_a_stored_sample_is_not() -> None:
    group = members([1.0, None, None, None], (OWN, OWN, EXPERT, STORED))
    assert gate.keep_scored(group).keep == (True, False, True, False)


def test_stored_samples_and_demonstrations_are_not_own() -> None:
    group = members([1.0, 0.0, 1.0, None], (STORED, OWN, EXPERT, OWN))
    assert (group.own, group.own_solved, group.is_own) == ([0.0], [False], [False, True, False, True])
    assert group.scored == [1.0, 0.0, 1.0]


def test_hpt_s_gate() -> None:
    origins = (OWN, OWN, OWN, EXPERT)
    for most, solved, imitates in ((0, 0, True), (0, 1, False), (2, 2, True), (-1, 0, False), (3, 3, True)):
        rewards = [1.0] * solved + [0.0] * (3 - solved) + [1.0]
        keep = gate.imitate_where_unsolved(most)(members(rewards, origins)).keep
        assert keep == ((False,) * 3 + (True,) if imitates else (True,) * 3 + (False,))
    unscored = gate.imitate_where_unsolved(0)(members([None, None, None, 1.0], origins))
    assert not any(unscored.keep), "a failure is no wrong answer"
    partly = gate.imitate_where_unsolved(0)(members([None, 1.0, 0.0, None], origins))
    assert partly.keep == (False, True, True, False)


def test_relift_s_gate() -> None:
    assert gate.push_unsolved(members([0.0, 0.0, None])).push_demonstration
    assert gate.push_unsolved(members([0.0, 0.0, None])).keep == (True, True, False)
    assert not gate.push_unsolved(members([0.0, 1.0])).push_demonstration
    assert not gate.push_unsolved(members([None, None])).push_demonstration


def test_a_demonstration_does_not_make_a_group_informative() -> None:
    assert members([0.0, 0.0, 1.0], (OWN, OWN, EXPERT)).is_degenerate
    assert not members([0.0, 1.0, 1.0], (OWN, OWN, EXPERT)).is_degenerate


def test_advantages() -> None:
    mixed = members([0.0] * 7 + [1.0], [OWN] * 7 + [EXPERT])
    np.testing.assert_allclose(np.array(advantage.group_mean(mixed), dtype=float), [-1 / 8] * 7 + [7 / 8])
    found = np.array(advantage.group_mean_std(mixed), dtype=float)
    np.testing.assert_allclose(found, [-0.3535] * 7 + [2.4748], atol=1e-3)
    assert advantage.own_mean(members([0.0, 1.0, None, 1.0], [OWN, OWN, OWN, EXPERT])) == [
        -0.5,
        0.5,
        None,
        0.0,
    ]
    assert advantage.own_mean_std(members([1.0, None], [OWN, EXPERT])) == [0.0, 0.0]
    np.testing.assert_allclose(
        np.array(advantage.leave_one_out(members([1.0, 0.0, 0.0])), dtype=float), [1.0, -0.5, -0.5]
    )
    assert advantage.leave_one_out(members([1.0, None])) == [0.0, None]
    assert advantage.raw_reward(members([1.0, None, 0.0])) == [1.0, None, 0.0]


def test_unscored_members_never_have_an_advantage() -> None:
    for name, row in METHODS.items():
        found = row().advantage(members([1.0, None, 0.0, 0.0]))
        assert [a is None for a in found] == [False, True, False, False], name


# ------------------------------------------------------------------------------------- controllers, schedules


def test_sasr_s_phases() -> None:
    made = controller.phases(gamma=0.5, warmup_steps=2)
    state = made.initial
    for step, norm in enumerate((4.0, 2.0)):
        values = made.decide(state, step, 0.999)
        assert values["imitate"] == 1.0
        state = made.learn(state, step, values, {"grad_norm": norm})
    assert state == {"norm": 2.0, "warmup_norm": 2.0}
    assert made.decide(state, 2, 0.0)["share"] == pytest.approx(2 / 3)
    assert [made.decide(state, 2, u)["imitate"] for u in (0.66, 0.67)] == [1.0, 0.0]
    after_rl = made.learn(state, 2, {"imitate": 0.0}, {"grad_norm": 9.0})
    assert after_rl == state
    fitted = made.learn(state, 3, {"imitate": 1.0}, {"grad_norm": 0.1})
    assert made.decide(fitted, 4, 0.0)["share"] == pytest.approx(0.1 / (0.1 + 0.5 * 2.0))


def test_learned_weights_settle_where_their_loss_is_flat() -> None:
    """σ* = ½·log 2L; a loss that is not there moves nothing; σ does not fall below its bound."""
    made = controller.learned_weights(policy="p", imitation="i", rate=0.1, least=-2.0)
    state = made.initial
    assert dict(made.decide(state, 0, 0.0)) == {"policy": 1.0, "imitation": math.exp(-2)}
    for step in range(500):
        state = made.learn(state, step, made.decide(state, step, 0.0), {"i": 3.0})
    assert state["imitation"] == pytest.approx(0.5 * math.log(6.0), abs=1e-6)
    assert state["policy"] == 0.0
    for step in range(100):
        state = made.learn(state, step, made.decide(state, step, 0.0), {"p": -1.0})
    assert state["policy"] == -2.0


def test_chord_s_schedule() -> None:
    mu = schedule.warmed_cosine(valley=0.02, peak=0.5, warmup_steps=200, decay_steps=400)
    assert [mu(s) for s in (0, 100, 200)] == pytest.approx([0.0, 0.25, 0.5])
    assert mu(400) == pytest.approx(0.26)
    assert [mu(s) for s in (600, 10_000)] == pytest.approx([0.02, 0.02])
    assert schedule.warmed_cosine(valley=0.0, peak=0.9, warmup_steps=0, decay_steps=10)(0) == 0.9


def test_rows_that_ask_for_demonstrations_say_so() -> None:
    """A plan, a stream or a buffer that uses one is declared, so that its lack is found before a model is
    built."""
    for name, row in METHODS.items():
        made = row()
        if made.plan is None:
            continue
        controls = {"imitate": 1.0}
        rounds = play(made.plan, never, controls=controls, draw=0.9)[0]
        uses = (
            any(r.prefix or r.hint for r in rounds)
            or made.part(Stream) is not None
            or made.part(DemonstrationBuffer) is not None
        )
        assert uses == made.needs_demonstrations, name
