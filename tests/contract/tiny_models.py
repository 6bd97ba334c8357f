"""Small random models of several families, sharp enough that sampling from them means something."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from truestep.model.load import LoadedModel, model_shape, prepare
from truestep.model.tiny import tiny_tokenizer
from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import SampleRequest
from truestep.seeding import Purpose
from truestep.train.policy import Policy

VOCABULARY = 300  # more than one block of the sampler's search
WINDOW = 6
STOPS = (7, 11, 200)


def bare_model(family: str = "llama", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """As transformers makes it: attention not packed, norms not widened."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # fewer than query heads: the grouped decoding path
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if family == "sliding":
            model: PreTrainedModel = MistralForCausalLM(MistralConfig(**shared, sliding_window=WINDOW))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shared))
    return model.to(dtype)


def policy(family: str = "llama", dtype: torch.dtype = torch.float64) -> Policy:
    model = bare_model(family, dtype)
    prepare(model, torch.device("cpu"))
    loaded = LoadedModel(
        model=model, tokenizer=tiny_tokenizer(), shape=model_shape(model), context_length=256
    )
    made = Policy(loaded)
    assert made.packs, made.notes
    assert made.plain_head, made.notes
    return made


def requests(num_prompts: int, samples: int = 1, *, seed: int = 0) -> list[SampleRequest]:
    """Prompts of 1 to 13 tokens, each asked for ``samples`` times."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [
        tuple(torch.randint(0, VOCABULARY, (1 + (5 * p) % 13,), generator=draw).tolist())
        for p in range(num_prompts)
    ]
    return [
        SampleRequest(
            problem_id=f"p{p}", sample_index=i, prompt_ids=ids, seed=seed, purpose=Purpose.SAMPLE, step=3
        )
        for p, ids in enumerate(prompts)
        for i in range(samples)
    ]


def sequence(prompt: tuple[int, ...], completion: tuple[int, ...], group: int = 0) -> TrainSequence:
    return TrainSequence(
        token_ids=prompt + completion,
        origin=(Origin.CONTEXT,) * len(prompt) + (Origin.EXPERT,) * len(completion),
        num_prefix_tokens=len(prompt),
        group=group,
    )
