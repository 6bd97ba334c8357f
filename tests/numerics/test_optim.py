"""The optimizer: nothing small is lost, one clip by the global norm, state that goes on bit for bit, the
schedule."""

from __future__ import annotations

import math

import pytest
import torch
from step_cases import (
    EXACT,
    FAMILIES,
    LLAMAS,
    batches_of,
    check,
    make_policy,
    plan_for,
    run_step,
    sequences_of,
)
from torch import Tensor, nn

from truestep.objective.schedule import learning_rate
from truestep.settings import OptimizerSettings
from truestep.testing.reference import loss as reference
from truestep.train.optim import MasterOptimizer, clip_, global_norm
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy

SGD = OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.0)
ADAMW = OptimizerSettings(lr=1e-3, weight_decay=0.1)


def vector(values: list[float], dtype: torch.dtype) -> nn.Module:
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor(values, dtype=dtype))
    return module


def apply(module: nn.Module, optimizer: MasterOptimizer, gradient: Tensor, rate: float) -> None:
    """One step with a given gradient, through backward as in training."""
    (module.w * gradient.to(module.w.dtype)).sum().backward()
    optimizer.step(optimizer.gradients(), rate)


# ------------------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_optimizers_move_one_master(dtype: torch.dtype) -> None:
    """One beside the other: neither takes back what the other did, and each has moments of its own."""
    module = vector([1.0, -2.0], dtype)
    first = MasterOptimizer(module, SGD)
    second = MasterOptimizer(module, ADAMW, beside=first)
    for _ in range(50):
        apply(module, first, torch.tensor([1.0, 0.0]), 1e-4)
        apply(module, second, torch.tensor([0.0, 1.0]), 1e-4)
    master = first.masters["w"]
    assert second.masters["w"] is master
    assert float(master[0]) == pytest.approx(1.0 - 50e-4, rel=1e-3)
    assert float(master[1]) == pytest.approx(-2.0 - 50e-4, rel=1e-3)  # Adam's step is the learning rate
    assert torch.equal(module.w.detach(), master.detach().to(dtype))
    assert any(key.startswith("exp_avg/") for key in second.state_tensors())
    assert not any(key.startswith("exp_avg/") for key in first.state_tensors())


def test_a_millionth_a_step_is_not_lost_in_bf16() -> None:
    """1000 updates of 1e-6 of the parameter, each far below what bf16 can hold, add up in the master."""
    start = [1.0, 3.0, -0.75, 128.0]
    module = vector(start, torch.bfloat16)
    optimizer = MasterOptimizer(module, SGD)
    for _ in range(1000):
        apply(module, optimizer, torch.tensor(start), 1e-6)
    expected = torch.tensor(start) * (1 - 1e-3)
    master = optimizer.state_tensors()["master/w"]
    assert master.dtype is torch.float32
    torch.testing.assert_close(
        master, expected, rtol=1e-4, atol=0
    )  # 1000 float32 roundings; the loss would be 1e-3
    assert torch.equal(module.w.detach(), master.to(torch.bfloat16))

    only = torch.tensor(
        start, dtype=torch.bfloat16
    )  # the control: bf16 parameters without masters never move
    for _ in range(1000):
        only -= 1e-6 * torch.tensor(start, dtype=torch.bfloat16)
    assert torch.equal(only, torch.tensor(start, dtype=torch.bfloat16))


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_what_adds_up_reaches_the_bf16_parameter(settings: OptimizerSettings) -> None:
    module = vector([1.0, -2.0, 0.5], torch.bfloat16)
    optimizer = MasterOptimizer(module, settings)
    for _ in range(400):
        apply(module, optimizer, torch.tensor([1.0, -2.0, 0.5]), 1e-4)
    moved = (module.w.detach().float() / torch.tensor([1.0, -2.0, 0.5]) - 1).abs()
    assert bool((moved > 0.015).all()), moved


def test_gradients_are_summed_in_float32() -> None:
    """300 micro-batches: against the float64 sum of the same bf16 parts, and against a plain bf16 sum."""
    module = vector([0.0] * 16, torch.bfloat16)
    optimizer = MasterOptimizer(module, SGD)
    draw = torch.Generator().manual_seed(0)
    parts = [(1 + torch.rand(16, generator=draw)).to(torch.bfloat16) for _ in range(300)]
    plain = torch.zeros(16, dtype=torch.bfloat16)
    for part in parts:
        (module.w * part).sum().backward()
        plain += part
    got, right = optimizer.gradients()["w"], torch.stack(parts).double().sum(0)
    assert got.dtype is torch.float32
    assert module.w.grad is None, "the bf16 gradient must not be kept as well"
    assert float(((got - right) / right).abs().max()) <= 1e-6
    assert float(((plain - right) / right).abs().max()) > 1e-2


