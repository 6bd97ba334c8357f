"""Settings: what is kept when they are read, written and continued."""

from __future__ import annotations

import re

import pytest

from truestep.errors import UserError


def test_a_truth_value_among_method_options_stays_one() -> None:
    """In a file, and in the settings of a run that is continued."""
    from truestep.pipeline.history import History, continued
    from truestep.settings import parse_settings, table_of

    stage = {
        "kind": "rl", "data": "d", "steps": 1, "method": "super_rl", "prompts_per_step": 2, "samples_per_prompt": 2,
        "tokens_per_microbatch": 64, "optimizer": {"lr": 0.1}, "sampling": {"max_new_tokens": 4},
        "method_options": {"learned_weights": True, "sigma_rate": 0.1},
    }  # fmt: skip
    table = {"name": "x", "model": {"path": "tiny"}, "stages": [stage],
             "data": {"d": {"source": "procedural:addition", "limit": 2}}}  # fmt: skip
    settings = parse_settings(table, where="x")
    for found in (settings, continued(settings, History()), parse_settings(table_of(settings), where="x")):
        assert found.stages[0].method_options["learned_weights"] is True


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", "60", "stages.sft.steps: expected 60, got '60'; write it without quotes"),
        ("save_every", "6", "stages.sft.save_every: expected 6"),
        ("optimizer", {"lr": "0.1"}, "stages.sft.optimizer.lr: expected 0.1"),
        ("validation", {"data": "", "select_best": "false"}, "select_best: expected false"),
        ("steps", 60, ""),
        ("data", "2", ""),  # a name that looks like a number
    ],
)
def test_a_text_is_not_a_number(key: str, value: object, said: str) -> None:
    from truestep.settings import parse_settings

    stage = {
        "kind": "sft",
        "data": "d",
        "steps": 1,
        "sequences_per_step": 2,
        "tokens_per_microbatch": 64,
        "optimizer": {"lr": 0.1},
    }
    data = {name: {"source": "procedural:addition", "limit": 2} for name in ("d", "2")}
    table = {"name": "x", "model": {"path": "tiny"}, "data": data, "stages": [stage | {key: value}]}
    if not said:
        assert parse_settings(table, where="x").stages[0].name == "sft"
        return
    with pytest.raises(UserError, match=f"^x: .*{re.escape(said)}"):
        parse_settings(table, where="x")
