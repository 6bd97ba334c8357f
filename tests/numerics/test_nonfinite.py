"""A NaN or an infinity anywhere stops the step before the optimizer, is named, and leaves the batch
behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from step_cases import FAMILIES, LLAMAS, batches_of, make_policy, plan_for, run_step, sequences_of
from torch import Tensor

from truestep.records import TokenBatch
from truestep.settings import OptimizerSettings
from truestep.train import checkpoints
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.step import NonFiniteError

SETTINGS = OptimizerSettings(lr=1e-2)
PAPER = FAMILIES["grpo_token_mean"]
BAD = [math.nan, math.inf, -math.inf]


def batches() -> list[TokenBatch]:
    return batches_of(sequences_of(PAPER), num_batches=3, dtype=torch.float32)


def trained(dtype: torch.dtype) -> tuple[Policy, MasterOptimizer]:
    """A policy after one good step, so that there is optimizer state to be spoilt."""
    policy = make_policy(LLAMAS["tied"], dtype)
    optimizer = MasterOptimizer(policy, SETTINGS)
    run_step(policy, optimizer, batches(), plan_for(PAPER.method, learning_rate=1e-2))
    return policy, optimizer


def snapshot(policy: Policy, optimizer: MasterOptimizer) -> dict[str, Tensor]:
    state = {f"optimizer/{n}": t.detach().clone() for n, t in optimizer.state_tensors().items()}
    return state | {n: p.detach().clone() for n, p in policy.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return set(a) == set(b) and all(torch.equal(a[n].nan_to_num(7.0), b[n].nan_to_num(7.0)) for n in a)


def stopped(
    policy: Policy, optimizer: MasterOptimizer, given: list[TokenBatch], named: str, folder: Path
) -> dict[str, Tensor]:
    """The step must raise, name the tensor, change nothing; returns what the loop saves of its error."""
    before = snapshot(policy, optimizer)
    plan = plan_for(PAPER.method, step=17, learning_rate=1e-2)
    with pytest.raises(NonFiniteError, match=named) as caught:
        run_step(policy, optimizer, given, plan)
    assert "step 18" in str(caught.value)
    assert same(snapshot(policy, optimizer), before)
    assert all(p.grad is None for p in policy.parameters()), "a spoilt gradient would poison the next step"
    assert not optimizer._wide_grads
    spec = SimpleNamespace(folder=folder / "stage", ranks=Ranks())  # as much of a stage as is looked at
    error = checkpoints.rescued(spec, caught.value)  # type: ignore[arg-type]
    (path,) = (folder / "stage").glob("*.safetensors")
    assert str(error) == f"{caught.value}; the batch is saved in {path}"
    return load_file(path)


@pytest.mark.parametrize("field", ["advantage", "weight"])
@pytest.mark.parametrize("value", BAD)
def test_in_the_batch(field: str, value: float, tmp_path: Path) -> None:
    policy, optimizer = trained(torch.float32)
    given = batches()
    spoilt = getattr(given[1], field).clone()
    spoilt[4] = value
    given[1] = replace(given[1], **{field: spoilt})
    saved = stopped(policy, optimizer, given, "micro-batch 1: loss is not finite", tmp_path)
    torch.testing.assert_close(saved[f"0.{field}"], spoilt, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(saved["0.input_ids"], given[1].input_ids), (
        "the batch that did it is the one that is saved"
    )
    run_step(
        policy, optimizer, batches(), plan_for(PAPER.method, learning_rate=1e-2)
    )  # the next good step goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_parameter(dtype: torch.dtype, tmp_path: Path) -> None:
    policy, optimizer = trained(dtype)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    stopped(policy, optimizer, batches(), "policy log-probabilities is not finite", tmp_path)


@pytest.mark.parametrize("value", BAD)
def test_in_the_hidden_states(value: float, tmp_path: Path) -> None:
    policy, optimizer = trained(torch.float32)

    def spoil(module: torch.nn.Module, arguments: object, output: Tensor) -> Tensor:
        return output.index_fill(1, given[0].source_index[3:4], value)

    given = batches()
    policy.model.model.norm.register_forward_hook(spoil)
    stopped(policy, optimizer, given, "(policy log-probabilities|entropy) is not finite", tmp_path)
    with pytest.raises(NonFiniteError, match="proximal log-probabilities is not finite"):
        Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=1000).with_proximal(given, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_in_a_gradient(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """The loss is finite and its gradient is not: seen in the norm, and the parameter is named."""
    policy, optimizer = trained(dtype)
    name = "model.model.layers.1.self_attn.k_proj.weight"
    parameter = dict(policy.named_parameters())[name]
    calls: list[int] = []

    def spoil(grad: Tensor) -> Tensor:
        calls.append(1)
        return torch.full_like(grad, value) if len(calls) == 2 else grad

    handle = parameter.register_hook(spoil)
    given = batches()
    saved = stopped(policy, optimizer, given, f"gradient of {name}", tmp_path)
    handle.remove()
    assert {key.split(".")[0] for key in saved} == {str(i) for i in range(len(given))}, (
        "any of them may have done it"
    )


def test_the_error_holds_the_batch_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy, optimizer = trained(torch.float32)
    given = [replace(b, advantage=b.advantage * math.nan) for b in batches()]
    with pytest.raises(NonFiniteError, match=r"loss is not finite$") as caught:
        run_step(policy, optimizer, given, plan_for(PAPER.method))
    assert [id(batch) for batch in caught.value.batches] == [id(given[0])]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_an_interrupted_step_leaves_nothing_behind(stop_at: int) -> None:
    policy, optimizer = trained(torch.float32)
    before, calls = snapshot(policy, optimizer), []

    class Asked(BaseException):
        pass

    def check() -> None:
        calls.append(1)
        if len(calls) > stop_at:
            raise Asked

    stop: Callable[[], None] = check
    with pytest.raises(Asked):
        run_step(policy, optimizer, batches(), plan_for(PAPER.method), stop)
    assert same(snapshot(policy, optimizer), before)
    assert all(p.grad is None for p in policy.parameters())
