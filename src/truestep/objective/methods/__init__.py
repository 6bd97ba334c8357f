"""The table of methods: a method is a row (plan + gate + advantage + terms), never a branch in a trainer.

``build("paper", {"clip_high": 0.3})`` gives a Method; the training step sees its terms and never its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from truestep.objective.methods import guided, mixed, rl, sft
from truestep.objective.methods.row import Extras, Method, Term, complete

__all__ = ["METHODS", "Method", "Term", "build", "shaped_reward"]

METHODS: dict[str, Callable[..., Method]] = {
    row.__name__: row
    for row in (
        sft.sft, sft.dft, sft.psft, sft.iw_sft, sft.trsft, sft.power_sft, sft.entropy_sft,
        rl.paper, rl.grpo, rl.dr_grpo, rl.dapo, rl.ppo, rl.rloo, rl.reinforce_pp, rl.reinforce_pp_baseline, rl.gspo,
        rl.cispo, rl.nft, rl.sapo,
        mixed.luffy, mixed.multi_task, mixed.relift, mixed.srft, mixed.prefix_rft, mixed.hpt, mixed.trapo,
        mixed.exgrpo, mixed.rl_plus,
        guided.chord_mu, guided.chord_phi, guided.uft, guided.super_rl, guided.sasr, guided.bread, guided.ghpo,
    )
}  # fmt: skip
EXTRAS = {
    f.name: {"float | None": float, "str | None": str, "float": float, "str": str}[str(f.type)]
    for f in fields(Extras)
}


def build(name: str, options: Mapping[str, Any]) -> Method:
    """The row of that name with its options. Raises ValueError naming the known methods or options."""
    if name not in METHODS:
        raise ValueError(f"method = {name!r} is not one of {', '.join(METHODS)}")
    own = {key: type(p.default) for key, p in inspect.signature(METHODS[name]).parameters.items()}
    plain = METHODS[name]()
    known = own if plain.plan is None else {**own, **EXTRAS}
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"method_options.{unknown[0]}: {name} has {', '.join(known) or 'no options'}")
    typed = {key: _typed(key, value, known[key]) for key, value in options.items()}
    row = METHODS[name](**{key: value for key, value in typed.items() if key in own})
    return complete(row, Extras(**{key: value for key, value in typed.items() if key not in own}))


def _typed(key: str, value: Any, kind: type) -> Any:
    """The value as its option's type; a whole number may be written with or without a point."""
    if kind in (int, float) and type(value) in (int, float) and kind(value) == value:
        return kind(value)
    if type(value) is not kind:
        raise ValueError(f"method_options.{key}: expected {kind.__name__}, got {value!r}")
    return value


def shaped_reward(method: Method, reward: float, num_tokens: int, max_new_tokens: int) -> float:
    """The reward after DAPO's overlong penalty: linear from 0 to −½ over the last fraction of the limit.

    DAPO subtracts up to 1 from rewards of ±1; with rewards of 0 and 1 the same shape has half the size.
    """
    buffer = method.overlong_fraction * max_new_tokens
    over = num_tokens - (max_new_tokens - buffer)
    return reward if buffer == 0 or over <= 0 else reward - 0.5 * min(1.0, over / buffer)
