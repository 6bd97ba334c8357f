"""Which methods may train on samples of older weights (``rollout_ahead``), and what a recipe with another says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.objective.methods import METHODS, build, fits_older_samples
from truestep.pipeline.prepare import prepare
from truestep.settings import parse_settings, settings_hash

STAGE: dict[str, Any] = {
    "kind": "rl", "data": "sums", "steps": 2, "prompts_per_step": 4, "tokens_per_microbatch": 512,
    "optimizer": {"lr": 1e-3}, "sampling": {"max_new_tokens": 64}, "rollout_ahead": 1,
}  # fmt: skip
ROW = '''
from truestep.objective import coefficients, corrections
from truestep.objective.methods.row import POLICY, Method, Term
from truestep.objective.normalise import Normaliser


def shaped(*, beta: float = 0.1) -> Method:
    """Reads the behavior log-probabilities itself."""
    term = Term(name="policy", select=POLICY, normaliser=Normaliser.TOKENS,
                coefficient=coefficients.shaped_replay(beta), needs=("behavior_logprobs",))
    return Method(name="shaped", terms=(term,))


def bare() -> Method:
    term = Term(name="policy", select=POLICY, normaliser=Normaliser.TOKENS, coefficient=coefficients.importance)
    return Method(name="bare", terms=(term,))
'''


def recipe(**stage: Any) -> dict[str, Any]:
    own = {k: v for k, v in {**STAGE, **stage}.items() if k != "vllm"}
    found = {
        "name": "x",
        "model": {"path": "tiny"},
        "data": {"sums": {"source": "procedural:addition", "limit": 8}},
    }
    return {**found, "stages": [own], **({"vllm": stage["vllm"]} if "vllm" in stage else {})}


def check(folder: Path, **stage: Any) -> None:
    (folder / "row.py").write_text(ROW)
    prepare(parse_settings(recipe(**stage), where="run.toml"), base_dir=folder)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("grpo", {}, "its term policy has no correction by π_proximal/π_behavior; set"),
        ("grpo", {"correction": "mask"}, 'correction = "mask" leaves tokens out, but does not weight the others'),
        ("grpo", {"correction": "truncate", "kl": "k3", "kl_coef": 0.1}, 'its term kl has no correction .*set kl = "reward"'),
        ("exgrpo", {"correction": "truncate"}, r"what the step before it has learned \(Replay\)"),
        ("sasr", {"correction": "truncate"}, r"learned \(Controller\)"),
        ("super_rl", {"correction": "truncate", "learned_weights": True}, r"learned \(Controller\)"),
        ("luffy", {}, "its term policy has no correction"),
        ("row.py:bare", {}, "its term policy has no correction"),
    ],
)  # fmt: skip
def test_a_method_that_cannot_is_refused_before_anything_is_loaded(
    tmp_path: Path, method: str, options: dict[str, Any], said: str
) -> None:
    began = time.perf_counter()
    with pytest.raises(UserError, match=said) as refused:
        check(tmp_path, method=method, method_options=options)
    assert str(refused.value).startswith(f'stages.rl.rollout_ahead = 1: method = "{method}" cannot')
    assert "set rollout_ahead = 0, or method_options.correction" in str(refused.value)
    assert " grpo," in str(refused.value), "methods that fit are named"
    assert "\n" not in str(refused.value)
    assert time.perf_counter() - began < 20
    check(tmp_path, method="grpo", rollout_ahead=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {"correction": "truncate"}),
        ("grpo", {"correction": "geometric", "entropy_bonus": 1e-3}),
        ("grpo", {"correction": "drop", "kl": "reward", "kl_coef": 0.1}),
        ("dapo", {"correction": "clamp"}),
        ("relift", {"correction": "truncate"}),  # its buffer is filled when a step trains
        ("luffy", {"correction": "sequence"}),
        ("row.py:shaped", {}),
        ("row.py:bare", {"correction": "truncate"}),
    ],
)
def test_a_method_that_can_is_accepted(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    check(tmp_path, method=method, method_options=options)


def test_the_methods_that_fit_are_those_with_samples_and_without_a_memory_that_plans() -> None:
    fitting = {name for name in METHODS if fits_older_samples(name)}
    samples = {name for name in METHODS if METHODS[name]().plan is not None}
    assert samples - fitting == {"exgrpo", "sasr", "uft"}  # uft has a KL term in the loss
    assert not [name for name in METHODS if not build(name, {}).staleness_fault and name in samples]


def test_servers_that_sleep_cannot_sample_beside_the_training() -> None:
    with pytest.raises(UserError, match=r"vllm.sleep = true: .*stages.rl.rollout_ahead = 1"):
        parse_settings(recipe(engine="vllm", vllm={"sleep": True}), where="run.toml")
    parse_settings(recipe(engine="vllm", rollout_ahead=0, vllm={"sleep": True}), where="run.toml")
    parse_settings(recipe(engine="torch", vllm={"sleep": True}), where="run.toml")


@pytest.mark.parametrize("value", [2, -1, 0.5, "1"])
def test_other_distances_are_refused(value: object) -> None:
    with pytest.raises(UserError, match="rollout_ahead"):
        parse_settings(recipe(rollout_ahead=value), where="run.toml")


def test_results_from_before_the_setting_keep_their_identity() -> None:
    stages = [parse_settings(recipe(rollout_ahead=n), where="x").stages[0] for n in (0, 1)]
    before = stages[0].model_dump(mode="json")
    del before["rollout_ahead"]
    assert settings_hash(stages[0]) == settings_hash(before) != settings_hash(stages[1])
