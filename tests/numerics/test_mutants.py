"""Known faults, put into this very step one at a time: the comparison with the reference must go red for
each.

What a mutant leaves behind in the weights of the micro-batches is recovered, too, where it has a fingerprint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import (
    EXACT,
    FAMILIES,
    LLAMAS,
    UNEQUAL,
    Family,
    demonstrations,
    expected_gradient,
    flat,
    one_each,
    parameters_of,
    plan_for,
    relative_error,
    run_step,
    sequences_of,
    sgd_gradient,
    twins,
    with_proximal,
)
from torch import Tensor, nn

from truestep import faults
from truestep.model.attention import PackedLayout
from truestep.objective.normalise import local_total, normalise
from truestep.records import Origin, Segment, TokenBatch, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.testing.reference.loss import (
    exact_float64,
    frozen_logprobs,
    per_microbatch_gradients,
    reference_step,
)
from truestep.train import policy as policy_module
from truestep.train import step as step_module
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import dummy_batch, pack
from truestep.train.policy import Policy
from truestep.train.step import NonFiniteError

TEMPERATURE = 0.7
COUNTS = [list(UNEQUAL)]
NUM_TOKENS = sum(UNEQUAL)
Patch = pytest.MonkeyPatch


@functools.cache
def pair() -> tuple[Policy, nn.Module]:
    return twins(LLAMAS["gqa"])


# -------------------------------------------------------------------------------------------------- the check


@functools.cache
def proximal_rows(family: str) -> list[list[float]]:
    """Stale enough that tokens are clipped on either side."""
    draw = torch.Generator().manual_seed(2)
    rows = frozen_logprobs(pair()[1], sequences_of(FAMILIES[family], UNEQUAL), TEMPERATURE)
    return [[x + float(torch.randn((), generator=draw)) / 3 for x in row] for row in rows]


@functools.cache
def right_gradient(family: str) -> dict[str, Tensor]:
    f = FAMILIES[family]
    proximal = proximal_rows(family) if f.advantage else None
    sequences = sequences_of(f, UNEQUAL)
    return expected_gradient(pair()[1], sequences, f, proximal=proximal, temperature=TEMPERATURE)


def batches_for(family: Family, sequences: Sequence[TrainSequence], packed: bool) -> list[TokenBatch]:
    """All in one packed micro-batch, or four micro-batches and an empty one."""
    if packed:
        batches = pack(sequences, tokens_per_microbatch=1000, dtype=torch.float64)
    else:
        batches = [*one_each(sequences), dummy_batch(torch.float64, "cpu")]
    if family.advantage and sum(b.num_targets for b in batches) == sum(map(len, proximal_rows(family.name))):
        batches = [with_proximal(b, proximal_rows(family.name)) for b in batches]
    return batches


def check_against_reference(family: str, *, packed: bool = False, mutate: Callable[..., Any] = list) -> None:
    """Assert that the step's gradient is the reference's. ``mutate`` is the mutant of the data, if it is
    one."""
    f = FAMILIES[family]
    batches = batches_for(f, mutate(sequences_of(f, UNEQUAL)), packed)
    try:
        got = sgd_gradient(pair()[0], batches, plan_for(f.method, temperature=TEMPERATURE))
    except NonFiniteError as error:
        raise AssertionError(f"no gradient at all: {error}") from None
    error = relative_error(got, right_gradient(family))
    assert error <= EXACT, f"relative error {error:.1e}"


# ------------------------------------------------------------------------------------------------ the mutants


def own_mean(patch: Patch, scale: Callable[[int], float]) -> None:
    """Every micro-batch divides by its own number of tokens, then by ``scale`` of nothing but its own."""

    def mutant(
        values: Tensor, *, normaliser: Any, batch: TokenBatch, total: float, max_length: int
    ) -> Tensor:
        return values.sum() / scale(batch.num_targets)

    patch.setattr(step_module, "normalise", mutant)


def scaled(patch: Patch, factor: float) -> None:
    patch.setattr(step_module, "normalise", lambda values, **given: factor * normalise(values, **given))


def zero_grad_inside(patch: Patch) -> None:
    original = step_module.microbatch_loss

    def mutant(policy: Policy, *given: Any) -> Tensor:
        policy.zero_grad()
        return original(policy, *given)

    patch.setattr(step_module, "microbatch_loss", mutant)


def empty_counts_one(patch: Patch) -> None:
    def mutant(normaliser: Any, selected: Sequence[Tensor], batches: Sequence[TokenBatch]) -> float:
        return local_total(normaliser, selected, batches) + sum(float(not s.any()) for s in selected)

    patch.setattr(step_module, "local_total", mutant)


def seen_by_forward(patch: Patch, change: Callable[[TokenBatch, float], tuple[TokenBatch, float]]) -> None:
    """The forward pass gets another batch or temperature than the rest of the step."""
    original = Policy.forward
    patch.setattr(
        Policy, "forward", lambda self, batch, temperature: original(self, *change(batch, temperature))
    )


def shifted(by: int) -> Callable[[TokenBatch, float], tuple[TokenBatch, float]]:
    def change(batch: TokenBatch, temperature: float) -> tuple[TokenBatch, float]:
        moved = (batch.source_index + by).clamp(0, batch.num_tokens - 1)
        return replace(batch, source_index=moved), temperature

    return change


def one_big_row(patch: Patch) -> None:
    def mutant(segments: Sequence[Segment], position_ids: Tensor) -> PackedLayout:
        whole = Segment(start=0, stop=position_ids.shape[0])
        return PackedLayout((whole,), torch.arange(whole.stop))

    patch.setattr(policy_module, "PackedLayout", mutant)


def positions_do_not_restart(batch: TokenBatch, temperature: float) -> tuple[TokenBatch, float]:
    return replace(batch, position_ids=torch.arange(batch.num_tokens)), temperature


def in_loss(patch: Patch, change: Callable[[TokenBatch], TokenBatch]) -> None:
    """The loss gets another batch; the totals were counted from the right one."""
    original = step_module.microbatch_loss
    patch.setattr(
        step_module, "microbatch_loss", lambda policy, batch, *rest: original(policy, change(batch), *rest)
    )


def scaled_logprobs(patch: Patch) -> None:
    original = Policy.forward

    def mutant(self: Policy, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropy = original(self, batch, 1.0)
        return logprobs / temperature, entropy

    patch.setattr(Policy, "forward", mutant)


def no_proximal(batch: TokenBatch) -> TokenBatch:
    return replace(batch, proximal_logprobs=None)


def retrained(
    change: Callable[[list[bool]], list[bool]],
) -> Callable[[list[TrainSequence]], list[TrainSequence]]:
    """Other tokens are trained: a fault of the data, before anything is counted."""

    def mutate(sequences: list[TrainSequence]) -> list[TrainSequence]:
        found = []
        for s in sequences:
            trained = change([o is not Origin.CONTEXT for o in s.origin])
            of = next(o for o in s.origin if o is not Origin.CONTEXT)
            origin = tuple(of if t else Origin.CONTEXT for t in trained)
            found.append(replace(s, origin=origin, num_prefix_tokens=0, behavior_logprobs=None))
        return found

    return mutate


def prompt_too(trained: list[bool]) -> list[bool]:
    return [i > 0 and (t or i < trained.index(True)) for i, t in enumerate(trained)]


def last_not(trained: list[bool]) -> list[bool]:
    last = max(i for i, t in enumerate(trained) if t)
    return [t and i != last for i, t in enumerate(trained)]


def no_patch(patch: Patch) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """``install`` breaks the step, or ``mutate`` its data; the families are those that must see it."""

    install: Callable[[Patch], None] = no_patch
    families: tuple[str, ...] = ("sft", "grpo_token_mean")
    packed: bool = False
    mutate: Callable[..., Any] = list


TOKEN_MEANS = ("sft", "dft", "grpo_token_mean")
RL = ("grpo_token_mean", "grpo", "dr_grpo", "dapo")
MUTANTS = {
    "A3 mean of micro-batch means": Mutant(
        install=lambda p: own_mean(p, lambda n: max(1, n) * len(UNEQUAL)), families=TOKEN_MEANS
    ),
    "A3 and A5 sum of micro-batch means": Mutant(
        install=lambda p: own_mean(p, lambda n: max(1, n)), families=TOKEN_MEANS
    ),
    "A5 1/k forgotten": Mutant(install=lambda p: scaled(p, len(UNEQUAL)), families=("sft", "grpo")),
    "A5 1/k twice": Mutant(install=lambda p: scaled(p, 1 / len(UNEQUAL)), families=("sft", "grpo")),
    "A9 zero_grad inside the accumulation": Mutant(install=zero_grad_inside, families=("sft", "grpo")),
    "A10 padded width counted": Mutant(
        install=lambda p: scaled(p, NUM_TOKENS / (len(UNEQUAL) * max(UNEQUAL))), families=TOKEN_MEANS
    ),
    "A11 an empty micro-batch counts as one": Mutant(
        install=empty_counts_one, families=("sft", "grpo", "grpo_token_mean")
    ),
    "A11 an empty micro-batch is 0/0": Mutant(
        install=lambda p: own_mean(p, lambda n: torch.tensor(float(n))), families=("sft",)
    ),
    "B1 prompt tokens trained": Mutant(mutate=retrained(prompt_too), families=("sft", "dft")),
    "B1 prompt tokens trained, samples": Mutant(
        mutate=retrained(prompt_too), families=("grpo_token_mean", "grpo")
    ),
    "B2 stop token not trained": Mutant(
        mutate=retrained(last_not), families=("sft", "grpo_token_mean", "grpo")
    ),
    "B4 labels not shifted": Mutant(install=lambda p: seen_by_forward(p, shifted(1))),
    "B4 labels shifted twice": Mutant(install=lambda p: seen_by_forward(p, shifted(-1))),
    "B6 packed rows see each other": Mutant(install=one_big_row, packed=True),
    "B7 positions do not restart": Mutant(
        install=lambda p: seen_by_forward(p, positions_do_not_restart),
        packed=True,
        families=("grpo_token_mean",),
    ),
    "C1 temperature forgotten": Mutant(install=lambda p: seen_by_forward(p, lambda b, t: (b, 1.0))),
    "C1 temperature on log-probabilities": Mutant(install=scaled_logprobs),
    "advantages with the wrong sign": Mutant(
        install=lambda p: in_loss(p, lambda b: replace(b, advantage=-b.advantage)), families=RL
    ),
    "proximal policy forgotten": Mutant(install=lambda p: in_loss(p, no_proximal), families=RL),
    "sequence length of the wrong sequence": Mutant(
        install=lambda p: in_loss(p, lambda b: replace(b, sequence_length=b.sequence_length + 1)),
        families=("grpo", "sft_sequences"),
    ),
    "the gate's weights are not used": Mutant(
        install=lambda p: in_loss(p, lambda b: replace(b, weight=torch.full_like(b.weight, 0.5)))
    ),
}


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, m in MUTANTS.items() for f in m.families])
def test_mutant_is_killed(name: str, family: str, monkeypatch: Patch) -> None:
    mutant = MUTANTS[name]
    check_against_reference(family, packed=mutant.packed)
    mutant.install(monkeypatch)
    with pytest.raises(AssertionError, match=r"relative error|no gradient"):
        check_against_reference(family, packed=mutant.packed, mutate=mutant.mutate)
    monkeypatch.undo()
    check_against_reference(family, packed=mutant.packed)


# ----------------------------------------------------------------------------------------------- fingerprints


def recovered(
    batches: Sequence[TokenBatch], observed: dict[str, Tensor] | None = None, **options: Any
) -> np.ndarray:
    """The weight that every micro-batch of the SFT step really had; nothing else may be in the step."""
    policy, model = pair()
    got = observed or sgd_gradient(policy, batches, plan_for(FAMILIES["sft"].method, **options))
    sums, counts = per_microbatch_gradients(model, demonstrations(UNEQUAL), [[i] for i in range(4)])
    assert counts == list(UNEQUAL)
    weights, residual, condition = faults.recover_weights(
        flat(got).numpy(), [flat(g).numpy() / NUM_TOKENS for g in sums]
    )
    assert residual < 1e-12
    assert condition < 100
    return weights


FINGERPRINTS: dict[str, tuple[Callable[[Patch], None], dict[str, Any], faults.WeightsOf]] = {
    "right": (no_patch, {}, faults.right),
    "A1": (no_patch, {"microbatch_weights": [1.0, 0.0, 0.0, 1.0]}, faults.offload_first_last),
    "A3": (MUTANTS["A3 mean of micro-batch means"].install, {}, faults.micro_mean),
    "A3 and A5": (
        MUTANTS["A3 and A5 sum of micro-batch means"].install,
        {},
        faults.micro_mean_without_1_over_k,
    ),
    "A5 forgotten": (MUTANTS["A5 1/k forgotten"].install, {}, faults.one_over_k_forgotten),
    "A5 twice": (MUTANTS["A5 1/k twice"].install, {}, faults.one_over_k_twice),
    "A9": (zero_grad_inside, {}, faults.last_only),
}


@pytest.mark.parametrize("name", list(FINGERPRINTS))
def test_the_weights_say_which_fault_it_was(name: str, monkeypatch: Patch) -> None:
    install, options, weights_of = FINGERPRINTS[name]
    install(monkeypatch)
    got = recovered(one_each(demonstrations(UNEQUAL)), **options)
    np.testing.assert_allclose(got, weights_of(COUNTS), atol=1e-11)
    others = [w(COUNTS) for n, (_, _, w) in FINGERPRINTS.items() if n != name]
    assert min(float(np.abs(got - other).max()) for other in others) > 0.1, "two faults look alike"


def test_a1_offload_drop_is_killed() -> None:
    """The catalogue's vector as data: the step does what it is told, and the comparison sees it."""
    weights = list(faults.offload_first_last([[*UNEQUAL]]))
    plan = plan_for(FAMILIES["sft"].method, temperature=TEMPERATURE, microbatch_weights=weights)
    got = sgd_gradient(pair()[0], one_each(demonstrations(UNEQUAL)), plan)
    assert relative_error(got, right_gradient("sft")) > 0.1