def test_a_tied_weight_in_bf16_gets_both_gradients() -> None:
    """Embedding and head are one parameter: its hook must fire for the sum of the two."""
    policy = make_policy(LLAMAS["tied"], torch.bfloat16)
    wide = make_policy(LLAMAS["tied"], torch.float32)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), policy.parameters(), strict=True):
            a.copy_(b)
    norms = []
    for p in (policy, wide):
        batches = batches_of(sequences_of(FAMILIES["sft"]), num_batches=4, dtype=torch.float32)
        optimizer = MasterOptimizer(p, OptimizerSettings(lr=1e-3, max_grad_norm=0.0))
        norms.append(run_step(p, optimizer, batches, plan_for(FAMILIES["sft"].method)).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.03)


# ------------------------------------------------------------------------------------------------------- clip


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_clip_is_torch_s_clip(max_norm: float) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (7,), (2, 2, 2)]
    own = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    theirs = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    for parameter, g in zip(theirs, own, strict=True):
        parameter.grad = g.clone()
    norm = global_norm(own, Ranks(), sharded=False)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(float(expected), rel=1e-14)
    clip_(own, norm, max_norm)
    for parameter, g in zip(theirs, own, strict=True):
        torch.testing.assert_close(g, parameter.grad, rtol=1e-13, atol=0)
    reached = global_norm(own, Ranks(), sharded=False)
    assert reached == pytest.approx(min(max_norm, norm), rel=1e-4)


def test_no_clip_where_it_is_switched_off() -> None:
    gradients = [torch.full((3,), 1e3)]
    clip_(gradients, 1e3 * math.sqrt(3), 0.0)
    assert torch.equal(gradients[0], torch.full((3,), 1e3))


def test_the_norm_is_one_over_all_microbatches() -> None:
    """Reported norm and clipped update do not depend on the split: nothing is clipped per micro-batch."""
    f, found = FAMILIES["sft"], []
    settings = OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0, max_grad_norm=0.25)
    for num_batches in (1, 4):
        policy = make_policy(LLAMAS["tied"])
        before = {n: p.detach().clone() for n, p in policy.named_parameters()}
        batches = batches_of(sequences_of(f), num_batches=num_batches)
        report = run_step(policy, MasterOptimizer(policy, settings), batches, plan_for(f.method))
        moved = torch.cat([(before[n] - p.detach()).ravel() for n, p in policy.named_parameters()])
        found.append((report.grad_norm, moved))
        assert float(moved.norm()) == pytest.approx(0.25, rel=1e-5)
    check("norm over micro-batches", abs(found[0][0] / found[1][0] - 1), EXACT)
    check("clipped update", float((found[0][1] - found[1][1]).norm() / found[0][1].norm()), EXACT)


# ------------------------------------------------------------------------------------------------------ state


def steps(policy: Policy, optimizer: MasterOptimizer, first: int, last: int) -> None:
    f = FAMILIES["grpo_token_mean"]
    for step in range(first, last):
        batches = batches_of(sequences_of(f, seed=step), num_batches=2, dtype=torch.float32)
        run_step(policy, optimizer, batches, plan_for(f.method, step=step, learning_rate=1e-2))


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_state_goes_on_bit_for_bit(dtype: torch.dtype, settings: OptimizerSettings) -> None:
    whole = make_policy(LLAMAS["tied"], dtype)
    optimizer = MasterOptimizer(whole, settings)
    steps(whole, optimizer, 0, 2)
    saved = {n: t.detach().clone() for n, t in optimizer.state_tensors().items()}
    parameters = {n: p.detach().clone() for n, p in whole.named_parameters()}
    steps(whole, optimizer, 2, 4)

    second = make_policy(LLAMAS["tied"], dtype, seed=9)
    resumed = MasterOptimizer(second, settings)
    with torch.no_grad():
        for name, p in second.named_parameters():
            p.copy_(parameters[name])
    resumed.load_state_tensors(saved)
    steps(second, resumed, 2, 4)

    got, expected = resumed.state_tensors(), optimizer.state_tensors()
    assert set(got) == set(expected)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    if settings is ADAMW:
        assert {n.split("/")[0] for n in saved} >= {"exp_avg", "exp_avg_sq", "step"}
    assert any(n.startswith("master/") for n in saved) == (dtype is torch.bfloat16)


