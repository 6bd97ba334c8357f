"""The tiny models that subjects train, in the audited environment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainModel(nn.Module):
    """A token-to-token model without attention, for subjects that are not transformer libraries."""

    def __init__(self, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, **ignored: Any) -> Tensor:
        """Return the logits. Without attention, a mask and positions have no effect."""
        return self.head(torch.tanh(self.inner(self.embed(input_ids))))


class Reused(PlainModel):
    """A plain model that uses its inner layer twice in every forward pass."""

    def forward(self, input_ids: Tensor, **ignored: Any) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(self.embed(input_ids))))))


class Tied(PlainModel):
    """A plain model whose head has the weight of its embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.head.weight = self.embed.weight


PLAIN = {"plain": PlainModel, "reused": Reused, "tied": Tied}  # these need only torch


def tiny_model(spec: Any) -> nn.Module:
    """Return the case's model. Those in PLAIN need only torch; all others need the transformers library."""
    arch = spec.options.get("arch", "plain")
    torch.manual_seed(0)
    if arch in PLAIN:
        return PLAIN[arch](spec.vocabulary)
    import transformers

    ids = {"vocab_size": spec.vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["max_position_embeddings"] = 256
    neox = {**ids, **sizes, "intermediate_size": 64}
    llama = {**neox, "num_key_value_heads": 2}
    llama |= {key: spec.options[key] for key in ("head_dim",) if key in spec.options}
    gpt2 = {**ids, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    gpt2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    names: dict[str, tuple[str, str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", llama),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", llama),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**llama, "head_dim": 8}),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", gpt2),
        "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", neox),
        "opt": ("OPTConfig", "OPTForCausalLM", {**ids, **sizes, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    }  # fmt: skip
    if arch not in names:
        raise SystemExit(f"unknown arch {arch!r}; use plain, {', '.join(names)}")
    config_name, model_name, options = names[arch]
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = spec.options.get("attention", "eager")
    return getattr(transformers, model_name)(config)
