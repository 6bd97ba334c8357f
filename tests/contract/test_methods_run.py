"""Every row of the table trains, from a recipe to an exported model; what a row needs is asked for before a
model is built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from method_runs import recipe_of, start
from safetensors.torch import load_file
from tiny_runs import files, go, prepared

from truestep import rundir
from truestep.errors import UserError
from truestep.objective.methods import METHODS

torch.set_num_threads(1)
# One of each kind of machinery; the others have the marker slow.
ALWAYS = ("entropy_sft", "dapo", "luffy", "relift", "prefix_rft", "exgrpo", "chord_mu", "super_rl", "ghpo")
NEEDY = [name for name, row in METHODS.items() if row().needs_demonstrations]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in METHODS]
)
def test_a_row_trains_two_steps(name: str, model: str, tmp_path: Path) -> None:
    go(prepared(recipe_of(tmp_path, model, name)), tmp_path / "run")
    (stage,) = (tmp_path / "run/stages").iterdir()
    rows = rundir.read_jsonl(stage / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert max(value for row in rows for key, value in row.items() if key.endswith("/grad_norm")) > 0
    # What the trainer sees is what the engine sampled from: a prefix, a hint or an augmented prompt is where
    # it was.
    gaps = [value for row in rows for key, value in row.items() if key.endswith("logprob_difference_max")]
    assert max(gaps, default=0.0) < 1e-4
    before, after = load_file(f"{model}/model.safetensors"), load_file(stage / "export/model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert rundir.read_json(stage / "done.json")["method"] == name


@pytest.mark.slow
def test_what_the_rows_did_is_seen_in_their_metrics(model: str, tmp_path: Path) -> None:
    """The machinery of a row was at work, not only its clipped surrogate."""
    found = {}
    for name in ("luffy", "relift", "prefix_rft", "hpt", "chord_mu", "sasr", "exgrpo"):
        go(prepared(recipe_of(tmp_path / name, model, name, steps=4)), tmp_path / name / "run")
        rows = rundir.read_jsonl(tmp_path / name / "run/stages/01-rl/metrics.jsonl")
        found[name] = [{key.removeprefix("rl/"): value for key, value in row.items()} for row in rows]
    assert all(row["demonstrations/correct"] == 1.0 for row in found["luffy"])
    assert all(
        0 < row["expert/share"] < 1 for row in found["luffy"] + found["prefix_rft"] + found["chord_mu"]
    )
    assert any(row["statistics/prefix_entropy"] > 0 for row in found["prefix_rft"])
    assert any(row["loss/sft"] > 0 for row in found["hpt"])
    assert {row["control/imitate"] for row in found["sasr"]} >= {1.0}
    assert found["sasr"][0]["control/imitate"] == 1.0
    assert any(row["replay/problems"] > 0 for row in found["exgrpo"])
    assert any(row["loss/replay"] != 0 for row in found["exgrpo"])
    work = [row["work/demonstration_tokens"] for row in found["relift"]]
    assert work[-1] > 0, "no demonstration was imitated"
    assert any(row.get("buffer/grad_norm", 0) > 0 for row in found["relift"])
    checkpoint = tmp_path / "relift/run/stages/01-rl/checkpoints"
    assert any(p.name.startswith("buffer-optimizer.") for p in files(checkpoint))


@pytest.mark.parametrize("kl", ["reward", "k3"])
def test_a_buffer_s_update_needs_no_reference_values(kl: str, model: str, tmp_path: Path) -> None:
    """It trains demonstrations only; what a KL term or charge reads of own samples is not there."""
    options = f'{{ buffer_size = 2, buffer_lr = 1e-3, kl = "{kl}", kl_coef = 0.05 }}'
    made = prepared(recipe_of(tmp_path, model, "relift", steps=4), f"stages.rl.method_options={options}")
    go(made, tmp_path / "run")
    rows = rundir.read_jsonl(tmp_path / "run/stages/01-rl/metrics.jsonl")
    assert any(row.get("rl/buffer/grad_norm", 0) > 0 for row in rows)


@pytest.mark.parametrize("name", NEEDY)
def test_demonstrations_are_asked_for_before_a_model_is_built(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "tiny", name, solutions=False)
    with pytest.raises(UserError) as refused:
        prepared(recipe)
    message = str(refused.value)
    assert "\n" not in message
    assert "train.jsonl:1" in message
    assert "solution" in message
    assert f'method = "{name}"' in message


def test_a_demonstration_that_is_too_long_leaves_its_problem_out(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "tiny", "luffy")
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    rows[0] = rows[0].replace('"solution": "0"', '"solution": "000000"')
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    made = prepared(recipe)
    assert [len(prompts) for prompts in made.stage_prompts["rl"]] == [11]
    assert any("1 of 12 problems" in note for note in made.notes)
    short = recipe_of(tmp_path / "all", "tiny", "luffy")
    rows = (tmp_path / "all/train.jsonl").read_text().replace('"solution": "', '"solution": "00000')
    (tmp_path / "all/train.jsonl").write_text(rows)
    with pytest.raises(UserError, match="prompts_per_step = 4 is more than the 0 problems"):
        prepared(short)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "tiny", "grpo")
    for options, words in (
        ('{kl = "k4", kl_coef = 0.1}', "k1, k2, k3, reward"),
        ('{kl = "k3"}', "set both or neither"),
        ('{correction = "tis"}', "truncate"),
    ):
        with pytest.raises(UserError, match=words):
            prepared(recipe, f"stages.rl.method_options={options}")


# -------------------------------------------------------------------------------------------- injected faults


def test_a_fault_is_a_weight_vector_of_the_step(model: str, tmp_path: Path) -> None:
    """Under SGD the faulty step is that of the first and the last of its four sequences."""
    more = "sequences_per_step = 4"
    sgd = (
        'stages.sft.optimizer={ lr = 0.5, kind = "sgd", weight_decay = 0, max_grad_norm = 0 }',
        "stages.sft.steps=1",
    )
    moved = {}
    for name, sets in {
        "right": (),
        "offload": ('stages.sft.faults.offload_drop="first_last"',),
        "named": ('stages.sft.faults.others=["offload_first_last"]',),
        "nothing": ('stages.sft.faults.others=["right"]',),
        "micro": ("stages.sft.faults.micro_mean=true", "stages.sft.faults.sequences_per_microbatch=3"),
        "whole": ("stages.sft.faults.micro_mean=true", "stages.sft.faults.sequences_per_microbatch=4"),
    }.items():
        recipe = recipe_of(tmp_path / name, model, "sft")
        recipe.write_text(recipe.read_text().replace("sequences_per_step = 8", more))
        go(prepared(recipe, *sgd, *sets), tmp_path / name / "run")
        after = load_file(tmp_path / name / "run/stages/01-sft/export/model.safetensors")
        before = load_file(f"{model}/model.safetensors")
        moved[name] = torch.cat([(after[key] - before[key]).double().ravel() for key in sorted(before)])

    def apart(a: str, b: str) -> float:
        return float((moved[a] - moved[b]).norm() / moved[b].norm())

    assert apart("named", "offload") == 0
    assert apart("nothing", "right") < 1e-5
    assert apart("whole", "right") < 1e-5  # one micro-batch: its mean is the mean
    assert apart("offload", "right") > 0.05
    assert apart("micro", "right") > 0.05
    identities = {
        rundir.read_json(tmp_path / name / "run/stages/01-sft/done.json")["identity"]
        for name in ("right", "offload")
    }
    assert len(identities) == 2


def test_faults_that_cannot_be(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "tiny", "sft")
    with pytest.raises(UserError, match="set only one of them"):
        prepared(recipe, "stages.sft.faults.micro_mean=true", "stages.sft.faults.dp_token_mean=true")
    with pytest.raises(UserError, match="offload_first_last"):
        prepared(recipe, 'stages.sft.faults.others=["offload"]')
