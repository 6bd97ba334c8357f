"""Runs that train adapters: what is exported, resumed and published."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_continues, fingerprint, go, interrupted_at, prepared, write_recipe
from transformers import AutoModelForCausalLM

from truestep import rundir
from truestep.errors import UserError
from truestep.pipeline.prepare import Prepared

LORA = '{ rank = 2, alpha = 8, targets = ["all-linear", "lm_head"] }'
SHORT = ("stages.sft.steps=5", "stages.rl.steps=3", "stages.sft.save_every=3")
BOTH = tuple(f"stages.{name}.lora={LORA}" for name in ("sft", "rl"))
WITH_KL = (
    'stages.rl.method="grpo"',
    'stages.rl.method_options={ kl = "k3", kl_coef = 0.1 }',
    'stages.rl.rewards=[{ function = "random" }]',
    "stages.rl.updates_per_rollout=1",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(write_recipe(tmp_path_factory.mktemp("lora")), *SHORT, *BOTH, *WITH_KL)


@pytest.fixture(scope="module")
def whole(made: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    go(made, folder)
    return folder


def test_the_export_is_the_base_plus_the_exported_adapter(whole: Path) -> None:
    """The RL stage starts from the export of the SFT stage, and so its adapter is added to that."""
    first, second = (whole / "stages" / name for name in ("01-sft", "02-rl"))
    base, merged = (load_file(stage / "export/model.safetensors") for stage in (first, second))
    adapter = load_file(second / "adapter/adapter_model.safetensors")
    config = json.loads((second / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first / "export")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 8, False)
    assert merged.keys() == base.keys()
    adapted = 0
    for name, weight in merged.items():
        parts = [adapter.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "AB"]
        if parts[0] is None:
            assert torch.equal(weight, base[name])
            continue
        assert parts[1].any()
        assert torch.equal(weight, base[name] + 4.0 * (parts[1] @ parts[0]))
        adapted += 1
    assert adapted == len(config["target_modules"]) == len(adapter) / 2
    done = rundir.read_json(second / "done.json")
    trained = sum(t.numel() for t in adapter.values())
    assert done["shape"]["num_parameters"] == sum(t.numel() for t in base.values()) + trained


def test_the_untied_output_layer_is_in_the_config(whole: Path) -> None:
    for stage in ("01-sft", "02-rl"):
        model = AutoModelForCausalLM.from_pretrained(whole / "stages" / stage / "export")
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head.data_ptr() != table.data_ptr()
        assert not torch.equal(head, table)


def test_the_reference_is_the_model_that_the_stage_started_from(whole: Path) -> None:
    """B = 0 before the first update, so that the policy is the reference, and not afterwards."""
    rows = rundir.read_jsonl(whole / "stages/02-rl/metrics.jsonl")
    kl = [row["rl/loss/kl"] for row in rows]
    assert kl[0] == 0
    assert kl[-1] > 0


@pytest.mark.slow
def test_a_run_that_is_stopped_has_the_same_bytes(
    made: Prepared, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        alarm = interrupted_at(patch, 10**9)
        go(made, tmp_path / "counted")
    assert fingerprint(tmp_path / "counted") == fingerprint(whole)
    assert_continues(made, whole, random.Random(0).sample(range(len(alarm.looks)), 4), monkeypatch)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    refused = {
        (
            'stages.sft.lora={ rank = 2, targets = ["q_prj"] }',
        ): r"stages\.sft\.lora\.targets: 'q_prj' matches no",
        (
            "stages.sft.lora={ rank = 2 }",
            'stages.sft.freeze=["*.mlp.*"]',
        ): "freeze and lora exclude each other",
        (
            'stages.sft.lora={ rank = 2, train_also = ["x"] }',
        ): r"stages\.sft\.lora\.train_also: 'x' matches no",
    }
    for words, said in refused.items():
        with pytest.raises(UserError, match=said):
            prepared(recipe, *words)
