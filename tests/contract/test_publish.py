"""Publishing proves itself: an engine that does not have the trainer's bits is found before it samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from tiny_models import policy, requests, sequence
from torch import Tensor

from truestep.objective.methods import build
from truestep.records import Message, Problem, Prompt
from truestep.rollout.engine import Receipt, SamplingParameters, StaleWeightsError
from truestep.rollout.engine_torch import TorchEngine
from truestep.rollout.fingerprints import fingerprint
from truestep.rollout.sample import Sampler
from truestep.settings import OptimizerSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.policy import Policy
from truestep.train.step import StepPlan, train_step
from truestep.train.weight_sync import publish

torch.set_num_threads(1)

SAMPLING = SamplingParameters(temperature=1.0, max_new_tokens=12, stop_token_ids=())


Load = Callable[[dict[str, Tensor], dict[str, Tensor], Mapping[str, Tensor]], None]


class OwnCopy(TorchEngine):
    """An engine with separate weights, as one in another process has. ``wrong`` is what it does in place of
    copying: from its own tensors, those of the version before, and the published ones."""

    def __init__(self, trained: Policy, wrong: Load | None = None, *, version_off_by: int = 0) -> None:
        super().__init__(copy.deepcopy(trained.model))
        self.wrong, self.off = wrong, version_off_by
        self.previous: dict[str, Tensor] = {}

    def load(self, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, int]:
        given = {name: weights[name].clone() for name in weights}
        if self.wrong is None or not self.previous:
            super().load(own, given)
        else:
            with torch.no_grad():
                self.wrong(dict(own), self.previous, given)
        self.previous = given
        return {}

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
        receipt = super().publish(weights, version)
        self.policy_version += self.off
        return receipt


def copy_all(own: dict[str, Tensor], given: Mapping[str, Tensor], leave_out: tuple[str, ...] = ()) -> None:
    for name, tensor in given.items():
        if name not in leave_out:
            own[name].copy_(tensor)


def nothing(own: dict[str, Tensor], before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """The engine takes the version, but no weights."""


def one_left_out(own: dict[str, Tensor], before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    copy_all(own, now, ("model.layers.1.mlp.down_proj.weight",))


def the_version_before(
    own: dict[str, Tensor], before: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> None:
    copy_all(own, before)


def two_exchanged(own: dict[str, Tensor], before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Two tensors of the same shape in each other's place."""
    copy_all(own, now)
    own["model.layers.0.mlp.up_proj.weight"].copy_(now["model.layers.0.mlp.gate_proj.weight"])
    own["model.layers.0.mlp.gate_proj.weight"].copy_(now["model.layers.0.mlp.up_proj.weight"])