@pytest.mark.parametrize("mutated", [False, True], ids=["right", "A4 rank-wise mean"])
def test_a4_rank_wise_mean(mutated: bool, monkeypatch: Patch) -> None:
    """Two ranks with 4 and 44 tokens, each run here in turn: their gradients are summed (right) or, each
    divided by its own tokens, averaged."""
    policy, batches = pair()[0], one_each(demonstrations(UNEQUAL))
    parts = [[batches[0], batches[2]], [batches[1], batches[3]]]
    original = step_module.count_totals
    if not mutated:
        monkeypatch.setattr(
            step_module, "count_totals", lambda terms, _, ranks: original(terms, batches, ranks)
        )
    found = [sgd_gradient(policy, part, plan_for(FAMILIES["sft"].method)) for part in parts]
    summed = {name: (found[0][name] + found[1][name]) / (2 if mutated else 1) for name in found[0]}
    got = recovered(batches, summed)
    rank_mean = faults.rank_mean([[2, 2], [27, 17]])
    expected = rank_mean[[0, 2, 1, 3]] if mutated else np.ones(4)
    np.testing.assert_allclose(got, expected, atol=1e-11)
    assert (float(np.abs(got - 1).max()) > 0.1) == mutated


# --------------------------------------------------------------------------------------------- clipping (A12)

