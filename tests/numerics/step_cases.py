"""Tiny models as twins (the policy that is trained, and an untouched float64 copy for the reference), and
steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from truestep.model.load import LoadedModel, model_shape, prepare
from truestep.model.lora import install, layers_of
from truestep.objective.advantage import GroupView
from truestep.objective.methods import Method, build
from truestep.records import Origin, StepReport, TokenBatch, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.stage_settings import LoraSettings
from truestep.testing.reference.loss import exact_float64, group_advantages, reference_gradient
from truestep.testing.reference.rows import named_part
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.policy import Policy
from truestep.train.step import StepPlan, train_step

EXACT = 1e-12  # float64 against float64
SINGLE = 2e-5  # float32 against float64
VOCABULARY = 40
MAX_LENGTH = 32
PLAIN_SGD = OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.0)
LARGEST: dict[
    str, tuple[float, int]
] = {}  # family → (largest error, comparisons), for the summary of the test run


@dataclass(frozen=True, kw_only=True)
class Family:
    """The same objective under its name here and in the reference."""

    name: str
    method: Method
    reference: str
    origin: Origin  # of its trained tokens
    advantage: str = ""  # the reference's name for the kind of advantage
    options: Mapping[str, Any] = field(default_factory=dict)  # of the reference


FAMILIES = {
    f.name: f
    for f in (
        Family(name="sft", method=build("sft", {}), reference="sft", origin=Origin.EXPERT),
        Family(
            name="sft_sequences",
            method=build("sft", {"normaliser": "sequences"}),
            reference="sft",
            options={"normaliser": "seq"},
            origin=Origin.EXPERT,
        ),
        Family(name="dft", method=build("dft", {}), reference="dft", origin=Origin.EXPERT),
        Family(
            name="grpo_token_mean",
            method=build("grpo_token_mean", {}),
            reference="grpo_token_mean",
            origin=Origin.POLICY,
            advantage="mean",
        ),
        Family(
            name="grpo",
            method=build("grpo", {}),
            reference="grpo",
            origin=Origin.POLICY,
            advantage="mean_std",
        ),
        Family(
            name="dr_grpo",
            method=build("dr_grpo", {}),
            reference="dr_grpo",
            origin=Origin.POLICY,
            advantage="mean",
        ),
        Family(
            name="dapo",
            method=build("dapo", {}),
            reference="dapo",
            origin=Origin.POLICY,
            advantage="mean_std",
        ),
    )
}


# ----------------------------------------------------------------------------------------------------- models


def llama(
    *, hidden: int = 16, heads: int = 2, kv_heads: int = 2, layers: int = 2, **more: Any
) -> LlamaConfig:
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 2 * hidden, "max_position_embeddings": 64, **more}
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )


LLAMAS = {
    "tied": llama(tie_word_embeddings=True),
    "gqa": llama(hidden=32, heads=4, kv_heads=2, tie_word_embeddings=False),
}


def make_model(config: Any, seed: int = 0) -> nn.Module:
    """A model in float32 whose parameters are of a size that matters, norms and biases too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
    return model


def make_policy(
    config: Any,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    lora: LoraSettings | None = None,
    **options: Any,
) -> Policy:
    model = make_model(config, seed).to(dtype)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    prepare(model, torch.device("cpu"))
    shape = (
        model_shape(make_model(LLAMAS["tied"])) if not hasattr(model.config, "num_attention_heads") else None
    )
    if lora is not None:
        install(model, lora, seed)
        drawn = torch.Generator().manual_seed(seed)
        for layer in layers_of(model).values():  # of a size that matters, as after some steps
            layer.lora_B.data.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=drawn))
    loaded = LoadedModel(
        model=model,
        tokenizer=None,  # type: ignore[arg-type]  # token ids only
        shape=shape or model_shape(model),
        context_length=64,
    )
    if dtype != torch.float64:
        return Policy(loaded, **options)
    with exact_float64():
        return Policy(loaded, **options)


def twins(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Policy, nn.Module]:
    """The policy, and the same weights in transformers' own float64 model with eager attention."""
    return make_policy(config, dtype, seed), make_model(config, seed).double()


# -------------------------------------------------------------------------------------------------- sequences


