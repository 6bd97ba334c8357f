"""Plans, gates, advantages and controllers: pure functions, checked on small cases by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from truestep.objective import advantage, controller, gate, plan, schedule
from truestep.objective.advantage import Members
from truestep.objective.methods import METHODS, build
from truestep.objective.plan import Asked, Keep, Outcome, Plan, Round
from truestep.records import Kind, RecordError

ON, DEMO, PREFIX, HINT, REPLAY = Kind.ON, Kind.DEMO, Kind.PREFIX, Kind.HINT, Kind.REPLAY
Judge = Callable[[Round, int], float]  # (round, sample) → its reward


def play(
    made: Plan, judge: Judge, *, samples: int = 8, **asked: object
) -> tuple[list[Round], tuple[int, ...]]:
    """All rounds that a plan asks for, and which of them it keeps."""
    history: list[Outcome] = []
    for _ in range(20):
        answer = made(Asked(step=0, num_samples=samples, history=tuple(history), **asked))  # type: ignore[arg-type]
        if isinstance(answer, Keep):
            rounds = [o.round for o in history]
            return rounds, answer.rounds or tuple(range(len(rounds)))
        history += [
            Outcome(round=r, rewards=tuple(judge(r, i) for i in range(r.num_samples))) for r in answer
        ]
    raise AssertionError("the plan has no end")


def never(asked: Round, sample: int) -> float:
    return 0.0


def always(asked: Round, sample: int) -> float:
    return 1.0


def shape(rounds: Sequence[Round]) -> list[tuple[Kind, int, float]]:
    return [(r.kind, r.num_samples, r.fraction) for r in rounds]


def test_plans_of_one_round() -> None:
    assert shape(play(plan.own, never)[0]) == [(ON, 8, 0.0)]
    assert shape(play(plan.with_demonstration, never)[0]) == [(ON, 7, 0.0), (DEMO, 1, 0.0)]
    assert shape(play(plan.beside_demonstration, never)[0]) == [(ON, 8, 0.0), (DEMO, 1, 0.0)]
    assert shape(play(plan.with_replay, never)[0]) == [(ON, 8, 0.0)]
    assert shape(play(plan.with_replay, never, has_replay=True)[0]) == [(ON, 7, 0.0), (REPLAY, 1, 0.0)]
    either = plan.one_or_the_other("imitate")
    assert shape(play(either, never, controls={"imitate": 1.0})[0]) == [(DEMO, 1, 0.0)]
    assert shape(play(either, never, controls={"imitate": 0.0})[0]) == [(ON, 8, 0.0)]


def test_a_prefix_is_uniform_between_its_bounds() -> None:
    made = plan.one_prefix(lambda step: 0.3, 0.95)
    lengths = [play(made, never, draw=u)[0][1].fraction for u in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(lengths, np.linspace(0.3, 0.95, 11))


def test_the_number_of_shown_parts_is_binomial() -> None:
    made = plan.shared_prefix(lambda step: 0.6, 5, 300)
    draws = (np.arange(2000) + 0.5) / 2000
    counts = Counter(round(5 * r.fraction) for u in draws for r in play(made, never, draw=u)[0])
    for k in range(6):
        expected = math.comb(5, k) * 0.6**k * 0.4 ** (5 - k)
        assert counts[k] / 2000 == pytest.approx(expected, abs=1e-3)


def test_trapo_guides_where_too_few_were_right() -> None:
    made = build("trapo", {}).plan
    assert made is not None
    assert shape(play(made, never)[0]) == [
        (ON, 4, 0.0),
        (PREFIX, 2, 0.25),
        (PREFIX, 1, 0.5),
        (PREFIX, 1, 1.0),
    ]
    assert shape(play(made, always)[0]) == [(ON, 4, 0.0), (ON, 2, 0.0), (ON, 1, 0.0), (ON, 1, 0.0)]
    two = shape(play(made, lambda r, i: float(r.num_samples == 4 and i < 2))[0])  # 2 of 4, then none
    assert two == [(ON, 4, 0.0), (ON, 2, 0.0), (PREFIX, 1, 0.5), (PREFIX, 1, 1.0)]
    for samples in range(2, 20):
        rounds, kept = play(made, never, samples=samples)
        assert sum(r.num_samples for r in rounds) == samples
        assert all(r.num_samples > 0 for r in rounds)
        assert kept == tuple(range(len(rounds)))


@pytest.mark.parametrize("needed", range(1, 10))
def test_bread_finds_the_shortest_prefix_that_helps(needed: int) -> None:
    """Half of the samples are right after at least ``needed`` tenths, all after eight."""

    def judge(asked: Round, sample: int) -> float:
        at = round(10 * asked.fraction)
        return 0.0 if at < needed else 1.0 if at >= 8 else float(sample % 2)

    made = build("bread", {}).plan
    assert made is not None
    rounds, kept = play(made, judge)
    assert len(rounds) <= 5
    assert all(r.expert_is_context for r in rounds[1:])
    # From eight tenths on all are right, which teaches nothing: no prefix is in the band then.
    assert kept == (0,) if needed >= 8 else rounds[kept[0]].fraction == needed / 10


def test_bread_and_ghpo_do_nothing_where_a_sample_is_right() -> None:
    for name in ("bread", "ghpo"):
        made = METHODS[name]().plan
        assert made is not None
        rounds, kept = play(made, lambda r, i: float(i == 3))
        assert (shape(rounds), kept) == ([(ON, 8, 0.0)], (0,))


def test_ghpo_shows_more_until_one_is_right() -> None:
    made = build("ghpo", {}).plan
    assert made is not None
    rounds, kept = play(made, lambda r, i: float(r.fraction >= 0.5))
    assert shape(rounds) == [(ON, 8, 0.0), (HINT, 8, 0.25), (HINT, 8, 0.5)]
    assert kept == (2,)
    assert play(made, never)[1] == (3,)


# --------------------------------------------------------------------------------------- gates and advantages


def members(rewards: Sequence[float | None], kinds: Sequence[Kind] = ()) -> Members:
    return Members(rewards=tuple(rewards), kinds=tuple(kinds) or (ON,) * len(rewards))


def test_members_are_aligned() -> None:
    with pytest.raises(RecordError):
        Members(rewards=(1.0,), kinds=())


def test_hpt_s_gate() -> None:
    kinds = (ON, ON, ON, DEMO)
    for most, solved, imitates in ((0, 0, True), (0, 1, False), (2, 2, True), (-1, 0, False), (3, 3, True)):
        rewards = [1.0] * solved + [0.0] * (3 - solved) + [1.0]
        keep = gate.imitate_where_unsolved(most)(members(rewards, kinds)).keep
        assert keep == ((False,) * 3 + (True,) if imitates else (True,) * 3 + (False,))
    unscored = gate.imitate_where_unsolved(0)(members([None, None, None, 1.0], kinds))
    assert not any(unscored.keep), "a failure is no wrong answer"
    partly = gate.imitate_where_unsolved(0)(members([None, 1.0, 0.0, None], kinds))
    assert partly.keep == (False, True, True, False)


def test_relift_s_gate() -> None:
    assert gate.push_unsolved(members([0.0, 0.0, None])).push_demonstration
    assert gate.push_unsolved(members([0.0, 0.0, None])).keep == (True, True, False)
    assert not gate.push_unsolved(members([0.0, 1.0])).push_demonstration
    assert not gate.push_unsolved(members([None, None])).push_demonstration


def test_a_demonstration_does_not_make_a_group_informative() -> None:
    assert members([0.0, 0.0, 1.0], (ON, ON, DEMO)).is_degenerate
    assert not members([0.0, 1.0, 1.0], (ON, ON, DEMO)).is_degenerate


def test_advantages() -> None:
    mixed = members([0.0] * 7 + [1.0], [ON] * 7 + [DEMO])
    np.testing.assert_allclose(np.array(advantage.group_mean(mixed), dtype=float), [-1 / 8] * 7 + [7 / 8])
    found = np.array(advantage.group_mean_std(mixed), dtype=float)
    np.testing.assert_allclose(found, [-0.3535] * 7 + [2.4748], atol=1e-3)
    assert advantage.own_mean(members([0.0, 1.0, None, 1.0], [ON, ON, ON, DEMO])) == [-0.5, 0.5, None, 0.0]
    assert advantage.own_mean_std(members([1.0, None], [ON, DEMO])) == [0.0, 0.0]
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
            any(r.kind in (DEMO, PREFIX, HINT) for r in rounds)
            or bool(made.stream_share)
            or made.buffer is not None
        )
        assert uses == made.needs_demonstrations, name
