"""Checks of speed: which kernels run, how fast, and how often the processor waits for the device. The rate of a plain
matrix product on the same device is the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from truestep.device import matmul_rate, waits_counted
from truestep.doctor.allocations import measured_peak
from truestep.doctor.checks import Bench, Number, Skip
from truestep.doctor.models import (
    CONTEXT,
    accumulate,
    batches_of,
    config_of,
    documents,
    layers_that_fit,
    plan_of,
    random_policy,
    samples,
    seconds_of,
)
from truestep.model.attention import PackedLayout, count_pairs
from truestep.objective import logprobs
from truestep.settings import OptimizerSettings
from truestep.train.metrics import Meter
from truestep.train.optim import MasterOptimizer
from truestep.train.scoring import work
from truestep.train.step import count_totals, microbatch_loss

# Shares of the rate of a matrix product, and time of a prompt tree's attention ÷ that of plain rows, for each pair.
HEAD_SHARE, TRAINING_SHARE, TREE_TIMES = 0.5, 0.4, 1.3
HEAD_GIB = 3.0
WAITS = 24  # of a micro-batch: on processors 21 were counted in SFT and RL
KERNEL = "_scaled_dot_product"


class Kernels(TorchDispatchMode):
    """Lists the fused attention kernels that run. The plain implementation is several operators, none of this name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(KERNEL) and not name.endswith("backward"):
            self.names.append(name.removeprefix(KERNEL + "_"))
        return func(*args, **(kwargs or {}))


