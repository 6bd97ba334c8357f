"""Where a method's controller meets the steps: its values before one, its next state after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from truestep.objective.methods.row import Method
from truestep.records import StepReport
from truestep.seeding import Purpose, generator
from truestep.train.buffers import Memory


def decide(method: Method, memory: Memory, step: int, seed: int) -> dict[str, float]:
    """This step's values by name; none without a controller."""
    if method.controller is None:
        return {}
    draw = float(generator(seed, Purpose.PLAN, step, "controller").random())
    return dict(method.controller.decide(memory.scalars, step, draw))


def learn(
    method: Method,
    memory: Memory,
    step: int,
    values: Mapping[str, float],
    statistics: Mapping[str, float],
    reports: Sequence[StepReport],
) -> Memory:
    """The memory after the step: statistics of its data, and the gradient norm of its last update."""
    if method.controller is None:
        return memory
    seen = {**statistics, "grad_norm": reports[-1].grad_norm}
    return replace(memory, scalars=dict(method.controller.learn(memory.scalars, step, values, seen)))