def demonstrations(lengths: Sequence[int], seed: int = 0, holes: bool = True) -> list[TrainSequence]:
    """One demonstration for each number of trained tokens; some have context between or after them."""
    draw = np.random.default_rng(seed)
    sequences = []
    for i, length in enumerate(lengths):
        num_prompt = int(draw.integers(1, 6))
        origin = [Origin.CONTEXT] * num_prompt + [Origin.EXPERT] * length
        if holes and i % 2:
            origin[num_prompt + 1 : num_prompt + 1] = [Origin.CONTEXT, Origin.CONTEXT]
            origin.append(Origin.CONTEXT)
        sequences.append(
            TrainSequence(
                token_ids=tuple(int(t) for t in draw.integers(0, VOCABULARY, len(origin))),
                origin=tuple(origin),
                num_prefix_tokens=0,
                group=i,
            )
        )
    return sequences


def rollouts(groups: Sequence[Sequence[int]], family: Family, seed: int = 0) -> list[TrainSequence]:
    """Groups of samples of the given lengths with rewards; the advantages and the gate are the family's own.

    Every third group has equal rewards: it counts in a denominator, or is dropped by the gate.
    """
    draw = np.random.default_rng(seed)
    sequences = []
    for g, lengths in enumerate(groups):
        prompt = tuple(int(t) for t in draw.integers(0, VOCABULARY, int(draw.integers(1, 7))))
        rewards = [1.0 if g % 3 == 2 else float(i == 0 or draw.random() < 0.4) for i in range(len(lengths))]
        if g % 3 != 2:
            rewards = [*rewards[:-1], 0.0]
        members = GroupView(
            rewards=tuple(rewards),
            solved=tuple(r == 1 for r in rewards),
            origins=(Origin.POLICY,) * len(rewards),
        )
        decision, advantages = family.method.gate(members), family.method.advantage(members)
        for i, length in enumerate(lengths):
            if not decision.keep[i]:
                continue
            sequences.append(
                TrainSequence(
                    token_ids=prompt + tuple(int(t) for t in draw.integers(0, VOCABULARY, length)),
                    origin=(Origin.CONTEXT,) * len(prompt) + (Origin.POLICY,) * length,
                    num_prefix_tokens=len(prompt),
                    group=g,
                    advantage=advantages[i] or 0.0,
                    behavior_logprobs=tuple(float(x) for x in -draw.random(length)),
                    weight=decision.weights[i],
                    reward=rewards[i] or 0.0,
                )
            )
    return sequences


def referred(sequences: Sequence[TrainSequence], family: Family) -> list[TrainSequence]:
    """The sequences with the advantages that the reference computes from their rewards."""
    if not family.advantage:
        return list(sequences)
    found = {}
    for g in {s.group for s in sequences}:
        rewards = [s.reward for s in sequences if s.group == g]
        found[g] = iter(group_advantages(rewards, family.advantage))
    return [replace(s, advantage=next(found[s.group])) for s in sequences]


UNEQUAL = (2, 27, 2, 17)
EVEN = (6, 7, 8, 7, 6, 8, 7, 6, 8, 7, 7, 6)


