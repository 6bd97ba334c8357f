"""The random reward: a fair coin that no text can move, and the same one after a resume."""

from __future__ import annotations

from truestep.flops import Ledger
from truestep.pipeline.coin import CoinGrader, CoinSource
from truestep.records import Message, Problem, Verdict
from truestep.train.source import EntropyOf, Memory, StepData

PROBLEMS = [Problem(id=f"p{i}", messages=(Message(role="user", content="?"),), answer="1") for i in range(50)]


def verdicts(coin: CoinGrader, text: str) -> list[Verdict]:
    return [s.verdict for s in coin([(p, text) for p in PROBLEMS for _ in range(8)])]


class Sampled:
    """A source whose step is one call of the grader."""

    updates_per_step = 2

    def __init__(self, coin: CoinGrader) -> None:
        self.coin, self.seen = coin, []

    def take(self, step: int, memory: Memory, entropy_of: EntropyOf) -> StepData:
        self.seen.append(verdicts(self.coin, "x"))
        return StepData(minibatches=[[]])


def test_the_coin_is_fair_and_does_not_read() -> None:
    found = verdicts(CoinGrader(seed=3), "#### 1")
    assert 160 < sum(v is Verdict.CORRECT for v in found) < 240  # 400 flips: 4 standard errors are 40
    assert found == verdicts(CoinGrader(seed=3), "nonsense")
    assert found != verdicts(CoinGrader(seed=4), "#### 1")
    assert Verdict.UNSCORED not in found


def test_a_step_has_its_own_flips_whatever_came_before() -> None:
    coin = CoinGrader(seed=0)
    sampled = Sampled(coin)
    source = CoinSource(inner=sampled, coin=coin)
    assert source.updates_per_step == 2
    for step in (0, 1, 1, 0):
        source.take(step, Memory(), lambda sequences: ([], Ledger()))
    a, b, b_again, a_again = sampled.seen
    assert a == a_again
    assert b == b_again
    assert a != b
