"""Checks of numbers: the same bits twice, and the gradient of a second computation in float64 on the processor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from truestep.device import backend_of
from truestep.doctor.checks import Bench, Number, Skip
from truestep.doctor.models import batches_of, distance, documents, gradient, random_policy, requests, samples
from truestep.model.forward import decoder_layers
from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.settings import OptimizerSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import shard

PLAIN = OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.0)
METHODS = ("sft", "grpo_token_mean")
# Relative differences of gradients between right computations: 10 times the largest that was measured on processors.
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6}


def repeatable(bench: Bench) -> Iterator[Number]:
    """Two runs of the same forward, backward and sampling passes must give the same bits."""
    policy = random_policy(bench, num_hidden_layers=2)
    vocabulary, size = policy.model.config.vocab_size, 8 if bench.is_small else 512
    sequences = documents(vocabulary, (size, 2 * size)) + samples(vocabulary, size, (size, 2 * size))
    batches = batches_of(policy, sequences, 4 * size)
    optimizer = MasterOptimizer(policy, PLAIN)
    first, second = (gradient(policy, optimizer, batches) for _ in range(2))
    differ = sum(not torch.equal(first[name], second[name]) for name in first)
    yield Number(name="tensors whose gradient differs", value=differ, at_most=0)
    yield Number(name="tensors without a gradient", value=_zeros(first), at_most=0)
    engine = TorchEngine(policy.model, max_running=6)
    asked = requests(vocabulary, size, 8)
    for top_p in (1.0, 0.9):
        how = SamplingParameters(temperature=1.0, max_new_tokens=8, stop_token_ids=(), top_p=top_p)
        one, other = (list(engine.generate(asked, how)) for _ in range(2))
        differ = sum(
            a.completion_ids != b.completion_ids or a.behavior_logprobs != b.behavior_logprobs
            for a, b in zip(one, other, strict=True)
        )
        yield Number(name=f"samples that differ at top-p {top_p:g}", value=differ, at_most=0)


def _zeros(gradients: dict[str, Tensor]) -> int:
    return sum(not bool(grad.any()) for grad in gradients.values())


def exact(bench: Bench) -> Iterator[Number]:
    """The gradient of packed micro-batches must be that of separate sequences, whole logits and float64."""
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320}  # fmt: skip
    for dtype, limit in LIMITS.items():
        policy = random_policy(bench, dtype=dtype, **small)
        sequences = documents(320, (5, 9, 17, 33)) + samples(320, 7, (3, 12, 20))
        reference = copy.deepcopy(policy.model).to("cpu", torch.float64)
        reference.set_attn_implementation("sdpa")  # the eager softmax is in float32
        optimizer = MasterOptimizer(policy, PLAIN)
        yield Number(name="packing refused", value=not policy.packs, at_most=0)
        for method in METHODS:
            chosen = [s for s in sequences if (s.origin[-1] is Origin.EXPERT) == (method == "sft")]
            expected = reference_gradient(reference, chosen)
            for tokens in (32, 4096):
                batches = batches_of(policy, chosen, tokens)
                found = {
                    name.removeprefix("model."): grad
                    for name, grad in gradient(policy, optimizer, batches, method).items()
                }
                name = f"{method}, {str(dtype).removeprefix('torch.')}, {len(batches)} micro-batches: relative error"
                yield Number(name=name, value=distance(found, expected), at_most=limit)


def reference_gradient(model: nn.Module, sequences: Sequence[TrainSequence]) -> dict[str, Tensor]:
    """Return the gradient of −Σ A·log π ÷ Σ 1 over the trained tokens, one sequence after the other. A is 1 for a
    demonstration."""
    model.zero_grad()
    total = sum(s.num_trained for s in sequences)
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        own = torch.log_softmax(logits[:-1], dim=1).gather(1, ids[0, 1:, None])[:, 0]
        trained = torch.tensor([o is not Origin.CONTEXT for o in sequence.origin[1:]])
        advantage = 1.0 if sequence.origin[-1] is Origin.EXPERT else sequence.advantage
        assert isinstance(advantage, float)
        (-advantage * own[trained].sum() / total).backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def one_rank(bench: Bench) -> Iterator[None]:
    """Make a process group of this process alone."""
    if dist.is_initialized():
        raise Skip("this process is one of several ranks; run the check without torchrun")
    dist.init_process_group(backend_of(bench.device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def precision(bench: Bench) -> Iterator[Number]:
    """Of eight micro-batches, the bfloat16 gradient with float32 shards must be at least as near to the float64 gradient
    as that with bfloat16 weights."""
    width: dict[str, Any] = {} if bench.is_small else {"vocab_size": 32768}
    with one_rank(bench):
        wide = random_policy(bench, dtype=torch.float64, num_hidden_layers=2, **width)
        vocabulary, size = wide.model.config.vocab_size, 16 if bench.is_small else 512
        rounded = {name: p.detach().to(torch.bfloat16) for name, p in wide.named_parameters()}
        _set(wide, rounded)
        sequences = documents(vocabulary, (size,) * 8)
        tokens = size
        optimizer = MasterOptimizer(wide, PLAIN)
        batches = batches_of(wide, sequences, tokens)
        yield Number(name="micro-batches", value=len(batches), at_least=8)
        expected = {n: g.cpu() for n, g in gradient(wide, optimizer, batches).items()}
        del wide, optimizer
        errors = {}
        for kind in ("bfloat16 weights", "float32 shards"):
            policy = random_policy(bench, dtype=torch.bfloat16, num_hidden_layers=2, **width)
            _set(policy, rounded)
            if kind == "float32 shards":
                shard(policy, decoder_layers(policy.model))
            optimizer = MasterOptimizer(policy, PLAIN)
            found = gradient(policy, optimizer, batches_of(policy, sequences, tokens))
            whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
            errors[kind] = distance(whole, expected)
            yield Number(name=f"relative error with {kind}", value=errors[kind], at_most=0.05)
            del policy, optimizer, found, whole
        ratio = errors["float32 shards"] / errors["bfloat16 weights"]
        yield Number(name="error of float32 shards ÷ error of bfloat16 weights", value=ratio, at_most=1.02)


@torch.no_grad()
def _set(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in policy.named_parameters():
        parameter.copy_(weights[name])
