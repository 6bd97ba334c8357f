"""The table of methods. A method is a row (plan, gate, advantage, terms, parts), not a branch in a trainer.

``build("grpo", {"clip_high": 0.3})`` returns a Method; the training step uses only its terms, never its name.
A row is a function with keyword-only options that returns a Method. ``build`` also accepts a user's row.

If a paper does not state a constant plainly, a tag gives its source: [C] read in the official code, [P] read
in the paper, [S] read in a secondary source, [U] not verified.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from truestep.objective.methods import guided, mixed, rl, sft
from truestep.objective.methods.row import Extras, Method, Term, complete

__all__ = ["METHODS", "Method", "Row", "Term", "build", "fits_older_samples"]

Row = Callable[..., Method]
METHODS: dict[str, Row] = {
    row.__name__: row
    for row in (
        sft.sft, sft.dft, sft.psft, sft.iw_sft, sft.trsft, sft.power_sft, sft.entropy_sft,
        rl.grpo_token_mean, rl.grpo, rl.dr_grpo, rl.dapo, rl.ppo, rl.rloo, rl.reinforce_pp, rl.reinforce_pp_baseline, rl.gspo,
        rl.cispo, rl.nft, rl.sapo,
        mixed.luffy, mixed.multi_task, mixed.relift, mixed.srft, mixed.prefix_rft, mixed.hpt, mixed.trapo,
        mixed.exgrpo, mixed.rl_plus,
        guided.chord_mu, guided.chord_phi, guided.uft, guided.super_rl, guided.sasr, guided.bread, guided.ghpo,
    )
}  # fmt: skip
RENAMED = {"paper": "grpo_token_mean"}
EXTRAS = {f.name: type(f.default) for f in fields(Extras)}


def build(method: str | Row, options: Mapping[str, Any]) -> Method:
    """Build a method from a known name or a user's function, with its options. Raises ValueError for an
    unknown name or option."""
    if isinstance(method, str) and method not in METHODS:
        now = f"; it is now called {RENAMED[method]}" if method in RENAMED else ""
        raise ValueError(f"method = {method!r} is not one of {', '.join(METHODS)}{now}")
    row = METHODS[method] if isinstance(method, str) else method
    own = {key: type(p.default) for key, p in inspect.signature(row).parameters.items()}
    known = own if row().plan is None else {**own, **EXTRAS}
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"method_options.{unknown[0]} is unknown; {row.__name__} has {', '.join(known) or 'no options'}"
        )
    typed = {key: _typed(key, value, known[key]) for key, value in options.items()}
    made = row(**{key: value for key, value in typed.items() if key in own})
    return complete(made, {key: value for key, value in typed.items() if key not in own})


def fits_older_samples(name: str) -> bool:
    """Return whether a built-in method with a correction may train on samples of an older version of the policy
    (``rollout_ahead``)."""
    return METHODS[name]().plan is not None and not build(name, {"correction": "truncate"}).staleness_fault


def _typed(key: str, value: Any, kind: type) -> Any:
    """Convert the value to the option's type. A whole number may also be written with a decimal point."""
    if kind in (int, float) and type(value) in (int, float) and kind(value) == value:
        return kind(value)
    if type(value) is not kind:
        raise ValueError(f"method_options.{key}: expected {kind.__name__}, got {value!r}")
    return value
