"""Publishing proves itself: an engine that keeps old weights is found out before it samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from tiny_models import policy, requests, sequence
from torch import Tensor

from truestep.objective.methods import build
from truestep.rollout.engine import SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.settings import OptimizerSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.policy import Policy
from truestep.train.step import StepPlan, train_step
from truestep.train.weight_sync import StaleWeightsError, publish

torch.set_num_threads(1)

SAMPLING = SamplingParameters(temperature=1.0, max_new_tokens=12, stop_token_ids=())


class OwnCopy(TorchEngine):
    """An engine with weights of its own, as one in another process has. ``leave_out`` names what never
    arrives."""

    def __init__(self, trained: Policy, *, leave_out: str = "", version_off_by: int = 0) -> None:
        super().__init__(copy.deepcopy(trained.model))
        self.leave_out, self.off = leave_out, version_off_by

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        own = dict(self.model.named_parameters())
        kept = {n: own[n] if self.leave_out and self.leave_out in n else weights[n] for n in weights}
        super().publish(kept, version)
        self.policy_version += self.off


def update(trained: Policy, learning_rate: float = 0.05) -> None:
    """One real optimizer step."""
    made = [sequence((1, 2, 3), (40, 41, 42), group=i) for i in range(2)]
    batches = pack(made, tokens_per_microbatch=64, dtype=next(trained.parameters()).dtype)
    optimizer = MasterOptimizer(trained, OptimizerSettings(lr=learning_rate))
    plan = StepPlan(step=0, terms=build("sft", {}).terms, learning_rate=learning_rate, temperature=1.0)
    assert train_step(trained, optimizer, batches, plan).grad_norm > 0


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def trained(request: pytest.FixtureRequest) -> Policy:
    return policy(dtype=request.param)


def samples(engine: TorchEngine) -> list[tuple[int, ...]]:
    return [r.completion_ids for r in engine.generate(requests(4), SAMPLING)]


def test_the_next_sample_uses_the_new_weights(trained: Policy) -> None:
    engine = OwnCopy(trained)
    assert publish(trained, engine, 0) < 1e-4
    before = samples(engine)
    update(trained)
    assert samples(engine) == before, "not published yet"
    publish(trained, engine, 1)
    assert engine.policy_version == 1
    assert samples(engine) != before
    assert samples(engine) == samples(TorchEngine(trained.model))
    assert all(set(r.policy_version) == {1} for r in engine.generate(requests(2), SAMPLING))


def test_an_engine_over_the_trainers_own_module_is_always_fresh(trained: Policy) -> None:
    engine = TorchEngine(trained.model)
    update(trained)
    pointers = [p.data_ptr() for p in trained.parameters()]
    publish(trained, engine, 1)
    assert pointers == [p.data_ptr() for p in trained.parameters()]


def test_stale_weights_are_found_out(trained: Policy) -> None:
    engine = OwnCopy(trained, leave_out=".")  # every name has a dot: nothing arrives
    publish(trained, engine, 0)
    update(trained)
    with pytest.raises(StaleWeightsError, match="version 1"):
        publish(trained, engine, 1)


@pytest.mark.parametrize("part", ["layers.0.", "layers.1.", "norm", "lm_head", "q_proj"])
def test_one_part_left_behind_is_found_out(trained: Policy, part: str) -> None:
    engine = OwnCopy(trained, leave_out=part)
    assert any(part in name for name, _ in trained.model.named_parameters())
    update(trained)
    with pytest.raises(StaleWeightsError):
        publish(trained, engine, 1)


def test_many_updates_too_small_to_be_seen_alone_are_found_out_together() -> None:
    """In float32 one tiny step hides in the noise of two kernels; what an engine misses adds up until it
    shows."""
    trained = policy(dtype=torch.float32)
    engine = OwnCopy(trained, leave_out=".")
    update(trained, 1e-6)
    publish(trained, engine, 1)  # not seen
    for _ in range(200):
        update(trained, 1e-6)
    with pytest.raises(StaleWeightsError):
        publish(trained, engine, 201)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_wrong_version_is_refused(trained: Policy, off_by: int) -> None:
    with pytest.raises(StaleWeightsError, match=r"version 3 .*version"):
        publish(trained, OwnCopy(trained, version_off_by=off_by), 3)


def test_an_engine_that_answers_nan_is_refused(trained: Policy) -> None:
    engine = OwnCopy(trained)

    def score(token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        return [float("nan")] * (len(token_ids) - num_prompt_tokens)

    engine.score = score  # type: ignore[method-assign]
    with pytest.raises(StaleWeightsError):
        publish(trained, engine, 0)


def test_probes_differ_between_versions(trained: Policy) -> None:
    """An engine cannot pass by remembering the answer."""
    engine = TorchEngine(trained.model)
    asked: list[tuple[int, ...]] = []
    score = engine.score

    def remember(token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        asked.append(tuple(token_ids))
        return score(token_ids, num_prompt_tokens, temperature)

    engine.score = remember  # type: ignore[method-assign]
    for version in range(3):
        publish(trained, engine, version)
    assert len(set(asked)) == 3