CLIPPED = OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.3)


def check_clipped() -> None:
    """One clip of the whole gradient, as in the textbook step."""
    policy, model = pair()
    batches = one_each(demonstrations(UNEQUAL))
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved, _, norm = reference_step(start, right_gradient("sft"), None, 1.0, CLIPPED)
    assert norm > 2 * CLIPPED.max_grad_norm
    plan = plan_for(FAMILIES["sft"].method, temperature=TEMPERATURE)
    report = run_step(policy, MasterOptimizer(policy, CLIPPED), batches, plan)
    after = parameters_of(policy)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.copy_(before[name])
    error = relative_error({n: after[n] - start[n] for n in after}, {n: moved[n] - start[n] for n in moved})
    assert error <= EXACT, f"relative error {error:.1e}"
    assert abs(report.grad_norm / norm - 1) <= EXACT


def clip_every_microbatch(patch: Patch) -> None:
    original = step_module.microbatch_loss

    def mutant(policy: Policy, *given: Any) -> Tensor:
        nn.utils.clip_grad_norm_(policy.parameters(), CLIPPED.max_grad_norm)
        return original(policy, *given)

    patch.setattr(step_module, "microbatch_loss", mutant)


def clip_every_tensor(patch: Patch) -> None:
    def mutant(gradients: Any, norm: float, max_norm: float) -> None:
        for g in gradients:
            g.mul_(min(1.0, max_norm / (float(g.norm()) + 1e-6)))

    patch.setattr(step_module, "clip_", mutant)


def clip_by_local_norm(patch: Patch) -> None:
    """A norm of half of the gradient, as of one shard of two."""
    original = step_module.global_norm
    patch.setattr(
        step_module, "global_norm", lambda gradients, *a, **k: original(list(gradients)[::2], *a, **k)
    )


@pytest.mark.parametrize("install", [clip_every_microbatch, clip_every_tensor, clip_by_local_norm])
def test_a12_wrong_clip_is_killed(install: Callable[[Patch], None], monkeypatch: Patch) -> None:
    check_clipped()
    install(monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        check_clipped()


def test_the_reference_arithmetic_is_needed() -> None:
    """Outside ``exact_float64`` transformers' own float32 casts would hide anything below 1e-7."""
    policy, batches = (
        pair()[0],
        pack(demonstrations(UNEQUAL), tokens_per_microbatch=1000, dtype=torch.float64),
    )
    with torch.no_grad():
        narrow, _ = policy(batches[0], 1.0)
        with exact_float64():
            exact, _ = policy(batches[0], 1.0)
    assert 1e-12 < float((narrow - exact).abs().max()) < 1e-4
