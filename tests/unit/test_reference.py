"""The reference loss against closed forms, transformers' own loss and finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from truestep.records import Origin, TrainSequence
from truestep.testing.reference.loss import (
    denominator,
    exact_float64,
    frozen_logprobs,
    gradient,
    group_advantages,
    reference_gradient,
    reference_loss,
    trained_tokens,
)
from truestep.testing.reference.rows import named_part

torch.set_num_threads(1)
VOCABULARY, LONGEST = 20, 12


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # logits far from uniform, so that p, p² and 1 are told apart
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def make_sequences() -> list[TrainSequence]:
    """Three groups, very unequal lengths; the last group's rewards are all equal; one
    demonstration, one stored sample, one that continues a prefix."""
    draw = np.random.default_rng(0)
    sequences = []
    own, expert, stored = Origin.POLICY, Origin.EXPERT, Origin.STORED
    shapes = [
        (0, 3, own),
        (0, 9, expert),
        (0, 1, stored),
        (1, 5, own),
        (1, 2, expert),
        (2, 4, own),
        (2, 7, own),
    ]
    for i, (group, length, origin) in enumerate(shapes):
        origins = [Origin.CONTEXT] * 2 + [origin] * length
        if length > 4:
            origins[4] = Origin.CONTEXT  # a tool's words in the middle of a completion
        if i == 3:
            origins[2:4] = [expert, expert]  # the beginning that this sample continues
        num_trained = sum(o is not Origin.CONTEXT for o in origins)
        advantage: tuple[float, ...] | float = [0.75, -0.25, 0.5, -1.0, 1.5, 0.6, -0.9][i]
        if i == 3:
            advantage = tuple(draw.normal(size=num_trained))
        sequences.append(
            TrainSequence(
                token_ids=tuple(int(t) for t in draw.integers(0, VOCABULARY, length + 2)),
                origin=tuple(origins),
                num_prefix_tokens=2,
                group=group,
                advantage=advantage,
                behavior_logprobs=tuple(draw.normal(-2, 0.5, num_trained)),
                weight=[1.0, 0.5, 2.0, 1.0, 1.0, 3.0, 1.0][i],
                reward=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0][i],
            )
        )
    return sequences


SEQUENCES = make_sequences()


@pytest.fixture(scope="module")
def proximal(model: LlamaForCausalLM) -> list[list[float]]:
    """Half the ratios lie outside the clip range, on both sides."""
    draw = np.random.default_rng(1)
    return [[x + draw.normal(0, 0.4) for x in row] for row in frozen_logprobs(model, SEQUENCES)]


def flat(gradients: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([g.numpy().ravel() for g in gradients.values()])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ------------------------------------------------------------------------------------------ the model's words


def test_log_probabilities_are_float64_throughout(model: LlamaForCausalLM) -> None:
    """The same difference quotient that agrees with the gradient inside the mode is noise outside it."""
    weight = model.model.layers[0].mlp.up_proj.weight
    row = torch.tensor([SEQUENCES[1].token_ids])

    def plain() -> Tensor:
        return torch.log_softmax(model(input_ids=row, use_cache=False).logits[0, -2], -1)[3]

    def exact() -> Tensor:
        with exact_float64():
            return plain()

    errors = []
    for evaluate in (plain, exact):
        (g,) = torch.autograd.grad(evaluate(), weight)
        with torch.no_grad():
            weight[3, 4] += 1e-5
            above = evaluate()
            weight[3, 4] -= 2e-5
            below = evaluate()
            weight[3, 4] += 1e-5
        errors.append(abs(float((above - below) / 2e-5 - g[3, 4])))
    assert errors[1] < 1e-8 < 1e-5 < errors[0]


def test_sft_equals_the_loss_of_transformers(model: LlamaForCausalLM) -> None:
    sequence = replace(SEQUENCES[1], weight=1.0)
    ids = torch.tensor([sequence.token_ids])
    labels = torch.where(torch.tensor([sequence.origin]) != int(Origin.CONTEXT), ids, -100)
    with exact_float64():
        theirs = model(input_ids=ids, labels=labels).loss
    ours = reference_loss(model, [sequence])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-13)
    assert distance(flat(gradient(model, ours)), flat(gradient(model, theirs))) < 1e-12


def test_a_parameter_without_a_part_has_gradient_zero(model: LlamaForCausalLM) -> None:
    larger = copy.deepcopy(model)
    larger.idle = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    gradients = reference_gradient(larger, SEQUENCES)
    assert torch.equal(gradients.pop("idle"), torch.zeros(3, dtype=torch.float64))
    assert np.array_equal(flat(gradients), flat(reference_gradient(model, SEQUENCES)))


def test_temperature_divides_the_logits(model: LlamaForCausalLM) -> None:
    cooled = copy.deepcopy(model)
    with torch.no_grad():
        cooled.lm_head.weight /= 0.7
    at_temperature = frozen_logprobs(model, SEQUENCES, temperature=0.7)
    assert np.allclose(
        np.concatenate(at_temperature), np.concatenate(frozen_logprobs(cooled, SEQUENCES)), rtol=1e-12
    )
    assert not np.allclose(
        np.concatenate(at_temperature), np.concatenate(frozen_logprobs(model, SEQUENCES)), rtol=1e-2
    )


def test_dropout_is_off_and_the_mode_of_the_model_stays(model: LlamaForCausalLM) -> None:
    dropping = copy.deepcopy(model).train()
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert frozen_logprobs(dropping, SEQUENCES) == frozen_logprobs(model, SEQUENCES)
    assert dropping.training


def test_a_model_in_float32_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="float64"):
        reference_loss(copy.deepcopy(model).float(), SEQUENCES)


# ------------------------------------------------------------------------- surrogates = coefficient × ∇ log π


def ppo(r: float, a: float, low: float, high: float) -> float:
    inside = r <= 1 + high if a > 0 else r >= 1 - low
    return a * r if inside else 0.0


def sapo(r: float, a: float) -> float:
    tau = 1.0 if a > 0 else 1.05
    gate = 1 / (1 + math.exp(-tau * (r - 1)))
    return 4 * gate * (1 - gate) * r * a


def on_or(special: Origin, coefficient: Callable[..., float], **token: float) -> float:
    return coefficient(**token) if token["origin"] == special else token["a"] * token["r"]


# p: the policy's probability; q: the proximal one; b: the behavior one; r = p/q; s: the sequence's ratio; a:
# advantage
COEFFICIENTS: dict[str, Callable[..., float]] = {
    "sft": lambda **_: 1.0,
    "dft": lambda p, **_: p,
    "chord_phi": lambda p, **_: p * (1 - p),
    "trsft": lambda p, **_: p / max(p, 0.1),
    "psft": lambda r, **_: r if r <= 1.28 else 0.0,
    "grpo_token_mean": lambda r, a, **_: ppo(r, a, 0.2, 0.28),
    "grpo": lambda r, a, **_: ppo(r, a, 0.2, 0.2),
    "dr_grpo": lambda r, a, **_: ppo(r, a, 0.2, 0.2),
    "dapo": lambda r, a, **_: ppo(r, a, 0.2, 0.28),
    "gspo": lambda s, a, **_: ppo(s, a, 3e-4, 4e-4),
    "cispo": lambda r, a, **_: min(max(r, 0.8), 1.28) * a,
    "sapo": lambda r, a, **_: sapo(r, a),
    "rloo": lambda r, a, **_: a * r,
    "luffy": partial(on_or, Origin.EXPERT, lambda a, p, **_: a * 0.1 * p / (p + 0.1) ** 2),
    "exgrpo": partial(on_or, Origin.STORED, lambda a, p, b, **_: a * 0.1 * (p / b) / (p / b + 0.1) ** 2),
    "rl_plus": partial(on_or, Origin.EXPERT, lambda a, p, q, **_: a * (1 - p) ** 0.5 * 4 * p / (3 * q + 1)),
}


def coefficient_gradient(
    model: LlamaForCausalLM, proximal: list[list[float]], method: str, coefficient: Callable[..., float]
) -> dict[str, Tensor]:
    """Gradient of −Σ weight·C·log π / Z with plain numbers C, over the sequences that the method keeps."""
    kept = [i for i in range(len(SEQUENCES)) if method != "dapo" or SEQUENCES[i].group != 2]
    num_tokens = sum(SEQUENCES[i].num_trained for i in kept)
    total = torch.zeros((), dtype=torch.float64)
    for i in kept:
        sequence, length = SEQUENCES[i], SEQUENCES[i].num_trained
        z = {"tok": num_tokens, "seq": length * len(kept), "sum": len(kept), "drg": len(kept) * LONGEST}
        policy, _ = trained_tokens(model, sequence)
        origins = [o for o in sequence.origin if o is not Origin.CONTEXT]
        log_ratio = sum(x.item() - y for x, y in zip(policy, proximal[i], strict=True)) / length
        advantage = (
            sequence.advantage if isinstance(sequence.advantage, tuple) else [sequence.advantage] * length
        )
        for t, logprob in enumerate(policy):
            p, q = math.exp(logprob.item()), math.exp(proximal[i][t])
            b, s = math.exp(sequence.behavior_logprobs[t]), math.exp(log_ratio)
            c = coefficient(p=p, q=q, b=b, r=p / q, s=s, a=advantage[t], origin=origins[t])
            if method == "gspo":  # every token of a sequence carries the mean of what its tokens ask for
                c = sum(coefficient(s=s, a=a) for a in advantage) / length
            total = total - sequence.weight * c * logprob / z[named_part(method).normaliser]
    return gradient(model, total)


@pytest.mark.parametrize("method", COEFFICIENTS)
def test_surrogates_have_the_gradient_of_their_closed_form(
    model: LlamaForCausalLM, proximal: list[list[float]], method: str
) -> None:
    theirs = flat(coefficient_gradient(model, proximal, method, COEFFICIENTS[method]))
    ours = flat(reference_gradient(model, SEQUENCES, proximal, method=method, max_length=LONGEST))
    assert distance(ours, theirs) < 1e-12
    unweighted = [replace(s, weight=1.0) for s in SEQUENCES]
    assert (
        distance(
            flat(reference_gradient(model, unweighted, proximal, method=method, max_length=LONGEST)), ours
        )
        > 0.01
    )


def test_dual_clip_silences_what_one_clip_lets_grow(
    model: LlamaForCausalLM, proximal: list[list[float]]
) -> None:
    far = [
        [x + (0.3 if t % 2 else -1.5) for t, x in enumerate(row)] for row in proximal
    ]  # ratios on all sides of 1.28 and 3
    both = flat(
        coefficient_gradient(
            model, far, "grpo_token_mean", lambda r, a, **_: ppo(r, a, 0.2, 0.28) * (a > 0 or r <= 3)
        )
    )
    options = {"dual_clip": 3.0}
    assert (
        distance(
            flat(reference_gradient(model, SEQUENCES, far, method="grpo_token_mean", options=options)), both
        )
        < 1e-12
    )
    assert distance(flat(reference_gradient(model, SEQUENCES, far, method="grpo_token_mean")), both) > 0.1


@pytest.mark.parametrize("method", ["grpo_token_mean", "gspo", "luffy"])
def test_losses_have_the_slope_of_their_gradient(
    model: LlamaForCausalLM, proximal: list[list[float]], method: str
) -> None:
    """Central differences along a random direction: the loss that is reported is the loss that is
    differentiated."""
    probe = copy.deepcopy(model)
    loss = partial(reference_loss, probe, SEQUENCES, proximal, method=method, max_length=LONGEST)
    torch.manual_seed(3)
    direction = {name: torch.randn_like(p) for name, p in probe.named_parameters()}
    slope = sum(float((g * direction[name]).sum()) for name, g in gradient(probe, loss()).items())

    def at(step: float) -> float:
        with torch.no_grad():
            for name, p in probe.named_parameters():
                p.add_(step * direction[name])
            value = loss().item()
            for name, p in probe.named_parameters():
                p.sub_(step * direction[name])
        return value

    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_log_probabilities_of_other_tokens_are_refused(
    model: LlamaForCausalLM, proximal: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match="2 proximal log-probabilities for 3 trained tokens"):
        reference_loss(model, SEQUENCES, [proximal[0][:2], *proximal[1:]], method="grpo_token_mean")


def test_without_proximal_the_ratio_is_one(model: LlamaForCausalLM) -> None:
    own = frozen_logprobs(model, SEQUENCES)
    first = flat(reference_gradient(model, SEQUENCES, method="grpo_token_mean"))
    assert np.array_equal(first, flat(reference_gradient(model, SEQUENCES, own, method="grpo_token_mean")))
    assert np.array_equal(
        first, flat(reference_gradient(model, SEQUENCES, [None] * 7, method="grpo_token_mean"))
    )
    plain = reference_gradient(model, SEQUENCES, method="rloo", options={"normaliser": "tok"})
    assert distance(first, flat(plain)) < 1e-12


# ------------------------------------------------------------------------ denominators, groups, micro-batches


def test_denominators_count_the_whole_step() -> None:
    lengths = [s.num_trained for s in SEQUENCES]
    assert lengths == [3, 8, 1, 4, 2, 4, 6]
    of = {n: denominator(SEQUENCES[3], SEQUENCES, n, LONGEST) for n in ("tok", "seq", "sum", "drg")}
    assert of == {"tok": 28, "seq": 4 * 7, "sum": 7, "drg": 7 * 12}
    with pytest.raises(ValueError, match="max_length"):
        denominator(SEQUENCES[3], SEQUENCES, "drg")
    with pytest.raises(ValueError, match="unknown normaliser"):
        denominator(SEQUENCES[3], SEQUENCES, "mean")


def test_equal_groups_count_in_the_denominator_except_in_dapo(model: LlamaForCausalLM) -> None:
    silent = [replace(s, advantage=0.0) if s.group == 2 else s for s in SEQUENCES]
    mixed = [s for s in silent if s.group != 2]
    counted = reference_loss(model, silent, method="grpo_token_mean").item()
    dropped = reference_loss(model, silent, method="dapo").item()
    assert dropped == pytest.approx(reference_loss(model, mixed, method="grpo_token_mean").item(), rel=1e-14)
    assert counted * 28 == pytest.approx(dropped * 18, rel=1e-13)


def test_a_step_whose_groups_are_all_dropped_is_zero(model: LlamaForCausalLM) -> None:
    equal = [s for s in SEQUENCES if s.group == 2]
    assert reference_loss(model, equal, method="dapo").item() == 0
    assert not flat(reference_gradient(model, equal, method="dapo")).any()


@pytest.mark.parametrize("method", ["sft", "grpo", "dr_grpo", "gspo", "luffy"])
def test_microbatch_weights_weigh_shares_of_one_global_loss(
    model: LlamaForCausalLM, proximal: list[list[float]], method: str
) -> None:
    groups, weights = [[4, 0], [1, 6, 2], [3, 5]], [1.0, 0.0, -2.5]
    kwargs = {"method": method, "max_length": LONGEST}
    shares = []
    for group in groups:  # all other sequences still count in the denominator, but pay nothing
        alone = [replace(s, weight=s.weight if i in group else 0.0) for i, s in enumerate(SEQUENCES)]
        shares.append(flat(reference_gradient(model, alone, proximal, **kwargs)))
    weighted = reference_gradient(
        model, SEQUENCES, proximal, microbatches=list(zip(groups, weights, strict=True)), **kwargs
    )
    assert distance(flat(weighted), sum(w * g for w, g in zip(weights, shares, strict=True))) < 1e-12
    whole = flat(reference_gradient(model, SEQUENCES, proximal, **kwargs))
    assert distance(sum(shares), whole) < 1e-12


def test_a_sequence_in_no_microbatch_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="once"):
        reference_loss(model, SEQUENCES, microbatches=[([0, 1], 1.0), ([2, 3, 4, 5], 1.0)])


def test_group_advantages() -> None:
    demonstration = [1.0] + [0.0] * 7
    assert group_advantages(demonstration, "mean") == [7 / 8] + [-1 / 8] * 7
    standard = group_advantages(demonstration, "mean_std")
    assert standard[0] == pytest.approx(0.875 / (math.sqrt(0.125) + 1e-6), rel=1e-14)
    assert standard == pytest.approx([2.475] + [-0.3536] * 7, abs=1e-3)
    assert group_advantages(demonstration, "rloo") == pytest.approx([1.0] + [-1 / 7] * 7)
    assert group_advantages([1.0, 1.0, 1.0], "mean_std") == [0.0] * 3
    assert [group_advantages([5.0], kind) for kind in ("mean", "mean_std", "rloo")] == [[0.0]] * 3