def attention(bench: Bench) -> Iterator[Number]:
    """Attention must run in fused kernels: plain rows in one without a mask (flash), prompt trees in any."""
    config = config_of(bench)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    tokens = 64 if bench.is_small else CONTEXT
    policy = random_policy(bench, num_hidden_layers=1, vocab_size=256)
    rows = {
        "plain rows": documents(256, (tokens // 4 + 1,) * 4),
        "prompt trees": samples(256, tokens // 16, (tokens * 15 // 128,) * 8),
    }
    times = {}
    for name, sequences in rows.items():
        (batch,) = batches_of(policy, sequences, tokens + 8)
        shape = (heads + 2 * kv_heads, batch.num_tokens, size)
        given = torch.randn(shape, dtype=bench.dtype, device=bench.device, requires_grad=True)
        query, key, value = given.split((heads, kv_heads, kv_heads))
        layout = PackedLayout(batch.segments, batch.position_ids)

        def both() -> None:
            out = layout.attend(0, query, key, value, size**-0.5, None)  # noqa: B023
            torch.autograd.grad(out.sum(), given, retain_graph=True)  # noqa: B023

        with Kernels() as seen:
            both()
        calls = len(layout._plans[None][0])
        yield Number(name=f"{name}: groups without a fused kernel", value=calls - len(seen.names), at_most=0)
        if name == "plain rows":
            flash = sum("flash" in kernel for kernel in seen.names)
            yield Number(name=f"{name}: groups not in flash attention", value=calls - flash, at_most=0)
        times[name] = seconds_of(bench.device, both) / count_pairs(batch.segments)
        yield Number(name=f"{name}: time", value=1e12 * times[name], unit="ps a pair")
    ratio = times["prompt trees"] / times["plain rows"]
    limit = TREE_TIMES if bench.judges_speed else None
    yield Number(name="time a pair of prompt trees ÷ of plain rows", value=ratio, at_most=limit)


def head(bench: Bench) -> Iterator[Number]:
    """The output layer must use little memory and be fast, and its chunks must not change the gradient."""
    config = config_of(bench)
    tokens = 64 if bench.is_small else CONTEXT
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    options: dict[str, Any] = {"dtype": bench.dtype, "device": bench.device}
    hidden = torch.randn(tokens, width, requires_grad=True, **options)
    weight = (torch.randn(vocabulary, width, **options) / width**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=bench.device)
    rate, own, default = matmul_rate(bench.dtype, *_matmul(bench)), {}, logprobs.CHUNK_ELEMENTS

    def both() -> tuple[torch.Tensor, ...]:
        found, _ = logprobs.chunked_logprobs(hidden, weight, None, targets, 1.0)
        return torch.autograd.grad(found.sum() / tokens, (hidden, weight))

    expected = both()
    sizes = [vocabulary * n for n in ((1, 7, tokens) if bench.is_small else (64, 256, 1024, 4096))]
    try:
        for elements in (default, *sizes):
            logprobs.CHUNK_ELEMENTS = elements
            chunk = min(tokens, max(1, elements // vocabulary))
            found = both()
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
            limit = 1e-5 if bench.dtype is torch.float32 else 2e-2
            yield Number(
                name=f"{chunk} tokens in a chunk: change of the gradient", value=error, at_most=limit
            )
            del found
            own[elements] = 8.0 * tokens * width * vocabulary / seconds_of(bench.device, both) / rate
            yield Number(
                name=f"{chunk} tokens in a chunk: share of the rate of a product", value=own[elements]
            )
    finally:
        logprobs.CHUNK_ELEMENTS = default
    extra, limit = _beside(bench, both, (hidden, weight)), HEAD_GIB
    if bench.is_small:  # a few tokens in a chunk, so that all logits at once would be too many
        logprobs.CHUNK_ELEMENTS = 4 * vocabulary
        extra, limit = _beside(bench, both, (hidden, weight)), 8 * 4 * vocabulary * 4 / 2**30
        logprobs.CHUNK_ELEMENTS = default
    yield Number(name="memory beside inputs and gradients", value=extra, unit="GiB", at_most=limit)
    least = HEAD_SHARE if bench.judges_speed else None
    yield Number(name="share of the rate of a product, as set", value=own[default], at_least=least)


def _beside(
    bench: Bench, both: Callable[[], Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> float:
    """Return the peak of memory beside the inputs and their gradients. Units: GiB."""
    before = 0 if bench.device.type == "cpu" else sum(t.nbytes for t in inputs)
    with measured_peak(bench.device) as peak:
        made = both()
    return (peak.num_bytes - before - sum(t.nbytes for t in made)) / 2**30


def _matmul(bench: Bench) -> tuple[int, float]:
    """Return the size of the yardstick's matrices, and how long it is measured."""
    return (128, 0.02) if bench.is_small else (8192, 0.5)


def speed(bench: Bench) -> Iterator[Number]:
    """Forward and backward passes of a whole micro-batch, in FLOPs of the model (recomputation is not counted)."""
    layers = layers_that_fit(bench, 2 * bench.dtype.itemsize + 4, reserve=1 if bench.is_small else 20)
    if not layers:
        raise Skip("the device's free memory does not hold one layer of the model and its activations")
    tokens = 64 if bench.is_small else CONTEXT
    policy = random_policy(bench, num_hidden_layers=layers, checkpointing=True)
    batches = batches_of(policy, documents(policy.model.config.vocab_size, (tokens // 4 + 1,) * 4), tokens)
    flops = work("trained", batches).full_flops(policy.shape)
    seconds = seconds_of(bench.device, lambda: _passes(policy, batches), repeats=2)
    yield Number(name="layers", value=layers, at_least=1)
    yield Number(name="tokens a second", value=tokens / seconds)
    yield Number(name="rate", value=flops / seconds / 1e12, unit="TFLOP/s")
    share = flops / seconds / matmul_rate(bench.dtype, *_matmul(bench))
    least = TRAINING_SHARE if bench.judges_speed else None
    yield Number(name="share of the rate of a product", value=share, at_least=least)


def _passes(policy: Any, batches: Any) -> None:
    accumulate(policy, batches)
    policy.zero_grad()


def waits(bench: Bench) -> Iterator[Number]:
    """How often the processor waits for the device in a micro-batch of SFT and of RL. It must not grow with the model."""
    size = 8 if bench.is_small else 256
    for method, make in (("sft", documents), ("grpo_token_mean", None)):
        counts = []
        for layers in (1, 2):
            policy = random_policy(bench, num_hidden_layers=layers, vocab_size=256)
            MasterOptimizer(policy, OptimizerSettings(lr=1e-3))
            rows = documents(256, (size, size)) if make else samples(256, size, (size, size))
            (batch,) = batches_of(policy, rows, 4 * size)
            plan = plan_of(method)
            totals = count_totals(plan.terms, [batch], plan.ranks)
            with waits_counted(bench.device) as seen:
                microbatch_loss(policy, batch, plan, totals, Meter()).backward()
            counts.append(len(seen))
        yield Number(name=f"{method}: waits in a micro-batch", value=counts[0], at_most=WAITS)
        yield Number(
            name=f"{method}: further waits for a second layer", value=counts[1] - counts[0], at_most=0
        )
