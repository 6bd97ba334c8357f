"""The update is the one that was asked for, however the batch is cut, ordered, packed or padded: float64
decides."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from step_cases import (
    FAMILIES,
    LLAMAS,
    SINGLE,
    UNEQUAL,
    Family,
    batches_of,
    close,
    demonstrations,
    expected_gradient,
    flat,
    make_policy,
    one_each,
    parameters_of,
    plan_for,
    referred,
    relative_error,
    run_step,
    sequences_of,
    sgd_gradient,
    twins,
    with_proximal,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from truestep.model.attention import PackedLayout
from truestep.objective.methods import build
from truestep.objective.schedule import learning_rate
from truestep.records import Origin, RecordError, TokenBatch, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.testing.reference.loss import StepResult, frozen_logprobs, reference_loss, reference_steps
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import dummy_batch, pack
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.step import count_totals

ALL = list(FAMILIES)
TEMPERATURES = (0.6, 1.0, 1.7)


@functools.cache
def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[Policy, nn.Module]:
    return twins(LLAMAS[name], dtype)


@functools.cache
def expected(model: str, family: str, temperature: float, lengths: tuple[int, ...] = ()) -> dict[str, Tensor]:
    sequences = sequences_of(FAMILIES[family], *([lengths] if lengths else []))
    return expected_gradient(pair(model)[1], sequences, FAMILIES[family], temperature=temperature)


# --------------------------------------------------------------------------------------- cutting and ordering


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("family", ALL)
def test_any_split_gives_the_reference_gradient(family: str, temperature: float) -> None:
    model = "gqa" if temperature == 1.0 else "tied"
    policy, plan = pair(model)[0], plan_for(FAMILIES[family].method, temperature=temperature)
    for num_batches in (1, 2, 4, 8):
        batches = batches_of(sequences_of(FAMILIES[family]), num_batches=num_batches)
        assert len(batches) == num_batches
        close(f"split, {family}", sgd_gradient(policy, batches, plan), expected(model, family, temperature))


@pytest.mark.parametrize("family", ALL)
def test_very_unequal_lengths_one_sequence_a_microbatch(family: str) -> None:
    """Where a mean of means, a share per micro-batch or a padded width would be seen best."""
    policy, f = pair("tied")[0], FAMILIES[family]
    batches = one_each(sequences_of(f, UNEQUAL))
    assert max(b.num_targets for b in batches) >= 8 * min(b.num_targets for b in batches)
    close(
        f"unequal, {family}",
        sgd_gradient(policy, batches, plan_for(f.method)),
        expected("tied", family, 1.0, UNEQUAL),
    )


@pytest.mark.parametrize("family", ALL)
def test_order_prefix_sharing_and_packing_do_not_matter(family: str) -> None:
    policy, f = pair("gqa")[0], FAMILIES[family]
    sequences, plan, right = sequences_of(f), plan_for(f.method), expected("gqa", family, 1.0)
    backwards = [
        sequences[i] for i in torch.randperm(len(sequences), generator=torch.Generator().manual_seed(3))
    ]
    close(f"permuted, {family}", sgd_gradient(policy, batches_of(backwards, num_batches=3), plan), right)
    for share_prefix in (True, False):
        batches = batches_of(sequences, num_batches=2, share_prefix=share_prefix)
        close(f"prefix sharing, {family}", sgd_gradient(policy, batches, plan), right)
    policy.packs = False
    try:
        for share_prefix in (True, False):
            batches = batches_of(sequences, num_batches=2, share_prefix=share_prefix)
            close(f"one by one, {family}", sgd_gradient(policy, batches, plan), right)
    finally:
        policy.packs = True


def test_sharing_a_prefix_forwards_fewer_tokens() -> None:
    """Else the relation above would compare a thing with itself."""
    sequences = sequences_of(FAMILIES["grpo_token_mean"])
    shared, alone = (batches_of(sequences, share_prefix=s)[0].num_tokens for s in (True, False))
    prompts = {s.group: s.num_prefix_tokens for s in sequences}
    copies = {g: sum(s.group == g for s in sequences) - 1 for g in prompts}
    assert alone - shared == sum(prompts[g] * copies[g] for g in prompts) > 0


@pytest.mark.parametrize("family", ["sft", "grpo"])
def test_bucket_padding_does_not_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one padded bucket, or every segment alone without a padded place."""
    policy, f = pair("tied")[0], FAMILIES[family]
    batches, right = batches_of(sequences_of(f, UNEQUAL)), expected("tied", family, 1.0, UNEQUAL)
    num_places = []
    for free, most in ((1 << 30, 1e9), (0, 0.0)):
        monkeypatch.setattr(PackedLayout, "FREE_PAIRS", free)
        monkeypatch.setattr(PackedLayout, "MOST_PADDING", most)
        close(f"bucket padding, {family}", sgd_gradient(policy, batches, plan_for(f.method)), right)
        buckets, _ = PackedLayout(batches[0].segments, batches[0].position_ids)._plan(None)
        num_places.append(sum(b.queries.numel() for b in buckets))
    assert num_places[0] > num_places[1] == batches[0].num_tokens


