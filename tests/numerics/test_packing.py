"""Packed rows do not see each other, in any architecture that is packed; one that cannot be packed says
so."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from step_cases import (
    EXACT,
    FAMILIES,
    LLAMAS,
    VOCABULARY,
    batches_of,
    check,
    close,
    demonstrations,
    expected_gradient,
    make_policy,
    plan_for,
    relative_error,
    rollouts,
    sequences_of,
    sgd_gradient,
    twins,
)
from torch import Tensor
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from truestep.records import TARGET_FIELDS, TokenBatch
from truestep.testing.reference.loss import exact_float64
from truestep.train.packing import dummy_batch
from truestep.train.policy import Policy

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
PACKED = {
    "llama": LLAMAS["gqa"],
    "mistral, window 3": MistralConfig(**SIZES, sliding_window=3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma3, window 3": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=3,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(
        **GPT2, bos_token_id=None, eos_token_id=None
    ),  # dropout of 0.1 in modules, off after loading
    "opt": OPTConfig(  # dropout of 0.1 as plain numbers
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
    ),
}
REFUSED = {
    "gemma2": Gemma2Config(
        **SIZES, head_dim=8, sliding_window=3, query_pre_attn_scalar=8, attn_logit_softcapping=1.0
    ),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4),
}


@functools.cache
def policy_of(name: str) -> Policy:
    return make_policy({**PACKED, **REFUSED}[name])


def forward(policy: Policy, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities with a graph, and the embedded tokens that they hang on."""
    kept: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = policy.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with exact_float64():
            logprobs, _ = policy(batch, 1.0)
    finally:
        handle.remove()
    return logprobs, kept[0]


def spans(batch: TokenBatch) -> Mapping[int, list[slice]]:
    """The forwarded tokens that each sequence may look at."""
    found = {}
    for i in batch.sequence_index.unique().tolist():
        sources = batch.source_index[batch.sequence_index == i].tolist()
        (own,) = {s for s in batch.segments if s.start <= sources[-1] < s.stop}
        found[i] = [slice(own.prefix_start, own.prefix_stop), slice(own.start, own.stop)]
    return found


@pytest.mark.parametrize("name", list(PACKED))
@pytest.mark.parametrize("shared", [False, True])
def test_rows_do_not_see_each_other(name: str, shared: bool) -> None:
    """With separate rows, and with branches of one prompt: no gradient crosses, and no value."""
    policy = policy_of(name)
    assert policy.packs, policy.notes
    family = FAMILIES["grpo" if shared else "sft"]
    sequences = rollouts([(7, 3, 5), (4, 6)], family) if shared else demonstrations((7, 3, 9, 5))
    (batch,) = batches_of(sequences)
    logprobs, embedded = forward(policy, batch)
    for i, visible in spans(batch).items():
        rows = batch.sequence_index == i
        (grad,) = torch.autograd.grad(logprobs[rows].sum(), embedded, retain_graph=True)
        seen = torch.zeros(batch.num_tokens, dtype=torch.bool)
        for part in visible:
            seen[part] = True
        assert bool((grad[0, ~seen] == 0).all()), f"sequence {i} sees a stranger"
        if "window" not in name:
            assert bool((grad[0, seen].norm(dim=-1) > 0).all()), "it must see all of its own"
        # Every token of everybody else changes: nothing of this sequence may.
        ids = torch.where(seen, batch.input_ids, (batch.input_ids + 7) % VOCABULARY)
        other, _ = forward(policy, replace(batch, input_ids=ids))
        check(f"strangers changed, {name}", float((other - logprobs)[rows].detach().abs().max()), EXACT)
        assert bool(((other - logprobs)[~rows].abs() > 1e-3).any())


@pytest.mark.parametrize("name", list(PACKED))
def test_a_token_does_not_see_what_follows(name: str) -> None:
    policy = policy_of(name)
    (batch,) = batches_of(demonstrations((8,), holes=False))
    logprobs, embedded = forward(policy, batch)
    for m in range(batch.num_targets):
        (grad,) = torch.autograd.grad(logprobs[m], embedded, retain_graph=True)
        assert bool((grad[0, int(batch.source_index[m]) + 1 :] == 0).all())


@pytest.mark.parametrize("name", [*PACKED, *REFUSED])
def test_every_architecture_gives_the_reference_gradient(name: str) -> None:
    config = {**PACKED, **REFUSED}[name]
    policy, model = policy_of(name), twins_reference(config)
    for family in ("sft", "grpo"):
        f = FAMILIES[family]
        sequences = sequences_of(f, (9, 4, 12, 7))
        expected = expected_gradient(model, sequences, f, temperature=0.7)
        for share_prefix in (True, False):
            batches = batches_of(sequences, num_batches=2, share_prefix=share_prefix)
            close(
                f"architecture, {name}",
                sgd_gradient(policy, batches, plan_for(f.method, temperature=0.7)),
                expected,
            )


def twins_reference(config: Any) -> Any:
    return twins(config)[1]


def test_a_window_matters() -> None:
    """Else the sliding windows above would be tested on rows that fit into them."""
    f = FAMILIES["sft"]
    sequences = sequences_of(f, (9, 4, 12, 7))
    wide = MistralConfig(**SIZES, sliding_window=60)
    got = sgd_gradient(make_policy(wide), batches_of(sequences), plan_for(f.method))
    narrow = expected_gradient(twins_reference(PACKED["mistral, window 3"]), sequences, f)
    assert relative_error(got, narrow) > 1e-2


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_packed_says_so(name: str) -> None:
    policy = policy_of(name)
    assert not policy.packs
    assert any("one by one" in note for note in policy.notes)
    assert policy.plain_head == (name != "gemma2")
    if name == "gemma2":
        assert any("all logits are computed at once" in note for note in policy.notes), (
            "its logits are soft-capped"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dummy_batch_has_the_precision_and_no_targets(dtype: torch.dtype) -> None:
    batch = dummy_batch(dtype, "cpu")
    columns = [getattr(batch, name) for name in TARGET_FIELDS]
    assert batch.num_targets == 0
    assert {len(column) for column in columns} == {0}
    assert {column.dtype for column in columns if column.is_floating_point()} == {dtype}


def test_columns_of_integers_and_truths_keep_their_type() -> None:
    batch = dummy_batch(torch.float64, "cpu")
    kinds = {name: getattr(batch, name).dtype for name in TARGET_FIELDS if getattr(batch, name) is not None}
    assert {name: kind for name, kind in kinds.items() if not kind.is_floating_point} == {
        "target_ids": torch.int64, "source_index": torch.int64, "sequence_index": torch.int64,
        "sequence_length": torch.int64, "origin": torch.int8, "policy_version": torch.int32, "solved": torch.bool,
    }  # fmt: skip
