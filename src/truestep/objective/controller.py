"""Controllers, which update a method's scalar state once per step. Checkpoints contain this state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Scalars = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Controller:
    """The first state and the two pure functions of a controller. ``decide(state, step, draw)`` returns this
    step's values by name (weights of terms, switches of a plan); the draw is uniform in [0, 1).
    ``learn(state, step, values, seen)`` returns the next state, from the step's statistics and metrics."""

    initial: Scalars
    decide: Callable[[Scalars, int, float], Scalars]
    learn: Callable[[Scalars, int, Scalars, Scalars], Scalars]


def phases(*, gamma: float, warmup_steps: int) -> Controller:
    """Return a controller whose value ``imitate`` is 1 in the warm-up. After that, it is 1 with probability
    G_sft/(G_sft + γ·G_warmup), and otherwise 0. G_sft is the gradient norm of the last step that imitated,
    and G_warmup that of the last warm-up step. Source: arXiv:2505.13026."""

    def decide(state: Scalars, step: int, draw: float) -> Scalars:
        total = state["norm"] + gamma * state["warmup_norm"]
        share = state["norm"] / total if total > 0 else 1.0
        return {"imitate": float(step < warmup_steps or draw < share), "share": share}

    def learn(state: Scalars, step: int, values: Scalars, seen: Scalars) -> Scalars:
        if not values["imitate"]:
            return state
        norm = seen["grad_norm"]
        return {"norm": norm, "warmup_norm": norm if step < warmup_steps else state["warmup_norm"]}

    return Controller(initial={"norm": 0.0, "warmup_norm": 0.0}, decide=decide, learn=learn)


def learned_weights(*, policy: str, imitation: str, rate: float, least: float) -> Controller:
    """Return a controller whose values ``policy`` and ``imitation`` are weights e^(−2σ) of two losses L. Each
    σ descends the gradient of e^(−2σ)·L + σ. The arguments ``policy`` and ``imitation`` name the statistics
    used as L. Source: SuperRL (arXiv:2506.01096)."""
    losses = {"policy": policy, "imitation": imitation}

    def decide(state: Scalars, step: int, draw: float) -> Scalars:
        return {name: math.exp(-2 * state[name]) for name in losses}

    def learn(state: Scalars, step: int, values: Scalars, seen: Scalars) -> Scalars:
        found = dict(state)
        for name, loss in losses.items():
            if loss in seen:  # in a step without such tokens, the weight does not change
                found[name] = max(least, state[name] - rate * (1 - 2 * values[name] * seen[loss]))
        return found

    return Controller(initial={"policy": 0.0, "imitation": 1.0}, decide=decide, learn=learn)