def one_shard_stale(own: dict[str, Tensor], before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """The second half of the rows of every tensor is old, as if the second of two shards was not sent."""
    copy_all(own, now)
    for name, tensor in before.items():
        half = len(tensor) // 2
        own[name][half:].copy_(tensor[half:])


WRONG: tuple[Load, ...] = (nothing, one_left_out, the_version_before, two_exchanged, one_shard_stale)


def update(trained: Policy, learning_rate: float = 0.05) -> None:
    """One real optimizer step."""
    made = [sequence((1, 2, 3), (40, 41, 42), group=i) for i in range(2)]
    parameter = next(trained.parameters())
    batches = pack(made, tokens_per_microbatch=64, dtype=torch.promote_types(parameter.dtype, torch.float32))
    optimizer = MasterOptimizer(trained, OptimizerSettings(lr=learning_rate))
    plan = StepPlan(step=0, terms=build("sft", {}).terms, learning_rate=learning_rate, temperature=1.0)
    assert train_step(trained, optimizer, batches, plan).grad_norm > 0


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(params=DTYPES, ids=str)
def trained(request: pytest.FixtureRequest) -> Policy:
    return policy(dtype=request.param)


def samples(engine: TorchEngine) -> list[tuple[int, ...]]:
    return [r.completion_ids for r in engine.generate(requests(4), SAMPLING)]


def test_the_next_sample_uses_the_new_weights(trained: Policy) -> None:
    engine = OwnCopy(trained)
    publish(trained, engine, 0)
    before = samples(engine)
    update(trained)
    assert samples(engine) == before, "not published yet"
    receipt = publish(trained, engine, 1)
    assert engine.policy_version == receipt.version == 1
    assert set(receipt.fingerprints) == {name for name, _ in trained.model.named_parameters()}
    assert samples(engine) != before
    assert samples(engine) == samples(TorchEngine(trained.model))
    assert all(set(r.policy_version) == {1} for r in engine.generate(requests(2), SAMPLING))


def test_an_engine_over_the_trainers_own_module_is_always_fresh(trained: Policy) -> None:
    engine = TorchEngine(trained.model)
    update(trained)
    pointers = {name: p.data_ptr() for name, p in trained.model.named_parameters()}
    receipt = publish(trained, engine, 1)
    assert receipt.addresses == pointers, "nothing was copied"
    assert receipt.fingerprints == {}


@pytest.mark.parametrize("learning_rate", [1e-6, 5e-5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights_are_found_at_the_first_publish(
    dtype: torch.dtype, learning_rate: float, wrong: Load
) -> None:
    """However small the step: whenever the bits differ. A right engine is accepted at the same steps."""
    trained = policy(dtype=dtype)
    engine, right = OwnCopy(trained, wrong), OwnCopy(trained)
    publish(trained, engine, 0)
    publish(trained, right, 0)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    update(trained, learning_rate)
    publish(trained, right, 1)
    after = dict(trained.model.named_parameters())
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert changed, "the step is large enough to change a bit"
    named = "down_proj" if wrong is one_left_out else "proj" if wrong is two_exchanged else "."
    with pytest.raises(StaleWeightsError, match=rf"version 1 was published, but .* the first is \S*{named}"):
        publish(trained, engine, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_bit_of_one_tensor_is_found(dtype: torch.dtype) -> None:
    """Any tensor, not only those that move the probabilities."""
    trained = policy(dtype=dtype)
    for name, parameter in trained.model.named_parameters():
        engine = OwnCopy(trained)
        publish(trained, engine, 0)

        def flip(
            own: dict[str, Tensor], before: object, now: Mapping[str, Tensor], which: str = name
        ) -> None:
            copy_all(own, now)
            own[which].view(torch.int16).view(-1)[0] ^= 1

        engine.wrong = flip
        with pytest.raises(StaleWeightsError, match=rf"1 of \d+ tensors .* the first is {name} "):
            publish(trained, engine, 1)
        assert parameter.isfinite().all()


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_wrong_version_is_refused(trained: Policy, off_by: int) -> None:
    with pytest.raises(StaleWeightsError, match=r"version 3 was published.* the first is the version"):
        publish(trained, OwnCopy(trained, version_off_by=off_by), 3)


def test_a_receipt_that_lacks_a_tensor_is_refused(trained: Policy) -> None:
    class Forgetful(OwnCopy):
        def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
            receipt = super().publish(weights, version)
            return replace(receipt, fingerprints=dict(list(receipt.fingerprints.items())[1:]))

    with pytest.raises(StaleWeightsError, match=r"1 of \d+ tensors"):
        publish(trained, Forgetful(trained), 0)


def test_another_address_is_not_the_trainers_memory(trained: Policy) -> None:
    class Elsewhere(OwnCopy):
        def load(self, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, int]:
            return {name: tensor.data_ptr() for name, tensor in own.items()}  # of its old copy

    with pytest.raises(StaleWeightsError):
        publish(trained, Elsewhere(trained), 0)


def test_a_receipt_has_the_fingerprints_of_what_is_held(trained: Policy) -> None:
    engine = OwnCopy(trained)
    held = publish(trained, engine, 0).fingerprints
    assert held == {name: fingerprint(p) for name, p in engine.model.named_parameters()}


def test_samples_of_another_version_are_refused(trained: Policy) -> None:
    class Late(TorchEngine):
        def generate(self, *args: object, **more: object) -> object:  # type: ignore[override]
            for made in super().generate(*args, **more):  # type: ignore[arg-type]
                yield replace(made, policy_version=(*made.policy_version[:-1], 3))

    engine = Late(trained.model)
    engine.policy_version = 4
    plan = build("grpo_token_mean", {}).plan
    assert plan is not None
    problem = Problem(id="p", messages=(Message(role="user", content="?"),), answer="1")
    sampler = Sampler(
        engine=engine, plan=plan, sampling=SAMPLING, samples_per_prompt=2, decode=str,
        score=lambda inputs: [], seed=0,
    )  # fmt: skip
    with pytest.raises(
        StaleWeightsError, match=r"1 of 12 tokens of sample \d .* by version 3 .* not by version 4"
    ):
        sampler.groups([Prompt(problem=problem, token_ids=(5, 6, 7))], 0)
