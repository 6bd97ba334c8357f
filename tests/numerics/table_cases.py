"""One optimizer step with sequences of every kind of origin, for every row of the table."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from step_cases import LLAMAS, MAX_LENGTH, make_model, make_policy, plan_for, sgd_gradient
from torch import Tensor, nn

from truestep.objective.methods import Method, build
from truestep.records import NOT_SAMPLED, Origin, TokenBatch, TrainSequence
from truestep.testing.reference.loss import exact_float64
from truestep.train.packing import pack
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.statistics import measure

MODEL = "tied"
VOCABULARY = 40
# (what it is, number of tokens, how many of them are the expert's), group by group. A hinted sample and one that
# continues a prefix of no length are tokens of the policy like any other.
MEMBERS = (
    (("own", 9, 0), ("own", 2, 0), ("own", 14, 0)),
    (("own", 5, 0), ("own", 11, 0), ("demonstration", 7, 7)),
    (("own", 3, 0), ("prefix", 12, 8), ("demonstration", 21, 21)),
    (("stored", 10, 0), ("hint", 6, 0), ("prefix", 5, 5), ("prefix", 4, 0)),
)
KINDS = ("own", "demonstration", "prefix", "stored", "hint")


def sequences(
    seed: int = 0, groups: Sequence[int] = (0, 1, 2, 3), kinds: Sequence[str] = KINDS
) -> list[TrainSequence]:
    """Advantages of both signs, uniform over a sequence; half of the own samples are right."""
    found = []
    for g in groups:
        draw = np.random.default_rng([seed, g])
        prompt = tuple(int(t) for t in draw.integers(0, VOCABULARY, int(draw.integers(2, 6))))
        for i, (kind, length, num_expert) in enumerate(MEMBERS[g]):
            behavior = [0.0] * num_expert + [float(x) for x in -3 * draw.random(length)][num_expert:]
            sampled = Origin.STORED if kind == "stored" else Origin.POLICY
            version = 3 if kind == "stored" else 5
            drawn = TrainSequence(
                token_ids=prompt + tuple(int(t) for t in draw.integers(0, VOCABULARY, length)),
                origin=(Origin.CONTEXT,) * len(prompt)
                + (Origin.EXPERT,) * num_expert
                + (sampled,) * (length - num_expert),
                num_prefix_tokens=len(prompt),
                group=g,
                advantage=float(draw.uniform(0.3, 1.5)) * (-1 if (i + g) % 2 else 1),
                behavior_logprobs=tuple(behavior) if num_expert < length else None,
                policy_version=(NOT_SAMPLED,) * num_expert + (version,) * (length - num_expert),
                weight=float(draw.uniform(0.5, 1.5)),
                solved=bool((i + g) % 2 == 0),
            )
            if kind in kinds:
                found.append(drawn)
    return found


@functools.cache
def policies() -> tuple[Policy, Policy, Policy]:
    """The policy, the proximal policy a step behind it, and the frozen reference further away: all in
    float64."""
    found = [make_policy(LLAMAS[MODEL]) for _ in range(3)]
    for policy, model in zip(found, models(), strict=True):
        with torch.no_grad():
            own = dict(policy.model.named_parameters())
            for name, value in model.named_parameters():
                own[name].copy_(value)
    return found[0], found[1], found[2]


@functools.cache
def models() -> tuple[nn.Module, nn.Module, nn.Module]:
    """The same in transformers' own float64 model."""
    found = []
    for number, spread in enumerate((0.0, 0.02, 0.1)):
        model = make_model(LLAMAS[MODEL]).double()
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(spread * torch.randn(p.shape, generator=draw, dtype=torch.float64))
        found.append(model)
    return found[0], found[1], found[2]


def scored(
    method: Method, batches: Sequence[TokenBatch], ranks: Ranks
) -> tuple[list[TokenBatch], dict[str, float]]:
    """The batches after the passes that a step makes before its first update, and the statistics."""
    _, proximal, reference = policies()
    scorer = Scorer(
        policy=proximal, reference=reference, temperature=1.0, tokens_per_microbatch=10_000, ranks=ranks
    )
    with exact_float64():
        found = scorer.with_proximal(scorer.with_reference(batches, 0), 0)
    return found, measure(method.statistics, found, 0, ranks)


def row_gradient(
    name: str,
    given: Sequence[TrainSequence],
    *,
    limit: int = 10_000,
    ranks: Ranks | None = None,
    share_prefix: bool = True,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """What one plain SGD step of a row does, whatever the micro-batches are."""
    ranks, method = ranks or Ranks(), build(name, options or {})
    packed = pack(given, tokens_per_microbatch=limit, share_prefix=share_prefix, dtype=torch.float64)
    batches, statistics = scored(method, packed, ranks)
    controls = {term.control: 0.7 for term in method.terms if term.control}
    plan = plan_for(method, statistics=statistics, ranks=ranks, max_length=MAX_LENGTH, controls=controls)
    return sgd_gradient(policies()[0], batches, plan)


def shuffled(given: Sequence[TrainSequence]) -> list[TrainSequence]:
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(3))
    return [given[i] for i in order]


def other_weights(given: Sequence[TrainSequence]) -> list[TrainSequence]:
    return [replace(s, weight=1.0) for s in given]
