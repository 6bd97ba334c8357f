"""What a wrong recipe is told: every fault, with the key to use, and none that only follows from another."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.settings import parse_settings

STAGE: dict[str, Any] = {
    "kind": "rl", "data": "d", "steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "tokens_per_microbatch": 64,
    "optimizer": {"lr": 0.1}, "sampling": {"max_new_tokens": 4},
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "x", "model": {"path": "tiny"}, "data": {"d": {"source": "procedural:addition", "limit": 2}},
    "stages": [STAGE], "evaluate": {"data": ["d"], "sampling": {"max_new_tokens": 3}},
}  # fmt: skip


def refusal(stage: dict[str, Any], **top: Any) -> str:
    made = copy.deepcopy(RECIPE) | top
    made["stages"][0].update(stage)
    with pytest.raises(UserError) as caught:
        parse_settings(made, where="r.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"rl": {"rewards": [{"function": "checker"}]}}, "stages.rl.rl: unknown key; below [[stages]], a table of the stage is "
         "called [[stages.rewards]]"),
        ({"sft": {"optimizer": {"lr": 1}}}, "called [stages.optimizer]"),
        ({"optimizer": {"learning_rate": 1}}, 'stages.rl.optimizer.learning_rate: unknown key; did you mean "lr"?'),
        ({"optimizer": {"lr": "fast"}}, "expected a number, got 'fast' (lr: The highest"),
        ({"optimizer": {"lr": -1.0}}, "expected a number greater than 0, got -1.0"),
        ({"steps": "many"}, "expected an integer, got 'many'"),
        ({"validation": "d"}, "expected a table, got 'd'; for example validation = {"),
        ({"freeze": "x"}, 'expected a list, got \'x\'; write ["x"]'),
        ({"beta": 0.1}, "set method_options = { kl_coef = ... }"),
        ({"gradient_accumulation_steps": 4}, "leave it out: a step has all its sequences"),
        ({"per_device_train_batch_size": 4}, 'did you mean "prompts_per_step"'),
        ({"eval_steps": 4}, "validation.every_steps"),
        ({"lr_scheduler_type": "cosine"}, "optimizer.schedule"),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(stage: dict[str, Any], said: str) -> None:
    text = refusal(stage)
    assert said in text
    assert "\n" not in text


def test_every_fault_is_listed_once() -> None:
    text = refusal({"foo": 3, "steps": 1.5}, compute={"threads": "two"})
    head, *faults = text.splitlines()
    assert head == "r.toml: 3 faults:"
    assert [fault.strip().partition(":")[0] for fault in faults] == [
        "stages.rl.foo", "compute.threads", "stages.rl.steps"
    ]  # fmt: skip
    assert "compute.threads: expected an integer or 'auto', got 'two'" in text
    (known,) = re.findall("expected one of (.*)", text)
    assert len(known.split(", ")) == len(set(known.split(", ")))
    assert "prompts_per_step" in known
    assert "sequences_per_step" not in known, "only the keys of this kind of stage"


def test_a_missing_key_beside_an_unrelated_unknown_one_is_listed() -> None:
    text = refusal({"optimizer": {"learning_rate": 1, "wd": 2}})
    assert "r.toml: 2 faults:" in text
    text = refusal({"optimizer": {"wd": 2}})
    assert "stages.rl.optimizer.lr: the key is missing" in text


def test_many_faults_are_cut() -> None:
    text = refusal({f"foo{i}": i for i in range(12)})
    assert text.splitlines()[-1].strip() == "and 4 more faults"


def test_stages_as_one_table() -> None:
    made = copy.deepcopy(RECIPE) | {"stages": {"rl": STAGE}}
    with pytest.raises(
        UserError, match=r"stages: expected a list of tables, got one table; write \[\[stages\]\]"
    ):
        parse_settings(made, where="r.toml")


@pytest.mark.parametrize("page", ["rewards.md", "methods.md"])
def test_tables_of_a_stage_on_a_page_fit_below_a_stage(page: str) -> None:
    from truestep.rundir import to_toml

    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    blocks = [b for b in re.findall(r"```toml\n(.*?)```", text, re.S) if b.lstrip().startswith("[[stages.")]
    assert blocks or page != "rewards.md"
    top = to_toml({key: value for key, value in RECIPE.items() if key != "stages"})
    for block in blocks:
        recipe = f"{top}\n{to_toml({'stages': [STAGE]})}\n{block}"
        parse_settings(tomllib.loads(recipe), where=page)