@pytest.mark.parametrize("family", ["sft", "sft_sequences", "dft", "grpo_token_mean", "grpo", "dr_grpo"])
def test_every_sequence_twice_gives_the_same_gradient(family: str) -> None:
    policy, f = pair("tied")[0], FAMILIES[family]
    batches = batches_of([*sequences_of(f), *sequences_of(f)], num_batches=3)
    close(
        f"duplicated, {family}",
        sgd_gradient(policy, batches, plan_for(f.method)),
        expected("tied", family, 1.0),
    )


@pytest.mark.parametrize("family", ALL)
def test_nothing_to_train_adds_nothing(family: str) -> None:
    """A sequence without trained tokens, and a micro-batch without targets, first, between and last."""
    policy, f = pair("tied")[0], FAMILIES[family]
    sequences, plan, right = sequences_of(f), plan_for(f.method), expected("tied", family, 1.0)
    masked = TrainSequence(
        token_ids=(3, 4, 5, 6), origin=(Origin.CONTEXT,) * 4, num_prefix_tokens=0, group=90
    )
    close(
        f"all masked, {family}", sgd_gradient(policy, batches_of([masked, *sequences, masked]), plan), right
    )
    dummy = dummy_batch(torch.float64, "cpu")
    first, second = batches_of(sequences, num_batches=2)
    batches = [dummy, first, dummy, second, dummy]
    close(f"all masked, {family}", sgd_gradient(policy, batches, plan), right)


@pytest.mark.parametrize("family", ["sft", "grpo"])
def test_gradient_checkpointing_changes_memory_only(family: str) -> None:
    f, products = FAMILIES[family], {}
    for kind in (False, "selective", True):
        policy = make_policy(LLAMAS["tied"], gradient_checkpointing=kind)
        with CountProducts() as count:
            got = sgd_gradient(policy, batches_of(sequences_of(f), num_batches=2), plan_for(f.method))
        close(f"gradient checkpointing {kind}, {family}", got, expected("tied", family, 1.0))
        products[kind] = count.number
    assert products[False] == products["selective"] < products[True]  # what is dear is kept