# ------------------------------------------------------------------------------------------- sgd and schedule


def test_sgd_is_plain() -> None:
    """θ − lr·g and nothing else: no momentum, no decay, the second step like the first."""
    module = vector([1.0, -2.0], torch.float64)
    optimizer = MasterOptimizer(module, SGD)
    for _ in range(2):
        apply(module, optimizer, torch.tensor([0.5, 0.25]), 0.1)
    torch.testing.assert_close(
        module.w.detach(), torch.tensor([0.9, -2.05], dtype=torch.float64), rtol=1e-15, atol=0
    )
    assert optimizer.state_tensors() == {}
    with pytest.raises(ValueError, match="weight_decay = 0"):
        OptimizerSettings(kind="sgd", lr=0.1, weight_decay=0.01)


@pytest.mark.parametrize(("total", "fraction"), [(10, 0.0), (10, 0.1), (20, 0.25), (7, 0.0)])
@pytest.mark.parametrize("kind", ["cosine", "constant", "linear", "wsd"])
def test_learning_rate_is_the_reference_s(kind: str, total: int, fraction: float) -> None:
    decay = 3 / total  # three steps
    shared = {"peak": 3e-4, "kind": kind, "total_steps": total, "warmup_fraction": fraction}
    at = learning_rate(**shared, min_ratio=0.1, decay_fraction=decay)
    for step in range(total):
        expected = reference.learning_rate(step, total, 3e-4, kind, fraction, 0.1, decay)
        assert at(step) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", ["linear", "warmup_stable_decay"])
def test_learning_rate_is_that_of_transformers(kind: str) -> None:
    """After the warm-up, of which transformers' first step has the rate 0."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    of_wsd = {"num_decay_steps": 8, "decay_type": "linear", "min_lr_ratio": 0.0}
    more = {"scheduler_specific_kwargs": of_wsd} if kind != "linear" else {}
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=40, **more)
    ours = "linear" if kind == "linear" else "wsd"
    shared = {"peak": 2.0, "kind": ours, "total_steps": 40, "warmup_fraction": 0.1, "min_ratio": 0.0}
    at = learning_rate(**shared, decay_fraction=0.2)
    for step in range(40):
        if step >= 4:
            assert at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        theirs.step()
    assert at(40) == 0.0


class Parts(nn.Module):
    """A matrix with a bias, and a norm with both."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 2.0)


@pytest.mark.parametrize(
    ("no_decay", "still"),
    [
        ((), set()),
        (("norms",), {"norm.weight", "norm.bias"}),
        (("biases",), {"proj.bias", "norm.bias"}),
        (("norms", "biases"), {"norm.weight", "norm.bias", "proj.bias"}),
        (("proj.w*",), {"proj.weight"}),
        (("*",), {"norm.weight", "norm.bias", "proj.bias", "proj.weight"}),
    ],
)
def test_weight_decay_leaves_out_what_it_is_told_to(no_decay: tuple[str, ...], still: set[str]) -> None:
    """Without a gradient, AdamW multiplies by 1 − lr·decay, and nothing else."""
    module = Parts()
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5, no_decay=no_decay)
    optimizer = MasterOptimizer(module, settings)
    optimizer.step({name: torch.zeros_like(p) for name, p in module.named_parameters()}, 0.1)
    for name, p in module.named_parameters():
        expected = 2.0 if name in still else 2.0 * (1 - 0.1 * 0.5)
        assert torch.equal(p.detach(), torch.full_like(p, expected)), name
    optimizer.step({name: torch.zeros_like(p) for name, p in module.named_parameters()}, 0.2)
    for name, p in module.named_parameters():  # another rate reaches both groups
        assert (float(p.detach().flatten()[0]) == 2.0) == (name in still), name


def test_learning_rate_endpoints() -> None:
    at = learning_rate(peak=1.0, kind="cosine", total_steps=100, warmup_fraction=0.1, min_ratio=0.1)
    assert at(0) == pytest.approx(0.1)  # one tenth of the way up: never 0, so that no step is wasted
    assert at(9) == at(10) == 1.0
    assert at(55) == pytest.approx(0.55)  # half way down
    assert at(99) == pytest.approx(0.1, rel=1e-2)
    assert at(100) == at(1000) == pytest.approx(0.1)
    rates = [at(s) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    constant = learning_rate(peak=2.0, kind="constant", total_steps=100, warmup_fraction=0.0, min_ratio=0.1)
    assert {constant(s) for s in (0, 50, 99)} == {2.0}
