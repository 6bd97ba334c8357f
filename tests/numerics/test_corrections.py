"""What is laid over coefficients: weights for the disagreement of engine and trainer, KL in the reward,
whitening."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from step_cases import EXACT, check
from table_cases import sequences

from truestep.objective import corrections
from truestep.objective.coefficients import Context, advantage, sequence_mean, sequence_sum, to_go
from truestep.records import Origin
from truestep.train.packing import pack

LOW, HIGH = 0.5, 2.0


def context() -> Context:
    """Tokens of every origin in one micro-batch; proximal log-probabilities around the behavior's."""
    (batch,) = pack(sequences(), tokens_per_microbatch=10_000, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    assert batch.behavior_logprobs is not None
    known = torch.where(batch.origin == int(Origin.EXPERT), -1.0, batch.behavior_logprobs)
    proximal = known + torch.randn(known.shape, generator=draw, dtype=torch.float64)
    reference = known + torch.randn(known.shape, generator=draw, dtype=torch.float64)
    return Context(
        policy_logprobs=proximal,
        proximal_logprobs=proximal,
        entropy=torch.ones_like(proximal),
        batch=replace(batch, reference_logprobs=reference),
        step=0,
        statistics={"m": 0.25, "s": 0.5},
    )


def rows(c: Context) -> dict[int, list[int]]:
    """The places of each sequence's tokens."""
    found: dict[int, list[int]] = {}
    for i, s in enumerate(c.batch.sequence_index.tolist()):
        found.setdefault(s, []).append(i)
    return found


def is_fresh(c: Context, i: int) -> bool:
    return int(c.batch.origin[i]) == Origin.POLICY


Weight = Callable[[float, list[float], int], float]
BY_HAND: dict[
    str, Weight
] = {  # (ρ of the token, log ρ of its sequence's fresh tokens, trained tokens of the sequence)
    "truncate": lambda rho, logs, n: min(rho, HIGH),
    "clamp": lambda rho, logs, n: min(max(rho, LOW), HIGH),
    "drop": lambda rho, logs, n: rho if LOW <= rho <= HIGH else 0.0,
    "mask": lambda rho, logs, n: 1.0 if LOW <= rho <= HIGH else 0.0,
    "sequence": lambda rho, logs, n: min(math.exp(sum(logs)), HIGH),
    "geometric": lambda rho, logs, n: rho if LOW <= math.exp(sum(logs) / n) <= HIGH else 0.0,
}


def test_every_correction_is_tested() -> None:
    assert {"none", *BY_HAND} == set(corrections.CORRECTIONS)


@pytest.mark.parametrize("name", list(BY_HAND))
def test_mismatch_weights(name: str) -> None:
    c = context()
    got = corrections.mismatch_weight(name, LOW, HIGH)(c)
    log_rho = (c.proximal_logprobs - c.batch.behavior_logprobs).tolist()
    for places in rows(c).values():
        logs = [log_rho[i] for i in places if is_fresh(c, i)]
        for i in places:
            expected = BY_HAND[name](math.exp(log_rho[i]), logs, len(places)) if is_fresh(c, i) else 1.0
            check(f"correction, {name}", abs(float(got[i]) - expected) / max(expected, 1.0))
    assert len(set(got.tolist())) > 3 or name == "mask"
    assert not bool(torch.isnan(got).any())


def test_kl_in_the_reward_charges_what_follows() -> None:
    c, beta = context(), 0.3
    got = corrections.kl_in_reward(beta)(c)
    gap = (c.proximal_logprobs - c.batch.reference_logprobs).tolist()
    for places in rows(c).values():
        for at, i in enumerate(places):
            later = sum(gap[j] for j in places[at:] if is_fresh(c, j))
            expected = float(c.batch.advantage[i]) - (beta * later if is_fresh(c, i) else 0.0)
            check("kl in reward", abs(float(got[i]) - expected) / max(abs(expected), 1.0))


def test_whitening_and_replaced_advantages() -> None:
    c = context()
    white = corrections.with_advantage(advantage, corrections.whitened("m", "s"))(c)
    torch.testing.assert_close(white, (c.batch.advantage - 0.25) / (0.5 + 1e-8), rtol=EXACT, atol=EXACT)


def test_reductions_over_sequences() -> None:
    c = context()
    values = torch.linspace(-1, 2, c.batch.num_targets, dtype=torch.float64)
    sums, means, rest = (f(values, c.batch) for f in (sequence_sum, sequence_mean, to_go))
    for places in rows(c).values():
        own = values[places].numpy()
        np.testing.assert_allclose(sums[places].numpy(), own.sum(), rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(means[places].numpy(), own.sum() / len(places), rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(rest[places].numpy(), own[::-1].cumsum()[::-1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_expected_gradients_of_the_kl_losses(kl: str) -> None:
    """Over all tokens of one distribution: k1 nothing, k2 the gradient of KL(π‖ref), k3 that of KL(ref‖π)."""
    from truestep.objective.methods.row import KL_TERMS

    draw = torch.Generator().manual_seed(0)
    z = torch.randn(7, generator=draw, dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.randn(7, generator=draw, dtype=torch.float64), 0)
    logp = torch.log_softmax(z, 0)
    c = context()
    short = replace(c, policy_logprobs=logp.detach(), batch=_Only(q))  # type: ignore[arg-type]
    coefficient = KL_TERMS[kl](short)
    (got,) = torch.autograd.grad((logp.exp().detach() * -(coefficient * logp)).sum(), z, retain_graph=True)
    reverse = (logp.exp() * (logp - q)).sum()
    forward = (q.exp() * (q - logp)).sum()
    target = {"k1": 0 * reverse, "k2": reverse, "k3": forward}[kl]
    (expected,) = torch.autograd.grad(target, z)
    check(f"expected gradient, {kl}", float((got - expected).norm()))


class _Only:
    """As much of a batch as a KL coefficient looks at."""

    def __init__(self, reference: torch.Tensor) -> None:
        self.reference_logprobs = reference
