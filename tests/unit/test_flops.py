"""The ledger reproduces the paper's totals and scales as it should."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from truestep.flops import Ledger, ModelShape

PAPER = ModelShape(
    num_parameters=7_000_000_000, num_matmul_parameters=7_000_000_000, num_layers=28, attention_width=3584
)
DEMONSTRATION = 4_200


def rollouts(num_prompts: int, per_prompt: int, length: int) -> Ledger:
    tokens = num_prompts * per_prompt * length
    return Ledger(rollout_tokens=tokens, rollout_trained_tokens=tokens)


def demonstrations(count: int) -> Ledger:
    return Ledger(demonstration_tokens=count * DEMONSTRATION)


@pytest.mark.parametrize(
    ("ledger", "expected"),
    [
        (rollouts(500 * 128, 7, 2_200) + demonstrations(500 * 128), 6.65e19),  # LUFFY
        (rollouts(500 * 128, 8, 3_000) + demonstrations(138 * 64), 8.76e19),  # ReLIFT
        (demonstrations(3 * 46_000) + rollouts(50 * 128, 8, 4_200), 3.63e19),  # SFT, then 50 steps of RL
    ],
)
def test_totals_of_the_paper(ledger: Ledger, expected: float) -> None:
    assert ledger.paper_flops(PAPER) == pytest.approx(expected, rel=0.01)


def test_doubling() -> None:
    ledger = rollouts(10, 8, 100) + demonstrations(5)
    double = replace(PAPER, num_parameters=14_000_000_000)
    assert (ledger + ledger).paper_flops(PAPER) == 2 * ledger.paper_flops(PAPER)
    assert ledger.paper_flops(double) == 2 * ledger.paper_flops(PAPER)


def test_fuller_count_adds_prompts_scoring_and_attention() -> None:
    shape = ModelShape(num_parameters=100, num_matmul_parameters=80, num_layers=3, attention_width=16)
    ledger = Ledger(trained_pass_tokens=10, generated_pass_tokens=5, scored_pass_tokens=2, trained_pairs=7,
                    generated_pairs=4, scored_pairs=1)  # fmt: skip
    assert ledger.full_flops(shape) == 80 * (60 + 10 + 4) + 4 * 3 * 16 * (21 + 4 + 1)


def test_json_round_trip() -> None:
    ledger = rollouts(3, 2, 5) + demonstrations(1)
    assert Ledger(**json.loads(json.dumps(asdict(ledger)))) == ledger
