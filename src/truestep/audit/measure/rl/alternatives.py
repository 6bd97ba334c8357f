"""What an RL step may compute instead of what it was asked for: one change of the objective each, with a name.

``DEFAULT`` codes lead to a different known objective; all others are faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from truestep.audit.measure.findings import Cause, cause
from truestep.audit.measure.rl.objective import KNOWN, Objective

EPSILONS = (1e-6, 1e-8, 1e-4, 1e-5, 1e-3, 1e-2, 1e-9, 0.0)
CLIPS = (3e-4, 4e-4, 0.1, 0.15, 0.2, 0.22, 0.25, 0.28, 0.3, 0.4, 0.5)
DUALS = (0.0, 2.0, 3.0, 5.0, 10.0)
CORRECTION_BOUNDS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
# Codes of differences that make a known objective of a different name; without these, it is a fault.
OBJECTIVES = frozenset(
    {"normaliser", "baseline", "advantage_scale", "surrogate", "ratio_level", "clip_range", "kl_estimate", "epsilon",
     "kl_weight", "entropy_weight", "truncated", "scale", "correction", "rows_counted"}
)  # fmt: skip
SPLITS = frozenset({"local_normaliser", "local_kl", "local_entropy", "local_group", "padded_width"})


@dataclass(frozen=True)
class Alternative:
    """A changed objective. ``cause`` says what is different."""

    objective: Objective
    cause: Cause


def alternatives(asked: Objective) -> Iterator[Alternative]:
    """Yield all objectives that differ from the asked one in one respect."""
    for changes, code, kind, values in _changes(asked):
        yield Alternative(replace(asked, **changes), cause(code, kind, **values))


Change = tuple[dict[str, Any], str, str, dict[str, Any]]


def _choices(o: Objective, name: str, code: str, kind: str) -> Iterator[Change]:
    """Yield a change for every other known value of a field."""
    for value in KNOWN[name]:
        if value != getattr(o, name):
            yield {name: value}, code, kind, {"found": value, "asked": getattr(o, name)}


def _changes(o: Objective) -> Iterator[Change]:
    yield from _denominators(o)
    yield from _advantages(o)
    yield from _ratios(o)
    yield from _masks(o)
    yield from _terms(o)


def _denominators(o: Objective) -> Iterator[Change]:
    yield from _choices(o, "normaliser", "normaliser", "rl_normaliser")
    for scope in KNOWN["scope"]:
        if scope != o.scope:
            own = {"kl_scope": o.kl_scope or o.scope, "entropy_scope": o.entropy_scope or o.scope}
            code = {"rollout": "normaliser", "rollout_sum": "rollout_normaliser"}.get(
                scope, "local_normaliser"
            )
            yield {"scope": scope}, code, "rl_scope", {"found": scope}
            if o.kl != "none" or o.entropy:
                yield {"scope": scope, **own}, code, "rl_scope", {"found": scope}
    for scope in ("step", "micro_batch", "micro_batch_sum", "rank"):
        if o.kl != "none" and scope != (o.kl_scope or o.scope):
            yield {"kl_scope": scope}, "local_kl", "rl_kl_scope", {"found": scope}
        if o.entropy and scope != (o.entropy_scope or o.scope):
            yield {"entropy_scope": scope}, "local_entropy", "rl_entropy_scope", {"found": scope}
    codes = {"padded": "padded_width", "untruncated_rows": "rows_counted", "rewarded_rows": "rows_counted"}
    for value in KNOWN["counted"]:
        if value != o.counted:
            code = codes.get(value, "denominator")
            yield {"counted": value}, code, "rl_counted", {"found": value, "asked": o.counted}
            if value == "padded":
                for scope in ("micro_batch", "micro_batch_sum"):
                    yield {"counted": value, "scope": scope}, code, "rl_counted", {"found": value}
    for changes in ({"normaliser": "longest", "scope": "micro_batch"},):
        yield changes, "padded_width", "rl_counted", {"found": "longest"}
    if o.normaliser == "sequences":
        both = {"normaliser": "tokens", "scope": "micro_batch"}
        yield both, "local_normaliser", "rl_scope", {"found": "micro_batch"}
    if o.entropy and o.entropy_normaliser != "sequences":
        yield {"entropy_normaliser": "sequences"}, "entropy_weight", "rl_entropy_normaliser", {}


def _advantages(o: Objective) -> Iterator[Change]:
    yield from _choices(o, "scale", "advantage_scale", "rl_advantage_scale")
    if o.scale != "group_std":
        for epsilon in EPSILONS:
            for ddof in (0, 1):
                changes = {"scale": "group_std", "epsilon": epsilon, "ddof": ddof}
                yield (
                    changes,
                    "advantage_scale",
                    "rl_advantage_scale",
                    {"found": "group_std", "asked": o.scale},
                )
    yield from _choices(o, "baseline", "baseline", "rl_baseline")
    if o.scale != "none":
        other = 1 - o.ddof
        yield {"ddof": other}, "advantage_scale", "rl_ddof", {"found": other}
        for epsilon in EPSILONS:
            if epsilon != o.epsilon:
                yield {"epsilon": epsilon}, "epsilon", "rl_epsilon", {"found": epsilon, "asked": o.epsilon}
    for value in KNOWN["grouping"]:
        if value != o.grouping:
            code = "local_group" if value in ("micro_batch", "rank") else "wrong_group"
            yield {"grouping": value}, code, "rl_grouping", {"found": value}
    for roll in (1, -1, 3, -3):
        yield {"roll": roll}, "shifted_advantage", "rl_roll", {"found": roll}
    yield {"sign": -o.sign}, "sign", "rl_sign", {}


def _ratios(o: Objective) -> Iterator[Change]:
    for value in KNOWN["surrogate"]:
        if value != o.surrogate:
            code = "clip" if value in ("clip_both", "clip_wrong") else "surrogate"
            yield {"surrogate": value}, code, "rl_surrogate", {"found": value, "asked": o.surrogate}
    yield from _choices(o, "level", "ratio_level", "rl_level")
    yield from _choices(o, "old", "old_logprobs", "rl_old")
    pairs = [(low, high) for low in CLIPS for high in CLIPS if (low, high) != (o.clip_low, o.clip_high)]
    for low, high in pairs:
        values = {"low": low, "high": high, "asked_low": o.clip_low, "asked_high": o.clip_high}
        yield {"clip_low": low, "clip_high": high}, "clip_range", "rl_clip_range", values
    for dual in DUALS:
        if dual != o.clip_dual:
            yield {"clip_dual": dual}, "clip_range", "rl_clip_dual", {"found": dual, "asked": o.clip_dual}
    for value in KNOWN["correction"]:
        if value != o.correction:
            code = "correction" if value != "inverse" else "wrong_correction"
            yield {"correction": value}, code, "rl_correction", {"found": value, "asked": o.correction}
    if o.correction != "none":
        for high in CORRECTION_BOUNDS:
            if high != o.correction_high:
                values = {"found": high, "asked": o.correction_high}
                yield {"correction_high": high}, "correction", "rl_correction_high", values


def _masks(o: Objective) -> Iterator[Change]:
    other = "masked" if o.truncated == "trained" else "trained"
    yield {"truncated": other}, "truncated", "rl_truncated", {"found": other}
    if o.truncated == "masked":
        yield {"counted": "untruncated_rows"}, "rows_counted", "rl_counted", {"found": "untruncated_rows"}
    for key, kind in (("stop_trained", "rl_stop"), ("first_trained", "rl_first")):
        yield {key: not getattr(o, key)}, "mask", kind, {"found": not getattr(o, key)}
        yield {key: not getattr(o, key), "counted": "all"}, "mask", kind, {"found": not getattr(o, key)}


def _terms(o: Objective) -> Iterator[Change]:
    if o.kl != "none":
        kinds = _choices(o, "kl", "kl_estimate", "rl_kl")
        yield from (change for change in kinds if change[0]["kl"] != "none")
        yield from _choices(o, "anchor", "kl_anchor", "rl_anchor")
        for cap in (5.0, 10.0, 20.0):
            yield {"kl_cap": cap}, "kl_estimate", "rl_kl_cap", {"found": cap}
