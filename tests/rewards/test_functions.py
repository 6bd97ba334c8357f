"""The rewards that ship."""

from __future__ import annotations

import math

import pytest
from reward_samples import sample

from truestep.errors import UserError
from truestep.objective.methods import build
from truestep.objective.methods.row import Overlong
from truestep.records import RewardInput, Verdict
from truestep.rewards.functions import format_reward, length_reward, overlong_penalty


def long(num_tokens: int, **changed: object) -> RewardInput:
    return sample(1, completion_ids=tuple(range(num_tokens)), limit=100, **changed)


@pytest.mark.parametrize(("text", "fits"), [
    ("<think>a</think>b", 1), ("\n<think>\na\n</think>\n\nb\n", 1), ("<think>a</think>", 0), ("<think> </think>b", 0),
    ("a", 0), ("</think>a<think>b", 0), ("<think>a<think>b</think>c", 0), ("<think>a</think>b</think>c", 0),
    ("x<think>a</think>b", 0), ("<think>a", 0),
])  # fmt: skip
def test_think_tags(text: str, fits: int) -> None:
    assert format_reward([sample(1, text)]) == [fits]


def test_other_forms() -> None:
    both = ["think", "answer"]
    texts = ["<think>a</think><answer>b</answer>", "<answer>b</answer><think>a</think>", "<think>a</think>b"]
    assert format_reward([sample(1, t) for t in texts], tags=both) == [1, 0, 0]
    assert format_reward([sample(1, "a</think>b"), sample(1, "<think>a</think>b")], opened=True) == [1, 0]
    assert format_reward([sample(1, "a\n#### 12"), sample(1, "a\n12")], pattern=r".*#### \d+") == [1, 0]
    with pytest.raises(UserError):
        format_reward([], pattern="(")


def test_length() -> None:
    samples = [long(n) for n in (0, 25, 50, 100, 200)]
    assert length_reward(samples, correct_only=False) == [1, 0.75, 0.5, 0, 0]
    assert length_reward(samples, budget=50, correct_only=False) == [1, 0.5, 0, 0, 0]
    cosine = length_reward(samples, shape="cosine", correct_only=False)
    assert cosine == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0, 0])
    verdicts = (Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNSCORED)
    assert length_reward([long(25, verdict=v) for v in verdicts]) == [0.75, 0.0, None]
    with pytest.raises(UserError, match="checker"):
        length_reward(samples)


def test_overlong_is_dapos_penalty_bit_for_bit() -> None:
    """At penalty ½ what the method "dapo" subtracts; at 1 the paper's: 0, then down to −1 over the last fifth."""
    overlong = build("dapo", {}).part(Overlong)
    assert overlong is not None
    for n in range(130):
        (penalty,) = overlong_penalty([long(n)])
        assert 1.0 + penalty == overlong.shaped(1.0, n, 100)
    assert overlong_penalty([long(n) for n in (80, 90, 100, 120)], penalty=1.0) == [0, -0.5, -1, -1]
