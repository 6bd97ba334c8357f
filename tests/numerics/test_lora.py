"""Adapters: their gradients follow from the float64 reference of the merged model by the chain rule."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from step_cases import (
    FAMILIES,
    LLAMAS,
    batches_of,
    close,
    expected_gradient,
    make_model,
    make_policy,
    one_each,
    plan_for,
    sequences_of,
    sgd_gradient,
)
from torch import Tensor, nn

from truestep.errors import UserError
from truestep.model.lora import install, layers_of, merged_weights, switched_off, with_weights
from truestep.stage_settings import LoraSettings
from truestep.train.policy import Policy

EVERYTHING = LoraSettings(rank=3, alpha=5, targets=("all-linear", "lm_head"), train_also=("*norm.weight",))
SOME = LoraSettings(rank=2, alpha=3, rslora=True, targets=("q_proj", "model.layers.1.mlp.*"))
SETTINGS = {"everything": EVERYTHING, "some": SOME}


@functools.cache
def adapted(model: str, which: str) -> Policy:
    return make_policy(LLAMAS[model], lora=SETTINGS[which])


def merged_model(model: str, policy: Policy) -> nn.Module:
    """transformers' own model with the weights W + s·B·A."""
    weights = {name: p.detach() for name, p in policy.model.named_parameters()}
    return with_weights(make_model(LLAMAS[model]).double(), merged_weights(policy.model, weights))


@functools.cache
def expected(model: str, which: str, family: str) -> dict[str, Tensor]:
    """The gradients of all parameters of the adapted model, which are zero for those that are frozen."""
    policy = adapted(model, which)
    whole = expected_gradient(merged_model(model, policy), sequences_of(FAMILIES[family]), FAMILIES[family])
    return by_chain_rule(policy, whole)


def by_chain_rule(policy: Policy, of_merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W' = W + s·B·A, so that dA = s·Bᵀ·dW' and dB = s·dW'·Aᵀ."""
    found = {
        name: of_merged[name] if p.requires_grad else torch.zeros_like(p)
        for name, p in policy.model.named_parameters()
        if ".lora_" not in name
    }
    for name, layer in layers_of(policy.model).items():
        gradient = of_merged[f"{name}.weight"]
        found[f"{name}.lora_A"] = layer.scale * layer.lora_B.detach().T @ gradient
        found[f"{name}.lora_B"] = layer.scale * gradient @ layer.lora_A.detach().T
    return found


@pytest.mark.parametrize("family", ["sft", "grpo", "dapo"])
@pytest.mark.parametrize(("model", "which"), [("gqa", "everything"), ("tied", "everything"), ("gqa", "some")])
def test_any_split_gives_the_gradients_of_the_chain_rule(model: str, which: str, family: str) -> None:
    policy, plan = adapted(model, which), plan_for(FAMILIES[family].method)
    wanted, sequences = expected(model, which, family), sequences_of(FAMILIES[family])
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all(bool(wanted[name].any()) == (name in trained) for name in wanted)
    splits = [batches_of(sequences, num_batches=n) for n in (1, 3)]
    splits += [batches_of(sequences, share_prefix=False), one_each(sequences)]
    for batches in splits:
        close(f"lora, {family}", sgd_gradient(policy, batches, plan), wanted)


def test_without_adapters_the_policy_is_the_model_that_it_started_from() -> None:
    for model in LLAMAS:
        policy, plain = adapted(model, "some"), make_policy(LLAMAS[model])
        (batch,) = batches_of(sequences_of(FAMILIES["sft"]))
        with torch.no_grad():
            there = policy(batch, 1.0)[0]
            with switched_off(policy.model):
                away = policy(batch, 1.0)[0]
            assert torch.equal(away, plain(batch, 1.0)[0])
            assert torch.equal(policy(batch, 1.0)[0], there)
            assert float((there - away).abs().max()) > 1e-3


def test_new_adapters_change_nothing_and_do_not_depend_on_each_other() -> None:
    for which in SETTINGS.values():
        model = make_model(LLAMAS["tied"]).double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        install(model, which, seed=1)
        ids = torch.arange(9)[None]
        assert torch.equal(model(ids).logits, make_model(LLAMAS["tied"]).double()(ids).logits)
        own = dict(model.named_parameters())
        assert all(torch.equal(own[name], p) for name, p in before.items())
        assert not any(layer.lora_B.any() for layer in layers_of(model).values())
    first, second = (make_model(LLAMAS["gqa"]) for _ in range(2))
    install(first, SOME, seed=1)
    install(second, EVERYTHING, seed=1)
    assert torch.equal(
        layers_of(first)["model.layers.0.self_attn.q_proj"].lora_A,
        layers_of(second)["model.layers.0.self_attn.q_proj"].lora_A[:2],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_matrix_is_rounded_once(dtype: torch.dtype) -> None:
    policy = make_policy(LLAMAS["tied"], dtype, lora=EVERYTHING)
    weights = {name: p.detach() for name, p in policy.model.named_parameters()}
    merged = merged_weights(policy.model, weights)
    model = with_weights(make_model(LLAMAS["tied"]).to(dtype), merged)
    for name, layer in layers_of(policy.model).items():
        wide = layer.weight.float() + layer.scale * (layer.lora_B.float() @ layer.lora_A.float())
        assert torch.equal(merged[f"{name}.weight"], wide.to(dtype))
        assert torch.equal(model.get_submodule(name).weight, wide.to(dtype))
    assert model.config.tie_word_embeddings is False  # only the output layer had an adapter
    assert torch.equal(model.get_input_embeddings().weight, policy.model.get_input_embeddings().weight)


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    model = make_model(LLAMAS["gqa"])
    refused = {
        ("embed_tokens",): r"lora\.targets: 'embed_tokens' matches model\.embed_tokens, which is a Embedding",
        ("q_prj",): r"lora\.targets: 'q_prj' matches no layer; did you mean \"q_proj\"",
    }
    for targets, said in refused.items():
        with pytest.raises(UserError, match=said):
            install(model, LoraSettings(rank=1, targets=targets), seed=0)
