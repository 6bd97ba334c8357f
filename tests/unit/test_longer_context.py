"""A context beyond the model's own needs a rule for RoPE, which every stage and the exported model have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from truestep.errors import UserError
from truestep.model.load import load_model
from truestep.model.tiny import tiny_tokenizer
from truestep.pipeline.prepare import context_and_eos
from truestep.settings import ModelSettings, parse_settings, settings_hash

OWN = 64


def folder_of(path: Path, **more: Any) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tiny_tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=OWN, initializer_range=0.3, **more,
        ))  # fmt: skip
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def loaded(path: str, **more: Any) -> Any:
    settings = ModelSettings(path=path, **more)
    return load_model(settings, dtype=torch.float32, device=torch.device("cpu"), seed=0)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("own"))


def test_a_longer_context_without_a_rule_is_an_error_that_offers_some(own: str) -> None:
    settings = parse_settings(
        {"name": "x", "model": {"path": own, "context_length": 128}, "data": {}}, where="run.toml"
    )
    for fail in (lambda: context_and_eos(settings), lambda: loaded(own, context_length=128)):
        with pytest.raises(UserError, match=r'128 is more than the 64 positions .*rope_scaling = "yarn"'):
            fail()
    assert loaded(own, context_length=48).context_length == 48


@torch.no_grad()
def test_linear_scaling_is_rope_at_a_fraction_of_the_position(own: str) -> None:
    ids, places = torch.arange(5, 25)[None], torch.arange(20)[None]
    scaled, plain = (
        loaded(own, **more).model for more in ({"context_length": 256, "rope_scaling": "linear"}, {})
    )
    expected = plain(input_ids=ids, position_ids=places).logits
    torch.testing.assert_close(
        scaled(input_ids=ids, position_ids=4 * places).logits, expected, atol=2e-5, rtol=1e-4
    )
    assert float((scaled(input_ids=ids, position_ids=places).logits - expected).abs().max()) > 1e-2


def test_yarn_keeps_the_fast_rotations_and_slows_the_slow_ones(own: str) -> None:
    """Source: arXiv:2309.00071, sections 3.2 and 3.4."""
    found = loaded(own, context_length=256, rope_scaling="yarn")
    assert found.context_length == 256
    rotary, plain = found.model.model.rotary_emb, loaded(own).model.model.rotary_emb
    ratio = plain.inv_freq / rotary.inv_freq
    assert float(ratio[0]) == pytest.approx(1.0)
    assert float(ratio[-1]) == pytest.approx(4.0)
    assert bool((ratio.diff() >= -1e-6).all())
    assert rotary.attention_scaling == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1)


@pytest.mark.parametrize("rule", ["linear", "yarn"])
def test_the_exported_model_has_the_rule_and_later_stages_leave_it(
    own: str, tmp_path: Path, rule: str
) -> None:
    given: dict[str, Any] = {"context_length": 128, "rope_scaling": rule}
    first = loaded(own, **given).model
    first.save_pretrained(tmp_path / "export")
    tiny_tokenizer().save_pretrained(tmp_path / "export")
    rope = AutoConfig.from_pretrained(tmp_path / "export").rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (rule, 2.0)
    assert rope.get("original_max_position_embeddings") == (OWN if rule == "yarn" else None)
    again = loaded(str(tmp_path / "export"), **given).model
    assert again.config.rope_parameters == first.config.rope_parameters
    assert again.config.max_position_embeddings == 128
    assert torch.equal(again.model.rotary_emb.inv_freq, first.model.rotary_emb.inv_freq)


def test_a_larger_theta_and_none_are_rules_too(own: str) -> None:
    larger = loaded(own, context_length=128, rope_theta=40000.0).model.config
    assert larger.rope_parameters["rope_theta"] == 40000.0
    kept = loaded(own, context_length=128, rope_scaling="none").model
    assert torch.equal(kept.model.rotary_emb.inv_freq, loaded(own).model.model.rotary_emb.inv_freq)


def test_rules_that_do_not_fit_are_refused(own: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a model.context_length beyond the model's own"):
        loaded(own, rope_scaling="yarn")
    with pytest.raises(UserError, match="64 positions, which are enough"):
        loaded(own, rope_scaling="yarn", context_length=32)
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    ruled = folder_of(tmp_path / "ruled", rope_parameters=scaled)
    with pytest.raises(UserError, match="already has the rule 'linear'"):
        loaded(ruled, rope_scaling="yarn", context_length=128)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=110, n_embd=16, n_layer=1, n_head=2, n_positions=OWN)
    ).save_pretrained(tmp_path / "learned")
    tiny_tokenizer().save_pretrained(tmp_path / "learned")
    with pytest.raises(UserError, match="has no RoPE to extend; set 64 or less"):
        loaded(str(tmp_path / "learned"), context_length=128, rope_scaling="none")


def test_an_old_recipe_keeps_its_identity() -> None:
    old = {
        k: v for k, v in json.loads(ModelSettings(path="x").model_dump_json()).items() if k != "rope_scaling"
    }
    assert settings_hash(ModelSettings(path="x")) == settings_hash(old)
    assert settings_hash(ModelSettings(path="x", rope_scaling="yarn")) != settings_hash(old)
