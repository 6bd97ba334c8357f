"""What a study file may say, and what is refused before anything runs."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from micro import STUDY, write_study

from truestep.errors import UserError
from truestep.study.cell_results import cell_key
from truestep.study.cell_runner import Runner, given_identity
from truestep.study.estimate import estimate
from truestep.study.inputs import check_inputs
from truestep.study.load import load_study, parse_study
from truestep.study.plan import CONTROLS, cell_settings, differences, stage_tables

RAW = tomllib.loads(STUDY)
ROOT = Path(__file__).resolve().parents[2]


def changed(path: str, value: Any) -> dict[str, Any]:
    raw: Any = copy.deepcopy(RAW)
    *parents, leaf = path.split("/")
    node = raw
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if value is None:
        node.pop(leaf)
    else:
        node[leaf] = value
    return raw  # type: ignore[no-any-return]


def test_the_micro_study_is_good(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    study = load_study(path)
    plan = estimate(study, check_inputs(study, path))
    assert plan["cells"] == 12
    assert plan["trials"] == 8
    assert plan["flops_full"] > 0
    assert all(row["gib"] > 0.5 and row["cpu_seconds"] > 0 for row in plan["arms"])


COIN = {"rl.reward": "random"}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("arms/4/set", {**COIN, "rl.optimizer.lr": 0.5}, "rl.optimizer.lr"),
        ("arms/4/set", {**COIN, "rl.sampling.temperature": 0.7}, "not declared"),
        ("arms/4/set", {**COIN, "nothing.lr": 1.0}, "'nothing.lr' does not begin with a stage of the arm"),
        ("arms/4/set", {**COIN, "more.steps": 2}, "'more.steps' does not begin with a stage of the arm"),
        ("arms/4/set", {**COIN, "rl.steps.x": 2}, "steps is a value, not a table"),
        ("stages/rl/method", "dpo", "stages.rl.method = 'dpo' is not one of"),
        ("stages/rl/method_options", {"clip": 1}, "method_options.clip"),
        ("stages/sft/faults", {"others": 1}, "others"),
        ("arms/4/set", {}, "arms.coin: control = 'random-reward' needs an arm"),
        ("arms/0/stages", ["sft"], "arms.base: control = 'base' needs an arm"),
        ("arms/2/num_seeds", 3, "the study has 2 seeds"),
        ("arms/3/equal_flops", {"to": "sft-rl", "step_like": "stf"}, "'stf' is not a stage of sft-rl"),
        ("seeds", [*range(21)], "at most 20"),
        ("seeds", [-1], "greater than or equal to 0"),
        ("primary", [["sft", "sft"]], "compared with itself"),
        ("tuning/seeds", [], "at least 1"),
        ("tuning/factors", [1.0, -2.0], "greater than 0"),
        ("tuning/data", "train", "data.train is used both for selection and for training"),
        ("run/evaluate/data", ["train"], "data.train is used both for testing and for training"),
        ("arms/2/stages", ["sft", "lr"], "no [stages.lr]"),
        ("reference", "best", "'best' is not an arm"),
        ("primary", [["sft-rl", "dpo"]], "'dpo' is not an arm"),
        ("controls_off", {}, "rl-from-base"),
        ("controls_off", {"rl-from-base": " "}, "a reason must not be empty"),
        ("controls_off", {"rl-from-base": "x", "base": "y"}, "'base'"),
        ("tuning/seeds", [1], "must not include a seed of the study"),
        ("tuning/factors", [0.5], "must include 1.0"),
        ("tuning/data", "test", "is used both for testing and for selection"),
        ("run/evaluate/data", ["dev"], "is used both for testing and for selection"),
        ("run/data/test/seed", None, "crossed"),
        ("run/data/train/limt", 3, "limt"),
        ("seeds", [1, 1], "are the same"),
        ("arms/3/equal_flops", {"to": "nobody", "step_like": "sft"}, "is not an arm"),
        ("colour", "blue", "colour"),
    ],
)
def test_what_is_refused(path: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_study(changed(path, value), "micro.toml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("micro.toml: ")
    assert "\n" not in str(caught.value)


def test_trials_are_not_compared_on_a_set_that_chooses_checkpoints() -> None:
    raw = changed("stages/sft/dev", {"data": "dev", "every_steps": 1})
    raw["may_differ"].append("sft.dev.*")
    with pytest.raises(UserError, match=r"tuning\.data = 'dev' also chooses"):
        parse_study(raw, "micro.toml")
    raw["run"]["data"]["other"] = raw["run"]["data"]["dev"]
    raw["tuning"]["data"] = "other"
    parse_study(raw, "micro.toml")


def test_a_rate_of_a_trial_is_checked_too() -> None:
    with pytest.raises(UserError) as caught:
        parse_study(changed("tuning/factors", [1.0, 200.0]), "micro.toml")
    assert "arms.sft: stages.sft.optimizer.lr" in str(caught.value)
    assert "arms.continued: stages.more.optimizer.lr" in str(caught.value)


def test_a_dev_set_of_one_arm_alone_is_looked_at(tmp_path: Path) -> None:
    """The test problems under another name."""
    raw = changed("arms/4/set", {**COIN, "rl.dev.data": "again", "rl.dev.every_steps": 1})
    raw["run"]["data"]["again"] = {**raw["run"]["data"]["test"], "limit": 3}
    study = parse_study({**raw, "may_differ": [*raw["may_differ"], "rl.dev.*"]}, "micro.toml")
    with pytest.raises(UserError, match="3 of 10 problems are also in data"):
        check_inputs(study, write_study(tmp_path))


def test_a_declared_difference_is_allowed_and_shown() -> None:
    study = parse_study(RAW, "micro.toml")
    assert differences(study, study.arm("coin")) == {"rl.reward": ("checker", "random")}
    assert differences(study, study.arm("sft-rl")) == {}
    assert set(differences(study, study.arm("continued"))) == {"sft.steps"}


def test_a_dev_set_that_shares_problems_with_the_test_set_is_refused(tmp_path: Path) -> None:
    raw = changed("run/data/dev", {"source": "procedural:addition", "seed": 0, "split": "test", "limit": 3,
                                   "options": {"digits": 1}})  # fmt: skip
    with pytest.raises(UserError, match="3 of 10 problems are also in data"):
        check_inputs(parse_study(raw, "micro.toml"), write_study(tmp_path))


def test_cells_differ_in_their_seed_alone_and_run_on_one_thread() -> None:
    study = parse_study(RAW, "micro.toml")
    a, b = (cell_settings(study, "sft", s, stage_tables(study, study.arm("sft")), "") for s in (1, 2))
    assert a.model_copy(update={"seed": 2}) == b
    assert a.compute.threads == 1
    assert a.data["test"].seed == 0


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "study").glob("*.toml")), ids=lambda p: p.stem)
def test_the_declared_studies_load(path: Path) -> None:
    from truestep.objective.methods import METHODS
    from truestep.settings import StageSettings

    if "faults" in path.read_text() and "faults" not in StageSettings.model_fields:
        pytest.skip("stages have no faults yet")
    study = load_study(path)
    assert (ROOT / study.declaration).is_file()
    assert len(study.primary) <= 3
    assert len({a.control for a in study.arms if a.control} | set(study.controls_off)) == len(CONTROLS)
    assert set(study.run["evaluate"]["data"])
    used = {t.get("method", "") for a in study.arms for t in stage_tables(study, a)} - {""}
    if missing := used - set(METHODS):
        pytest.skip(f"the table of methods has no {', '.join(sorted(missing))} yet")


@pytest.mark.parametrize("name", ["demo", "staircase", "letters", "open"])
def test_committed_cells_are_recognized(name: str) -> None:
    """A study continues from results/: the key of a cell is what it was when the cell was made."""
    path = ROOT / "recipes" / "study" / f"{name}.toml"
    study = load_study(path)
    runner = Runner(study=study, where=path, out=ROOT, launch=lambda order: (1, ""), workers=1)
    settings = cell_settings(study, "base", study.seeds[0], (), str(path))
    made = ROOT / "results" / "study" / name / "cells" / f"base-s{study.seeds[0]}.json"
    assert cell_key(settings, given_identity(runner)) == json.loads(made.read_text())["key"]
