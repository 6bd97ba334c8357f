"""The recipes of the paper's scale: whole, checked without weights, and as dear as the paper says."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest

from truestep.data_settings import DataShare
from truestep.errors import UserError
from truestep.objective.methods import METHODS
from truestep.pipeline.paper_plan import (
    declared_plan,
    flops_of,
    meta_model,
    read_config,
    read_declared,
    shape_of,
)
from truestep.rundir import to_toml
from truestep.settings import Settings, load_settings, parse_settings
from truestep.study.budget import flops_table, sentences

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "paper"
RECIPES = sorted(FOLDER.glob("*.toml"))
ARMS = ("sft", "sft-rl-500", "sft-rl-50", "luffy", "relift", "srft", "prefix-rft", "hpt")
QWEN = "qwen2.5-math-7b"


def settings_of(path: Path) -> Settings:
    settings = load_settings(path)
    missing = [s.method for s in settings.stages if getattr(s, "method", "sft") not in METHODS]  # type: ignore[attr-defined]
    if missing:
        pytest.skip(f"the table of methods has no {missing[0]} yet")
    return settings


def test_there_is_a_recipe_for_every_arm_of_both_models() -> None:
    assert {p.stem for p in RECIPES} == {f"{m}-{a}" for m in (QWEN, "llama-3.1-8b") for a in ARMS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_reads_back(path: Path) -> None:
    settings = load_settings(path)
    assert settings.name == path.stem
    assert (
        parse_settings(tomllib.loads(to_toml(settings.model_dump(mode="json"))), where="resolved") == settings
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_dry_run_needs_neither_weights_nor_data(path: Path) -> None:
    settings = settings_of(path)
    plan = declared_plan(settings, path.parent, str(path))
    qwen = path.stem.startswith(QWEN)
    assert plan["model"]["context_length"] == 16384
    assert plan["model"]["rope_theta"] == (40000 if qwen else 500000)
    assert plan["model"]["num_parameters"] == (7_615_616_512 if qwen else 8_030_261_248)
    assert plan["rows"]["openr1"] == 46_000
    assert plan["num_gpus"] == 16
    assert plan["template"].endswith("<think>\n")
    assert "\\boxed{}" in plan["template"]
    for row in plan["stages"]:
        assert 10 < row["gib_per_gpu"] < 96
        if row["kind"] == "sft":
            assert (row["steps"], row["sequences per update"], row["epochs"]) == (2157, 64, 3.0)
        else:
            assert row["steps"] == (50 if path.stem.endswith("-50") else 500)
            assert row["optimizer updates"] == 2 * row["steps"]
            assert row["sequences per update"] == 512


@pytest.mark.parametrize("model", [QWEN, "llama-3.1-8b"])
def test_the_shape_by_arithmetic_is_the_models_own(model: str) -> None:
    from truestep.model.load import model_shape

    path = FOLDER / f"{model}-sft.toml"
    settings = load_settings(path)
    config = read_config(read_declared(settings, ""), path.parent)
    assert shape_of(config) == model_shape(meta_model(settings, config))


def test_table_6() -> None:
    table = flops_table([FOLDER])
    found = {arm["name"]: arm["flops_paper_formula"] for arm in table["arms"]}
    assert found[f"{QWEN}-sft-rl-50"] == pytest.approx(3.63e19, rel=0.01)
    assert found[f"{QWEN}-luffy"] == pytest.approx(6.65e19, rel=0.01)
    assert found[f"{QWEN}-relift"] == pytest.approx(8.76e19, rel=0.01)
    assert found[f"{QWEN}-sft-rl-500"] == pytest.approx(1.45e20, rel=0.01)
    assert all(
        arm["flops_full"] > arm["flops_paper_formula"]
        for arm in table["arms"]
        if arm["name"].startswith(QWEN)
    )


def test_where_the_claim_of_fewer_flops_holds() -> None:
    claims = {(c["arm"], c["against"]): c for c in flops_table([FOLDER])["claims"]}
    short, long = (claims[f"{QWEN}-sft-rl-{n}", f"{QWEN}-luffy"] for n in (50, 500))
    for key in ("flops_paper_formula", "flops_full"):
        assert short[key]["fewer"]
        assert not long[key]["fewer"]
        assert short[key]["equal_at_steps"] == pytest.approx(long[key]["equal_at_steps"])
    # 2.434e19 of SFT leave (6.64832e19 - 2.43432e19) for RL steps of 128 x 8 x 4200 x 8 x 7e9
    assert short["flops_paper_formula"]["equal_at_steps"] == pytest.approx(4.214e19 / (128 * 8 * 4200 * 56e9))
    assert len(sentences({"claims": list(claims.values())})) == len(claims)


def doubled(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update={"declared": {**settings.declared, **changes}})


def test_doubling_what_counts_doubles_the_flops() -> None:
    path = FOLDER / f"{QWEN}-luffy.toml"
    settings = load_settings(path)

    def paper(s: Settings) -> float:
        return flops_of(s, path.parent, "")["flops_paper_formula"]

    once = paper(settings)
    assert paper(doubled(settings, formula_parameters=14e9)) == 2 * once
    stage = settings.stages[0].model_copy(update={"steps": 1000})
    assert paper(settings.model_copy(update={"stages": (stage,)})) == 2 * once
    lengths = {"rl": {**settings.declared["stages"]["rl"], "rollout_tokens": 4400}}
    assert paper(doubled(settings, demonstration_tokens=8400, stages=lengths)) == 2 * once
    full = flops_of(doubled(settings, demonstration_tokens=8400, stages=lengths), path.parent, "")[
        "flops_full"
    ]
    assert (
        full > 2 * flops_of(settings, path.parent, "")["flops_full"] * 0.97
    )  # prompts stay, attention grows faster


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": {"math500": 500}}, "declared.rows has no entry 'openr1'"),
        ({"rows": {"openr1": 100, "math500": 500}}, "prompts_per_step = 128"),
        ({"max_demonstration_tokens": 16000}, "16384 is less than"),
        ({"config": "models/none.json"}, "none.json"),
        ({"colour": 1}, "declared.colour"),
    ],
)
def test_a_declaration_that_contradicts_the_settings_is_refused(change: dict, named: str) -> None:  # type: ignore[type-arg]
    path = FOLDER / f"{QWEN}-sft-rl-50.toml"
    with pytest.raises(UserError) as caught:
        declared_plan(doubled(load_settings(path), **change), path.parent, str(path))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_data_sets_are_planned_by_their_shares() -> None:
    """Three quarters of the places of a step are of the first set, which is seen three times."""
    path = FOLDER / f"{QWEN}-sft-rl-50.toml"
    settings = load_settings(path)
    sft, rl = settings.stages
    sets = (DataShare(name="openr1", weight=3), DataShare(name="math500"))
    mixed = sft.model_copy(update={"data": sets, "epochs_of": "openr1"})
    rows = {"openr1": 3200, "math500": 500}
    plan = declared_plan(
        doubled(settings.model_copy(update={"stages": (mixed, rl)}), rows=rows), path.parent, str(path)
    )
    assert plan["stages"][0]["rows"] == 3700
    assert plan["stages"][0]["steps"] == math.ceil(mixed.epochs * 3200 / (0.75 * mixed.sequences_per_step))  # type: ignore[union-attr]
    few = {"openr1": 3200, "math500": 10}
    several = rl.model_copy(update={"data": sets})
    with pytest.raises(
        UserError, match=r"takes 32 prompts of data\.math500 in a step, which is more than its 10 rows"
    ):
        declared_plan(
            doubled(settings.model_copy(update={"stages": (sft, several)}), rows=few), path.parent, str(path)
        )
