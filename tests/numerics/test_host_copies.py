"""What layers save in host memory gives the same gradients, bit for bit, and is what the memory prediction says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from step_cases import FAMILIES, LLAMAS, batches_of, make_policy, sequences_of
from torch import Tensor

from truestep.errors import UserError
from truestep.model import host_copies
from truestep.model.forward import decoder_layers
from truestep.model.host_copies import HostCopies
from truestep.pipeline import memory
from truestep.records import TokenBatch
from truestep.settings import parse_settings
from truestep.train.parallel import shard
from truestep.train.policy import Policy

LENGTHS = (9, 4, 14, 6)


def policies(dtype: torch.dtype) -> tuple[Policy, Policy]:
    """Two policies with the same weights; the second one keeps activations in host memory."""
    made = [
        make_policy(LLAMAS["gqa"], dtype, gradient_checkpointing=True, offload_activations=moves)
        for moves in (False, True)
    ]
    for policy in made:
        policy.model.train()
    own, other = made
    return own, other


def gradients(policy: Policy, batches: list[TokenBatch]) -> dict[str, Tensor]:
    policy.zero_grad()
    for batch in batches:
        logprobs, entropies = policy(batch, 1.0)
        (logprobs.sum() + 0.1 * entropies.sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[HostCopies]:
    """The contexts that were made. In a tiny model, all tensors are small."""
    made: list[HostCopies] = []
    start = HostCopies.__init__

    def noted(self: HostCopies, *args: Any) -> None:
        made.append(self)
        start(self, *args)

    monkeypatch.setattr(HostCopies, "__init__", noted)
    monkeypatch.setattr(host_copies, "SMALLEST", 0)
    return made


@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize("family", ["sft", "grpo"])  # plain rows, and shared prompts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits(
    dtype: torch.dtype, family: str, whole_logits: bool, copies: list[HostCopies]
) -> None:
    own, other = policies(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    batches = batches_of(sequences_of(FAMILIES[family], LENGTHS), num_batches=2, dtype=wide)
    for policy in (own, other):
        policy.plain_head = not whole_logits
    expected, found = gradients(own, batches), gradients(other, batches)
    assert len(copies) == len(batches)
    assert all(c.nbytes for c in copies)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_have_the_same_gradients(dtype: torch.dtype, copies: list[HostCopies], tmp_path: Path) -> None:
    """Under FSDP2, the weights that layers save are gathered ones, and the parameters are shards."""
    made = policies(dtype)
    batches = batches_of(sequences_of(FAMILIES["sft"], LENGTHS), num_batches=2, dtype=torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for policy in made:
            shard(policy, decoder_layers(policy.model))
        expected, found = (gradients(policy, batches) for policy in made)
        assert [c.nbytes > 0 for c in copies] == [True] * len(batches)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n].to_local(), e.to_local()) for n, e in expected.items())  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def test_the_inputs_of_all_layers_are_copied_and_weights_are_not(copies: list[HostCopies]) -> None:
    _, policy = policies(torch.float32)
    (batch,) = batches_of(sequences_of(FAMILIES["sft"], LENGTHS), num_batches=1, dtype=torch.float32)
    gradients(policy, [batch])
    config, num = policy.model.config, batch.input_ids.numel()
    inputs = 4 * num * config.hidden_size * config.num_hidden_layers
    # Also what the last norm saves: its input twice, its normalized form, and numbers of each token.
    assert inputs <= copies[0].nbytes <= inputs + 4 * num * (3 * config.hidden_size + 2)


def test_the_prediction_moves_activations_to_the_host() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
              "vocab_size": 100, "num_hidden_layers": 5}  # fmt: skip
    sizes = memory.Sizes.of(config, 10_000)
    here = memory.Training(dtype="bfloat16", tokens=1000, checkpointing=True)
    there = memory.Training(dtype="bfloat16", tokens=1000, checkpointing=True, offload_activations=True)
    (device, host), (less, more) = memory.training_bytes(sizes, here), memory.training_bytes(sizes, there)
    inputs = 2 * 1000 * 64 * 5
    assert device["activations"] == more["activations"] == inputs
    assert sum(device.values()) - sum(less.values()) == inputs
    assert host == {}


def test_it_needs_checkpointing() -> None:
    recipe = {
        "name": "x", "model": {"path": "tiny"}, "data": {"a": {"source": "a.jsonl"}},
        "compute": {"offload_activations": True, "gradient_checkpointing": "selective"},
        "stages": [{"kind": "sft", "data": "a", "steps": 1, "sequences_per_step": 2, "tokens_per_microbatch": 64,
                    "optimizer": {"lr": 1e-3}}],
    }  # fmt: skip
    with pytest.raises(UserError, match="offload_activations = true needs gradient_checkpointing = true"):
        parse_settings(recipe, where="run.toml")