class CountProducts(TorchDispatchMode):
    """Counts matrix products, those of the backward pass and of recomputation included."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_sequences_of_a_step_need_numbers_of_their_own() -> None:
    """Packed in two calls that number them alike, a mean over sequences would take two for one."""
    policy, f = pair("tied")[0], FAMILIES["grpo"]
    sequences, plan, right = sequences_of(f), plan_for(f.method), expected("tied", "grpo", 1.0)

    def packed(first_of_the_second: int) -> list[TokenBatch]:
        parts = (sequences[:5], 0), (sequences[5:], first_of_the_second)
        return [
            batch
            for part, first in parts
            for batch in pack(part, tokens_per_microbatch=60, first_sequence=first, dtype=torch.float64)
        ]

    close("packed in two calls", sgd_gradient(policy, packed(5), plan), right)
    close("packed in two calls", sgd_gradient(policy, packed(900), plan), right)
    for first in (0, 4):  # all numbers twice, or one
        with pytest.raises(RecordError, match="contain the same sequence number; pack all sequences"):
            sgd_gradient(policy, packed(first), plan)
        with pytest.raises(RecordError, match="or pass different first_sequence numbers"):
            count_totals(plan.terms, packed(first), Ranks())


def test_a_micro_batch_lacks_a_column_that_none_of_its_tokens_needs() -> None:
    """The KL term reads reference values of own samples; a rank without work and demonstrations have none."""
    policy, f = pair("tied")[0], FAMILIES["grpo"]
    method = build("grpo", {"kl": "k2", "kl_coef": 0.1})
    shown = [replace(s, group=s.group + 50) for s in demonstrations((5, 3), seed=8)]
    own = batches_of(sequences_of(f), num_batches=2)
    own = [replace(b, reference_logprobs=b.advantage - 1.0) for b in own]
    others = [*pack(shown, tokens_per_microbatch=99, first_sequence=90, dtype=torch.float64)]
    right = sgd_gradient(policy, own, plan_for(method))
    dummy = dummy_batch(torch.float64, "cpu")
    close("columns", sgd_gradient(policy, [dummy, *own, *others], plan_for(method)), right)
    with pytest.raises(RecordError, match="reads reference_logprobs, which this step does not have"):
        sgd_gradient(policy, [replace(own[0], reference_logprobs=None), own[1]], plan_for(method))


def test_a_step_without_any_target_is_a_step_of_zero() -> None:
    policy = pair("tied")[0]
    for batches in ([], [dummy_batch(torch.float64, "cpu")]):
        got = sgd_gradient(policy, batches, plan_for(FAMILIES["grpo_token_mean"].method))
        assert float(flat(got).norm()) == 0.0


def test_microbatch_weights_multiply_numerators_only() -> None:
    policy, model = pair("tied")
    sequences, weights = demonstrations(UNEQUAL), [1.0, 0.0, 0.5, -2.0]
    right = expected_gradient(
        model, sequences, FAMILIES["sft"], microbatches=[([i], w) for i, w in enumerate(weights)]
    )
    plan = plan_for(FAMILIES["sft"].method, microbatch_weights=weights)
    close("micro-batch weights", sgd_gradient(policy, one_each(sequences), plan), right)


def test_tokens_of_another_origin_are_not_selected() -> None:
    """Demonstrations in the batch change neither the numerator nor the denominator of the policy term, nor
    the other way round."""
    policy, model = pair("gqa")
    own, shown = sequences_of(FAMILIES["grpo"]), demonstrations((5, 3, 9), seed=8)
    shown = [replace(s, group=s.group + 50) for s in shown]
    batches = batches_of([*shown[:2], *own, shown[2]], num_batches=2)
    close(
        "mixed origins",
        sgd_gradient(policy, batches, plan_for(FAMILIES["grpo"].method)),
        expected("gqa", "grpo", 1.0),
    )
    right = expected_gradient(model, shown, FAMILIES["sft"])
    close("mixed origins", sgd_gradient(policy, batches, plan_for(FAMILIES["sft"].method)), right)


# ------------------------------------------------------------------------------------------ the second update


def stale(
    model: nn.Module, sequences: list[TrainSequence], temperature: float, spread: float
) -> list[list[float]]:
    """Proximal log-probabilities: the policy's own, moved by up to ``spread``."""
    draw = torch.Generator().manual_seed(11)
    rows = frozen_logprobs(model, sequences, temperature)
    return [[x + spread * (2 * float(torch.rand((), generator=draw)) - 1) for x in row] for row in rows]


