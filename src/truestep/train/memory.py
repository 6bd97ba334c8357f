"""A method's memory between steps: its controller's state, waiting demonstrations and stored samples.

The memory is one immutable record, the same on every rank. A step returns the next record, so that an
interrupted step changes nothing. What the ranks add in a step is sorted by problem, so the record does not depend
on the number of ranks. A checkpoint stores it once, as JSON and one group of tensors.
Held by: tests/contract/test_method_resume.py, tests/contract/test_elastic.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truestep.objective.controller import Controller
from truestep.objective.methods.row import Method, Replay
from truestep.records import Distribution, Origin, Rollout, Stop
from truestep.seeding import Purpose, generator


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A problem's correct samples, newest first, and how many samples of its latest group were correct."""

    num_correct: int
    num_samples: int
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A method's memory. ``waiting`` names problems whose demonstrations wait in the buffer, newest first.
    ``replay`` has the stored samples by problem. ``replay_open`` is True once they may be used."""

    scalars: Mapping[str, float] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    replay: Mapping[str, Stored] = field(default_factory=dict)
    replay_open: bool = False

    def state(self) -> dict[str, Any]:
        """Return the part that is stored as JSON: everything except what ``tensors`` returns."""
        stored = []
        for name, s in self.replay.items():
            headers = [[len(r.completion_ids), r.distribution.temperature] for r in s.rollouts]
            stored.append([name, s.num_correct, s.num_samples, headers])
        memory = {"scalars": dict(self.scalars), "waiting": list(self.waiting)}
        return {**memory, "replay": stored, "replay_open": self.replay_open}

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored samples, concatenated in the order of ``state``."""
        rollouts = [r for s in self.replay.values() for r in s.rollouts]
        tokens = [t for r in rollouts for t in r.completion_ids]
        versions = [v for r in rollouts for v in r.policy_version]
        logprobs = [x for r in rollouts for x in r.behavior_logprobs or ()]
        return {
            "tokens": torch.tensor(tokens, dtype=torch.int64),
            "policy_version": torch.tensor(versions, dtype=torch.int32),
            "behavior_logprobs": torch.tensor(logprobs, dtype=torch.float64),
        }

    @staticmethod
    def load(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Memory:
        columns = [iter(tensors[n].tolist()) for n in ("tokens", "policy_version", "behavior_logprobs")]
        replay: dict[str, Stored] = {}
        for name, num_correct, num_samples, headers in state["replay"]:
            rollouts = []
            for length, temperature in headers:
                tokens, versions, logprobs = (list(islice(column, length)) for column in columns)
                rollouts.append(_stored(name, tokens, versions, logprobs, temperature))
            replay[name] = Stored(num_correct=num_correct, num_samples=num_samples, rollouts=tuple(rollouts))
        scalars, waiting = state["scalars"], tuple(state["waiting"])
        return Memory(scalars=scalars, waiting=waiting, replay=replay, replay_open=state["replay_open"])


def first_memory(method: Method) -> Memory:
    """Return the memory before the first step."""
    controller = method.part(Controller)
    return Memory(scalars={} if controller is None else dict(controller.initial))


def _stored(
    name: str, tokens: Sequence[int], versions: Sequence[int], logprobs: Sequence[float], temperature: float
) -> Rollout:
    """Return a stored sample as a rollout, finished and sampled by an older policy without truncation."""
    return Rollout(
        problem_id=name,
        sample_index=0,
        completion_ids=tuple(tokens),
        origin=(Origin.STORED,) * len(tokens),
        policy_version=tuple(versions),
        behavior_logprobs=tuple(logprobs),
        distribution=Distribution(temperature=temperature),
        stop=Stop.STOP_TOKEN,
    )


def decide(method: Method, memory: Memory, step: int, seed: int) -> dict[str, float]:
    """Return the controller's values for this step by name, or {} if the method has no controller."""
    controller = method.part(Controller)
    if controller is None:
        return {}
    draw = float(generator(seed, Purpose.PLAN, step, "controller").random())
    return dict(controller.decide(memory.scalars, step, draw))


def learn(
    method: Method, memory: Memory, step: int, values: Mapping[str, float], seen: Mapping[str, float]
) -> Memory:
    """Return the memory after the step. ``seen`` has the statistics and the last update's gradient norm."""
    controller = method.part(Controller)
    if controller is None:
        return memory
    return replace(memory, scalars=dict(controller.learn(memory.scalars, step, values, seen)))


def with_waiting(waiting: Sequence[str], pushed: Iterable[str]) -> tuple[str, ...]:
    """Return the waiting problems, newest first. A problem that is pushed again moves to the front."""
    return tuple(dict.fromkeys([*reversed(list(pushed)), *waiting]))


Sample = tuple[list[int], list[int], list[float], float]  # tokens, versions, log-probabilities, temperature
Seen = tuple[str, int, int, list[Sample]]  # problem, number correct, number scored, correct samples (JSON)


def seen_of(name: str, num_correct: int, num_samples: int, right: Iterable[Rollout]) -> Seen:
    def sample(r: Rollout) -> Sample:
        columns = list(r.completion_ids), list(r.policy_version), list(r.behavior_logprobs or ())
        return (*columns, r.distribution.temperature)

    return name, num_correct, num_samples, [sample(r) for r in right]


def remember(replay: Mapping[str, Stored], seen: Iterable[Seen], most_stored: int) -> dict[str, Stored]:
    """Return the replay store after a step, with the counts of each problem's latest group. A fully solved
    problem is removed."""
    found = dict(replay)
    for name, num_correct, num_samples, right in seen:
        fresh = tuple(_stored(name, *parts) for parts in right)
        old = found.pop(name, None)
        kept = (*fresh, *(old.rollouts if old else ()))[:most_stored]
        if num_correct < num_samples and kept:
            found[name] = Stored(num_correct=num_correct, num_samples=num_samples, rollouts=kept)
    return found


def choose_replays(
    replay: Mapping[str, Stored], spec: Replay, count: int, known: Sequence[str], draw: np.random.Generator
) -> list[str]:
    """Draw up to ``count`` different problems with k of K samples correct (0 < k < K), each with probability
    ∝ N(k; K/2, σ)."""
    names = [n for n in known if n in replay and 0 < replay[n].num_correct < replay[n].num_samples]
    if not names or count == 0:
        return []
    solved = np.array([replay[n].num_correct for n in names], dtype=np.float64)
    half = np.array([replay[n].num_samples for n in names], dtype=np.float64) / 2
    weight = np.exp(-0.5 * ((solved - half) / spec.sigma) ** 2)
    picked = draw.choice(len(names), size=min(count, len(names)), replace=False, p=weight / weight.sum())
    return [names[int(i)] for i in picked]