def sequences_of(family: Family, lengths: Sequence[int] = EVEN, seed: int = 0) -> list[TrainSequence]:
    if family.origin is Origin.EXPERT:
        return demonstrations(lengths, seed)
    size = max(2, len(lengths) // 4)
    return rollouts([lengths[i : i + size] for i in range(0, len(lengths), size)], family, seed)


# ---------------------------------------------------------------------------------------------- micro-batches


def limit_for(sequences: Sequence[TrainSequence], num_batches: int, share_prefix: bool = True) -> int:
    """The ``tokens_per_microbatch`` that gives this many micro-batches."""
    most = sum(len(s.token_ids) for s in sequences)
    if num_batches == 1:
        return most
    (whole,) = pack(sequences, tokens_per_microbatch=most, share_prefix=share_prefix)
    longest = max(len(s.token_ids) for s in sequences)
    for limit in range(max(longest, whole.num_tokens // num_batches), most + 1):  # fewer cannot hold them
        if len(pack(sequences, tokens_per_microbatch=limit, share_prefix=share_prefix)) == num_batches:
            return limit
    raise AssertionError(f"no limit packs these sequences into {num_batches} micro-batches")


def batches_of(
    sequences: Sequence[TrainSequence],
    *,
    num_batches: int = 1,
    share_prefix: bool = True,
    dtype: torch.dtype = torch.float64,
    proximal: Sequence[Sequence[float]] | None = None,
) -> list[TokenBatch]:
    limit = limit_for(sequences, num_batches, share_prefix)
    packed = pack(sequences, tokens_per_microbatch=limit, share_prefix=share_prefix, dtype=dtype)
    return [with_proximal(b, proximal) for b in packed] if proximal is not None else packed


def one_each(sequences: Sequence[TrainSequence], dtype: torch.dtype = torch.float64) -> list[TokenBatch]:
    """Every sequence a micro-batch of its own, in order, still numbered over the whole step."""
    batches: list[TokenBatch] = []
    for i, sequence in enumerate(sequences):
        batches += pack([sequence], tokens_per_microbatch=1000, first_sequence=i, dtype=dtype)
    return batches


def with_proximal(batch: TokenBatch, rows: Sequence[Sequence[float]]) -> TokenBatch:
    filled = batch.advantage.new_zeros(batch.num_targets)
    for s in batch.sequence_index.unique().tolist():
        filled[batch.sequence_index == s] = torch.tensor(rows[s], dtype=filled.dtype)
    return replace(batch, proximal_logprobs=filled)


# ------------------------------------------------------------------------------------------------------ steps


def parameters_of(policy: nn.Module) -> dict[str, Tensor]:
    """By the names that the model itself has for them."""
    return {name.removeprefix("model."): p.detach().clone() for name, p in policy.named_parameters()}


def plan_for(method: Method, **options: Any) -> StepPlan:
    defaults = {"step": 0, "learning_rate": 1.0, "temperature": 1.0, "max_length": MAX_LENGTH}
    return StepPlan(terms=method.terms, **{**defaults, **options})


def sgd_gradient(policy: Policy, batches: Sequence[TokenBatch], plan: StepPlan) -> dict[str, Tensor]:
    """What one plain SGD step moved the parameters by, over its learning rate; they are put back
    afterwards."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    run_step(policy, MasterOptimizer(policy, PLAIN_SGD), batches, plan)
    moved = {}
    with torch.no_grad():
        for name, p in policy.named_parameters():
            moved[name.removeprefix("model.")] = (before[name] - p) / plan.learning_rate
            p.copy_(before[name])
    return moved


def run_step(
    policy: Policy,
    optimizer: MasterOptimizer,
    batches: Sequence[TokenBatch],
    plan: StepPlan,
    check_stop: Callable[[], None] = lambda: None,
) -> StepReport:
    """One step, in the arithmetic of the reference where the policy is in float64."""
    if next(policy.parameters()).dtype is not torch.float64:
        return train_step(policy, optimizer, batches, plan, check_stop)
    with exact_float64():
        return train_step(policy, optimizer, batches, plan, check_stop)


def expected_gradient(
    model: nn.Module, sequences: Sequence[TrainSequence], family: Family, **options: Any
) -> dict[str, Tensor]:
    fixed = {"max_length": MAX_LENGTH} if named_part(family.reference).normaliser == "drg" else {}
    return reference_gradient(
        model,
        referred(sequences, family),
        method=family.reference,
        options=family.options,
        **fixed,
        **options,
    )


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().ravel() for name in sorted(tensors)])


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 0.0) -> float:
    assert set(got) == set(expected)
    size = float(flat(expected).norm())
    assert size > floor or floor > 0, "nothing to compare with"
    return float((flat(got) - flat(expected)).norm()) / max(size, floor)


def close(
    family: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float = EXACT
) -> None:
    """Assert that the relative error over all parameters is within ``limit``, and remember it."""
    check(family, relative_error(got, expected), limit)


def check(family: str, error: float, limit: float = EXACT) -> None:
    largest, count = LARGEST.get(family, (0.0, 0))
    LARGEST[family] = (max(largest, error), count + 1)
    assert error <= limit, f"{family}: relative error {error:.2e} > {limit:.0e}"
