"""The random reward: a fair coin that no text can move, the same one after a resume and on any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))

from test_source import SAMPLING, ScriptedEngine, prompts

from truestep.objective import plan
from truestep.records import Prompt
from truestep.reward_settings import reward_entries
from truestep.rewards.scorer import RewardScorer
from truestep.rollout.sample import Sampler

PROMPTS = prompts(50)
Rewards = dict[tuple[str, int], float | None]  # by problem and sample


@pytest.fixture
def coin(tmp_path: Path) -> RewardScorer:
    """As a stage with reward = "random" makes it; it asks no checker."""
    return RewardScorer(
        reward_entries("random", ()), grade=lambda pairs: 1 / 0, base=tmp_path, folder=tmp_path / "rewards"
    )


def rewards(
    coin: RewardScorer, given: list[Prompt] = PROMPTS, *, step: int = 0, seed: int = 3, token: int = 7
) -> Rewards:
    """What one rank's rollout of these prompts is worth."""
    sampler = Sampler(
        engine=ScriptedEngine(lambda request: token),
        plan=plan.own,
        sampling=SAMPLING,
        samples_per_prompt=8,
        decode=lambda ids: " ".join(map(str, ids)),
        score=coin.score,
        seed=seed,
    )
    return {
        (rollout.problem_id, rollout.sample_index): score.reward
        for group in sampler.groups(given, step)
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
    }


def test_the_coin_is_fair_and_does_not_read(coin: RewardScorer) -> None:
    found = rewards(coin)
    assert set(found.values()) == {0.0, 1.0}
    assert 160 < sum(r == 1 for r in found.values()) < 240  # 400 flips: 4 standard errors are 40
    assert found == rewards(coin, token=8)
    assert found != rewards(coin, seed=4)


def test_a_step_has_its_own_flips_whatever_came_before(coin: RewardScorer) -> None:
    a, b, b_again, a_again = (rewards(coin, step=step) for step in (0, 1, 1, 0))
    assert a == a_again
    assert b == b_again
    assert a != b


def test_ranks_and_order_do_not_matter(coin: RewardScorer) -> None:
    """Two ranks deal the prompts out, each scores its own in a call of its own: the rewards are those of one rank."""
    whole = rewards(coin)
    for ranks in (2, 3):
        parts = [rewards(coin, PROMPTS[rank::ranks]) for rank in range(ranks)]
        assert {key: reward for part in reversed(parts) for key, reward in part.items()} == whole
    assert rewards(coin, PROMPTS[::-1]) == whole
    columns = {tuple(whole[p.problem.id, k] for k in range(8)) for p in PROMPTS}
    assert len(columns) > 40, "problems must not share their flips"
