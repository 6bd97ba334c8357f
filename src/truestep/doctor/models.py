"""Random models of a real model's shape, and random training rows, on the device of a bench."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from truestep.device import free_bytes, synchronize
from truestep.doctor.checks import Bench
from truestep.model.load import LoadedModel, model_shape, prepare
from truestep.model.tiny import tiny_tokenizer
from truestep.objective.methods import build
from truestep.records import Origin, TokenBatch, TrainSequence
from truestep.rollout.engine import SampleRequest
from truestep.seeding import Purpose
from truestep.train.metrics import Meter
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.policy import Policy
from truestep.train.step import StepPlan, count_totals, microbatch_loss

# The shape of Qwen2.5-Math-7B, as in recipes/paper/models.
QWEN_7B: Mapping[str, Any] = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 16,
}  # fmt: skip
CONTEXT = 16384
# Wide enough that sampled tokens are neither certain nor uniform.
SPREAD = 0.05


def config_of(bench: Bench, **changes: Any) -> dict[str, Any]:
    """Return the bench's config.json with a context of 16,384 tokens, small on a processor, and with changes."""
    small = SMALL if bench.is_small else {}
    return {
        **bench.config,
        **small,
        "max_position_embeddings": CONTEXT,
        "initializer_range": SPREAD,
        **changes,
    }


def layers_that_fit(bench: Bench, bytes_per_parameter: float, reserve: float) -> int:
    """Return how many of the model's layers fit into the device's free memory, less ``reserve`` GiB."""
    config = config_of(bench)
    with torch.device("meta"):
        one = _model({**config, "num_hidden_layers": 1})
        two = _model({**config, "num_hidden_layers": 2})
    first, second = (sum(p.numel() for p in model.parameters()) for model in (one, two))
    room = (free_bytes(bench.device) - reserve * 2**30) / bytes_per_parameter
    return max(0, min(int(config["num_hidden_layers"]), 1 + int((room - first) / (second - first))))


def _model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(made, dtype=dtype, trust_remote_code=False)


def random_policy(
    bench: Bench, *, dtype: torch.dtype | None = None, checkpointing: bool = False, **changes: Any
) -> Policy:
    """Return a policy with random weights, which depend only on its shape, dtype and kind of device."""
    config = config_of(bench, **changes)
    devices = [] if bench.device.type == "cpu" else [bench.device]
    with torch.random.fork_rng(devices=devices, device_type=bench.device.type), bench.device:
        torch.manual_seed(0)
        model = _model(config, dtype or bench.dtype)
    prepare(model, bench.device)
    loaded = LoadedModel(
        model=model, tokenizer=tiny_tokenizer(), shape=model_shape(model), context_length=CONTEXT
    )
    return Policy(loaded, gradient_checkpointing=checkpointing)


def documents(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> list[TrainSequence]:
    """Return demonstrations of these lengths in tokens, with a prompt of a quarter, of random tokens."""
    return [
        _sequence(vocabulary, length // 4, length, group=i, seed=seed + i, origin=Origin.EXPERT)
        for i, length in enumerate(lengths)
    ]


def samples(
    vocabulary: int, prompt: int, lengths: Sequence[int], seed: int = 0, group: int = 1000
) -> list[TrainSequence]:
    """Return a group of samples of one prompt, with advantages of both signs."""
    return [
        _sequence(vocabulary, prompt, prompt + n, group=group, seed=seed + i, origin=Origin.POLICY)
        for i, n in enumerate(lengths)
    ]


def _sequence(
    vocabulary: int, prompt: int, length: int, *, group: int, seed: int, origin: Origin
) -> TrainSequence:
    draw = torch.Generator().manual_seed(group)
    first = torch.randint(0, vocabulary, (prompt,), generator=draw).tolist()
    draw = torch.Generator().manual_seed(10_000 + seed)
    rest = torch.randint(0, vocabulary, (length - prompt,), generator=draw).tolist()
    return TrainSequence(
        token_ids=(*first, *rest), origin=(Origin.CONTEXT,) * prompt + (origin,) * (length - prompt),
        num_prefix_tokens=prompt, group=group, advantage=1.0 if seed % 2 else -0.5,
    )  # fmt: skip


def batches_of(policy: Policy, sequences: Sequence[TrainSequence], tokens: int) -> list[TokenBatch]:
    parameter = next(policy.parameters())
    return pack(
        sequences, tokens_per_microbatch=tokens, dtype=torch.promote_types(parameter.dtype, torch.float32),
        device=parameter.device,
    )  # fmt: skip


def plan_of(method: str = "sft", learning_rate: float = 1e-3) -> StepPlan:
    terms = build(method, {}).terms
    return StepPlan(step=0, terms=terms, learning_rate=learning_rate, temperature=1.0, max_length=CONTEXT)


def accumulate(
    policy: Policy, batches: Sequence[TokenBatch], method: str = "sft", weights: Sequence[float] = ()
) -> None:
    """Run forward and backward passes of a step. ``weights`` are those of the micro-batches, if they are not 1."""
    plan = plan_of(method)
    totals = count_totals(plan.terms, batches, plan.ranks)
    for batch, weight in zip(batches, weights or [1.0] * len(batches), strict=True):
        (microbatch_loss(policy, batch, plan, totals, Meter()) * weight).backward()


def gradient(
    policy: Policy, optimizer: MasterOptimizer, batches: Sequence[TokenBatch], method: str = "sft"
) -> dict[str, Tensor]:
    """Return the gradient of a step by parameter, as the optimizer would use it."""
    optimizer.zero_grad()
    accumulate(policy, batches, method)
    found = {name: grad.detach().clone() for name, grad in optimizer.gradients().items()}
    optimizer.zero_grad()
    return found


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return ‖found − expected‖ ÷ ‖expected‖ over all tensors, computed in float64 on the processor."""
    missed = total = 0.0
    for name, wanted in expected.items():
        right = wanted.detach().cpu().double()
        missed += float((found[name].detach().cpu().double() - right).square().sum())
        total += float(right.square().sum())
    return (missed / total) ** 0.5 if total else float("nan")


def requests(vocabulary: int, prompt: int, count: int, num_prompts: int = 4) -> list[SampleRequest]:
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, vocabulary, (num_prompts, prompt), generator=draw).tolist()
    return [
        SampleRequest(
            problem_id=str(i % num_prompts), sample_index=i, prompt_ids=tuple(prompts[i % num_prompts]), seed=0,
            purpose=Purpose.PROBE, step=0,
        )
        for i in range(count)
    ]  # fmt: skip


def seconds_of(device: torch.device, work: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest time of ``work``, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
