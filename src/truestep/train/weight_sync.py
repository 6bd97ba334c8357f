"""Gives new weights to the engine, and checks that the engine samples from them."""

from __future__ import annotations

from collections import UserDict

import torch
from torch import Tensor

from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import Engine
from truestep.seeding import Purpose, generator
from truestep.train.packing import pack
from truestep.train.parallel import full, reshard
from truestep.train.policy import Policy

NUM_PROBE_TOKENS = 24
NUM_PROBE_DECODED = 4  # the rest is prefilled, because decoding one token costs as much as decoding a batch
# Ten times the measured noise between two kernels of the same dtype on the same weights. Units: nats.
PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.6, torch.float16: 0.1}


class StaleWeightsError(RuntimeError):
    """Raised if the engine does not sample from the weights that it was given."""


class _Weights(UserDict[str, Tensor]):
    """Parameters by name, gathered one at a time if they are sharded."""

    def __getitem__(self, name: str) -> Tensor:
        return full(self.data[name].detach())


def publish(policy: Policy, engine: Engine, version: int) -> float:
    """Give the engine the policy's weights. Return the largest log-probability difference between engine and
    policy on a probe of random tokens. Units: nats.

    Raises StaleWeightsError if the difference is larger than the rounding of two kernels explains.
    Held by: tests/contract/test_publish.py"""
    engine.publish(_Weights(policy.model.named_parameters()), version)
    parameter, vocabulary = next(policy.parameters()), int(policy.model.config.vocab_size)
    ids = generator(version, Purpose.PROBE).integers(0, vocabulary, NUM_PROBE_TOKENS).tolist()
    num_prompt = NUM_PROBE_TOKENS - NUM_PROBE_DECODED
    origin = (Origin.CONTEXT,) * num_prompt + (Origin.POLICY,) * NUM_PROBE_DECODED
    sequence = TrainSequence(token_ids=tuple(ids), origin=origin, num_prefix_tokens=0, group=0)
    (batch,) = pack([sequence], tokens_per_microbatch=NUM_PROBE_TOKENS, device=parameter.device)
    with torch.no_grad():
        expected, _ = policy(batch, 1.0)
    reshard(policy)
    got = torch.tensor(engine.score(ids, num_prompt, 1.0), dtype=torch.float64)
    difference = float((got - expected.double().cpu()).abs().max())
    limit = PROBE_TOLERANCE[parameter.dtype]
    if engine.policy_version != version or not difference <= limit:
        raise StaleWeightsError(
            f"after publishing version {version} the engine (version {engine.policy_version}) and the trainer "
            f"differ by {difference:.3g} nats on a probe; kernels of {parameter.dtype} differ by less than {limit:g}"
        )
    return difference