@pytest.mark.parametrize("family", ["grpo_token_mean", "grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 0.1), (0.6, 1.5)])
def test_second_update_clips_as_the_surrogate_does(family: str, temperature: float, spread: float) -> None:
    policy, model = pair("tied")
    f = FAMILIES[family]
    sequences = sequences_of(f)
    proximal = stale(model, sequences, temperature, spread)
    right = expected_gradient(model, sequences, f, proximal=proximal, temperature=temperature)
    first = expected("tied", family, temperature)
    assert relative_error(right, first) > 1e-3, "these proximal log-probabilities change nothing"
    for num_batches in (1, 4):
        batches = batches_of(sequences, num_batches=num_batches, proximal=proximal)
        got = sgd_gradient(policy, batches, plan_for(f.method, temperature=temperature))
        close(f"second update, {family}", got, right)


def test_micro_batches_with_proximal_values_mix_with_those_without() -> None:
    """One without them is at its first update: there the policy is the proximal policy."""
    policy, model = pair("tied")
    f = FAMILIES["grpo_token_mean"]
    sequences = sequences_of(f)
    proximal: list[Any] = stale(model, sequences, 1.0, 0.8)
    first, second = batches_of(sequences, num_batches=2)
    held = set(second.sequence_index.tolist())
    assert 0 < len(held) < len(sequences)
    given = [row if i in held else None for i, row in enumerate(proximal)]
    right = expected_gradient(model, sequences, f, proximal=given)
    batches = [first, with_proximal(second, proximal)]
    close("second update, partly given", sgd_gradient(policy, batches, plan_for(f.method)), right)


# ---------------------------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("model", list(LLAMAS))
@pytest.mark.parametrize("family", ALL)
def test_float32_is_as_close_as_float32_can_be(family: str, model: str) -> None:
    policy, f = pair(model, torch.float32)[0], FAMILIES[family]
    # A learning rate of 1024: the update is large against the rounding of the parameters that it is read
    # from.
    plan = plan_for(f.method, learning_rate=1024.0, temperature=0.6)
    for num_batches in (1, 4):
        batches = batches_of(sequences_of(f), num_batches=num_batches, dtype=torch.float32)
        got = sgd_gradient(policy, batches, plan)
        close(f"float32, {family}", got, expected(model, family, 0.6), SINGLE)


# ------------------------------------------------------------------------------------------------ three steps

ADAMW = OptimizerSettings(
    lr=1e-2, schedule="cosine", warmup_fraction=0.2, min_lr_ratio=0.1, weight_decay=0.1, max_grad_norm=0.5
)
TOTAL_STEPS = 5


def data_of(family: Family, step: int) -> list[TrainSequence]:
    return sequences_of(family, seed=20 + step)


def reference_run(model: nn.Module, family: Family) -> list[StepResult]:
    losses = [
        lambda m, step=step: reference_loss(
            m, referred(data_of(family, step), family), method=family.reference
        )
        for step in range(3)
    ]
    return reference_steps(model, losses, ADAMW, TOTAL_STEPS)


def own_run(policy: Policy, family: Family, num_batches: int) -> dict[str, Tensor]:
    """Three steps, then what they moved; the parameters are put back."""
    rate = learning_rate(
        peak=ADAMW.lr, kind="cosine", total_steps=TOTAL_STEPS, warmup_fraction=0.2, min_ratio=0.1
    )
    optimizer, before = (
        MasterOptimizer(policy, ADAMW),
        {n: p.detach().clone() for n, p in policy.named_parameters()},
    )
    dtype = next(policy.parameters()).dtype
    norms = []
    for step in range(3):
        batches = batches_of(data_of(family, step), num_batches=num_batches, dtype=dtype)
        plan = plan_for(family.method, step=step, learning_rate=rate(step))
        norms.append(run_step(policy, optimizer, batches, plan).grad_norm)
    assert max(norms) > ADAMW.max_grad_norm, "nothing was clipped"
    after = parameters_of(policy)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.copy_(before[name])
    return {name: after[name] - before[f"model.{name}"] for name in after}


@pytest.mark.parametrize("family", ["sft", "grpo_token_mean"])
def test_three_adamw_steps_with_clipping_warmup_and_cosine(family: str) -> None:
    f = FAMILIES[family]
    policy, model = pair("tied")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = reference_run(model, f)[-1].parameters
    moved = {name: result[name] - before[name] for name in result}
    for num_batches in (1, 4):
        close(f"AdamW float64, {family}", own_run(policy, f, num_batches), moved, 1e-10)

    # What float32 costs is measured, not guessed: the reference's answer to parameters off by one rounding.
    shaken = twins(LLAMAS["tied"])[1]
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        for p in shaken.parameters():
            p.mul_(1 + 2**-24 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    start = {name: p.detach().clone() for name, p in shaken.named_parameters()}
    other = reference_run(shaken, f)[-1].parameters
    noise = relative_error({name: other[name] - start[name] for name in other}, moved)
    narrow = pair("tied", torch.float32)[0]
    for num_batches in (1, 4):
        close(f"AdamW float32, {family}", own_run(narrow, f, num_batches), moved, 10 * noise)


def test_the_relations_can_fail() -> None:
    """A gradient that is wrong by one part in a million is told apart in float64."""
    policy = pair("tied")[0]
    batches = batches_of(sequences_of(FAMILIES["sft"]))
    got = sgd_gradient(policy, batches, plan_for(FAMILIES["sft"].method, microbatch_weights=[1 + 1e-6]))
    assert 0.5e-6 < relative_error(got, expected("tied", "sft", 1.0)) < 2e-6
