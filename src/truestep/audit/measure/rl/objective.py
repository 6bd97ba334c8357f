"""An RL objective, and the coefficient that it gives to every token of a step.

The gradient of every objective here is −Σ_t C_t · w_t · ∇log π_t, with a coefficient C_t (advantage, ratio, clip)
and a weight w_t (one over the normaliser), plus the same for a KL term and an entropy bonus.
Sources: docs/objective.md, which names the paper of every formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from truestep.audit.measure.rl.batch import Batch

# The known values of each field that has a fixed set.
KNOWN: dict[str, tuple[str, ...]] = {
    "baseline": ("group_mean", "leave_one_out", "batch_mean", "group_median", "group_min", "none"),
    "scale": ("group_std", "batch_std", "none"),
    "grouping": ("group", "batch", "strided", "shifted", "micro_batch", "rank"),
    "surrogate": ("clip", "clip_both", "clip_wrong", "importance", "reinforce", "cispo", "sapo"),
    "level": ("token", "sequence"),
    "old": ("old", "policy", "stale", "engine", "reference", "initial", "previous_token", "next_token"),
    "correction": ("none", "truncate", "mask", "inverse", "sequence_truncate", "sequence_mask", "ratio"),
    "kl": ("none", "k1", "k2", "k3", "k3_ratio", "abs"),
    "anchor": ("reference", "old", "initial", "engine"),
    "truncated": ("trained", "masked"),
    "normaliser": ("tokens", "sequences", "sequence_sums", "max_length", "longest", "groups"),
    "counted": (
        "trained",
        "all",
        "padded",
        "with_prompts",
        "with_prompt_targets",
        "untruncated_rows",
        "rewarded_rows",
    ),
    "scope": ("step", "micro_batch", "micro_batch_sum", "rank", "rollout", "rollout_sum"),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a framework is asked for, or an alternative to it. The defaults are GRPO's with a token mean."""

    baseline: str = "group_mean"
    scale: str = "group_std"
    ddof: int = 1  # 1: the standard deviation divides by n − 1
    epsilon: float = 1e-4  # added to the standard deviation
    grouping: str = "group"  # over which rows the baseline and the spread are taken
    roll: int = 0  # the advantage belongs to the sample this many places later
    sign: float = 1.0  # of the advantage
    surrogate: str = "clip"
    level: str = "token"  # of the ratio
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 0.0  # with A < 0, a ratio above this is clipped too; 0: it is not
    tau: tuple[float, float] = (1.0, 1.05)  # of SAPO, for A > 0 and A < 0
    old: str = "old"
    correction: str = "none"
    correction_low: float = 0.0
    correction_high: float = 2.0
    kl: str = "none"
    beta: float = 0.0
    anchor: str = "reference"
    kl_cap: float = 0.0  # a token whose KL estimate is larger has no gradient; 0: no cap
    kl_scope: str = ""  # "": that of the policy term
    entropy: float = 0.0
    entropy_scope: str = ""
    entropy_normaliser: str = "tokens"
    truncated: str = "trained"
    stop_trained: bool = True
    first_trained: bool = True
    normaliser: str = "tokens"
    counted: str = "trained"
    scope: str = "step"
    max_tokens: int = 0  # L of ``max_length``; 0: the configured limit of a completion
    factor: float = 1.0

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}; use {', '.join(known)}")

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Objective:
        """Return the objective that a subject wrote. Raises ValueError or TypeError if it is not one."""
        usual, made = vars(cls()), dict[str, Any]()
        for name, value in found.items():
            if name not in usual:
                raise ValueError(f"{name} is not a field of an objective")
            kind = type(usual[name])
            made[name] = tuple(map(float, value)) if kind is tuple else kind(value)
        return cls(**made)

    def to_json(self) -> dict[str, Any]:
        """Return the most important fields, and those that do not have their usual value."""
        usual, shown = vars(type(self)()), ("normaliser", "baseline", "scale", "surrogate", "level")
        return {k: v for k, v in vars(self).items() if k in shown or v != usual[k]}


@dataclass(frozen=True)
class Parts:
    """The coefficients [K] of the three parts of an objective, each with its own weight included."""

    policy: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    edge: np.ndarray = field(
        default_factory=lambda: np.zeros(0, bool)
    )  # M: tokens too close to a clip to tell

    @property
    def whole(self) -> np.ndarray:
        return self.policy + self.kl + self.entropy


EDGE = 2e-5  # relative: a ratio this close to a bound is on either side of it, because of rounding


def coefficients(o: Objective, b: Batch) -> Parts:
    """Return what the objective gives to every column of this step."""
    mask = trained_tokens(o, b)
    ratio = _ratio(o, b, mask)
    advantage = o.sign * advantages(o, b)[b.row]
    gain, edge = _surrogate(o, ratio, advantage)
    weight = weights(o, b, mask, o.scope, o.normaliser) * mask * o.factor
    policy = gain * _correction(o, b, mask) * weight
    kl_weight = weights(o, b, mask, o.kl_scope or o.scope, o.normaliser) * mask * o.factor
    kl = -o.beta * _kl(o, b, ratio) * kl_weight if o.kl != "none" else np.zeros(len(mask))
    bonus = np.zeros(len(b.lengths))
    if o.entropy:
        scope = o.entropy_scope or o.scope
        each = weights(o, b, mask, scope, o.entropy_normaliser) * mask * o.factor
        bonus = o.entropy * b.of_row(each) / np.maximum(1, b.lengths)
    pad = np.zeros(b.size - len(mask))
    tail = np.concatenate([np.zeros(b.size - len(bonus)), bonus])
    zero = np.zeros(b.size)
    return Parts(
        np.concatenate([policy, pad]), np.concatenate([kl, pad]), tail if o.entropy else zero, edge & mask
    )


def trained_tokens(o: Objective, b: Batch) -> np.ndarray:
    """Return the mask [M] of the tokens that the objective trains in this step."""
    mask = b.present[b.row]
    if o.truncated == "masked":
        mask = mask & ~b.truncated[b.row]
    if not o.stop_trained:
        mask = mask & ~b.is_stop
    if not o.first_trained:
        mask = mask & (b.position > 0)
    return np.asarray(mask)


# ------------------------------------------------------------------------------------------------- advantages


def _groups(o: Objective, b: Batch) -> np.ndarray:
    rows, size = np.arange(len(b.rewards)), int(np.bincount(b.groups)[0])
    num_groups = len(rows) // size
    if o.grouping == "strided":  # rows that are num_groups apart
        return rows % num_groups
    if o.grouping == "shifted":  # groups that begin one row late
        return ((rows - 1) % len(rows)) // size
    if o.grouping == "micro_batch":  # the part of a group that is in one micro-batch
        return b.groups * 1000 + b.micro
    if o.grouping == "rank":  # all rows of a rank
        return b.rank
    return np.zeros_like(rows) if o.grouping == "batch" else b.groups


def advantages(o: Objective, b: Batch) -> np.ndarray:
    """Return the advantage of every row [R], computed over the whole rollout batch."""
    groups, found = _groups(o, b), np.zeros(len(b.rewards))
    whole = float(np.std(b.rewards, ddof=o.ddof))
    for group in np.unique(groups):
        here = groups == group
        r = b.rewards[here]
        mean, n = float(r.mean()), len(r)
        base: Any = {
            "group_mean": mean, "none": 0.0, "batch_mean": float(b.rewards.mean()), "group_min": float(r.min()),
            "group_median": float(np.median(r)), "leave_one_out": (r.sum() - r) / max(1, n - 1),
        }[o.baseline]  # fmt: skip
        spread = float(np.std(r, ddof=o.ddof)) if n > o.ddof else 0.0
        divisor = {"group_std": spread + o.epsilon, "batch_std": whole + o.epsilon, "none": 1.0}[o.scale]
        found[here] = (r - base) / divisor if divisor else 0.0
    return np.roll(found, o.roll)


# ------------------------------------------------------------------------------------------ ratio, clip, terms


def _per_row_mean(b: Batch, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return for each token the mean over the trained tokens of its row. Shape: M."""
    counts = np.maximum(1.0, b.of_row(mask.astype(float)))
    return np.asarray((b.of_row(values * mask) / counts)[b.row])


def _ratio(o: Objective, b: Batch, mask: np.ndarray) -> np.ndarray:
    if o.old in ("previous_token", "next_token"):
        step = 1 if o.old == "previous_token" else -1
        past = np.roll(b.old, step)
        ends = b.position == (0 if step == 1 else b.lengths[b.row] - 1)
        past = np.where(ends, 0.0, past)  # padding, as a shifted tensor has it
    else:
        past = {"policy": b.now, "old": b.old, "stale": b.stale, "engine": b.engine, "initial": b.initial,
                "reference": b.reference}[o.old]  # fmt: skip
    log_ratio = np.clip(b.now - past, -20, 20)
    if o.level == "sequence":
        log_ratio = _per_row_mean(b, log_ratio, mask)
    return np.asarray(np.exp(log_ratio))


def _surrogate(o: Objective, r: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return C [M], the derivative of the surrogate by log π, and the tokens at the edge of a clip."""
    low, high = 1 - o.clip_low, 1 + o.clip_high
    bounds = [low, high] + ([o.clip_dual] if o.clip_dual else [])
    edge = np.any([np.abs(r / bound - 1) < EDGE for bound in bounds if bound > 0], axis=0)
    if o.surrogate == "reinforce":
        return a.copy(), np.zeros(len(a), bool)
    if o.surrogate == "importance":
        return a * r, np.zeros(len(a), bool)
    if o.surrogate == "cispo":
        return a * np.clip(r, low, high), np.zeros(len(a), bool)
    if o.surrogate == "sapo":
        tau = np.where(a > 0, o.tau[0], o.tau[1])
        x = 1 / (1 + np.exp(-tau * (r - 1)))
        return a * r * 4 * x * (1 - x), np.zeros(len(a), bool)
    inside = (r >= low) & (r <= high)
    kept = {
        "clip": np.where(a > 0, r <= high, r >= low),
        "clip_both": inside,
        "clip_wrong": np.where(a > 0, r >= low, r <= high),
    }[o.surrogate]
    if o.clip_dual:
        kept = kept & ((a >= 0) | (r <= o.clip_dual))
    return a * r * kept, edge & (a != 0)


def _correction(o: Objective, b: Batch, mask: np.ndarray) -> np.ndarray:
    """Return the factor [M] for the gap between the sampler and the trainer, ρ = π_old/π_engine."""
    gap = b.old - b.engine
    if o.correction == "none":
        return np.ones(len(gap))
    if o.correction.startswith("sequence"):
        gap = b.of_row(gap * mask)[b.row]
    rho = np.exp(np.clip(gap, -20, 20))
    if o.correction == "inverse":
        return np.minimum(1 / rho, o.correction_high)
    if o.correction == "ratio":
        return rho
    if o.correction in ("mask", "sequence_mask"):
        return rho * ((rho >= o.correction_low) & (rho <= o.correction_high))
    return np.clip(rho, o.correction_low, o.correction_high)


def _kl(o: Objective, b: Batch, ratio: np.ndarray) -> np.ndarray:
    """Return the derivative by log π of the KL estimate [M]."""
    anchor = {"reference": b.reference, "old": b.old, "initial": b.initial, "engine": b.engine}[o.anchor]
    d = b.now - anchor
    slope = {"k1": np.ones_like(d), "k2": d, "k3": 1 - np.exp(-d), "k3_ratio": ratio * d, "abs": np.sign(d)}[
        o.kl
    ]
    if o.kl_cap:
        k3 = np.exp(-d) + d - 1
        size = {"k1": np.abs(d), "k2": d**2 / 2, "abs": np.abs(d)}.get(o.kl, k3)
        slope = np.where(size > o.kl_cap, 0.0, slope)
    return np.asarray(slope)


# ------------------------------------------------------------------------------------------------- normalisers


def weights(o: Objective, b: Batch, mask: np.ndarray, scope: str, normaliser: str) -> np.ndarray:
    """Return one over the normaliser of every token [M]. ``scope`` says over which rows it counts."""
    counts = _counts(o, b, mask)
    rows = np.arange(len(b.lengths))
    numbers = sorted(set(b.micro[b.present].tolist()))
    # (the rows of a part, the rows that its normaliser counts, the share of this part in the loss)
    parts = [(b.present, b.present, 1.0)]
    if scope in ("micro_batch", "micro_batch_sum"):
        share = 1 / len(numbers) if scope == "micro_batch" else 1 / b.num_ranks
        parts = [(b.micro == n, b.micro == n, share) for n in numbers]
    if scope == "rank":
        ranks = [(b.rank == rank) & b.present for rank in range(b.num_ranks)]
        parts = [(here, here, 1 / b.num_ranks) for here in ranks]
    if scope in (
        "rollout",
        "rollout_sum",
    ):  # the mean over the whole rollout batch; ``rollout``: times its parts
        parts = [(b.present, np.ones(len(rows), bool), float(b.case.parts) if scope == "rollout" else 1.0)]
    found = np.zeros(len(rows))
    for here, counted, share in parts:
        found[here] = (share / _divisors(o, b, counts, counted, normaliser))[here]
    return np.asarray(found[b.row])


def _counts(o: Objective, b: Batch, mask: np.ndarray) -> np.ndarray:
    """Return how many tokens of each row [R] the normaliser counts, if the whole rollout were in the step."""
    everything = trained_tokens(o, b) if b.present.all() else mask | _absent(o, b)
    if o.counted == "all":
        return b.lengths.astype(float)
    if o.counted in ("with_prompts", "with_prompt_targets"):
        fewer = 1 if o.counted == "with_prompt_targets" else 0
        return b.of_row(everything.astype(float)) + np.array([len(row.prompt) - fewer for row in b.case.rows])
    if o.counted == "padded":  # to the longest completion of its micro-batch
        return np.array([float(b.lengths[b.micro == number].max()) for number in b.micro])
    return b.of_row(everything.astype(float))


def _absent(o: Objective, b: Batch) -> np.ndarray:
    """Return the tokens [M] that would be trained in the other updates of this rollout batch."""
    absent = ~b.present[b.row]
    if o.truncated == "masked":
        absent = absent & ~b.truncated[b.row]
    if not o.stop_trained:
        absent = absent & ~b.is_stop
    return np.asarray(absent)


def _divisors(o: Objective, b: Batch, counts: np.ndarray, here: np.ndarray, normaliser: str) -> np.ndarray:
    """Return the divisor of a token of each row [R]; ``here`` has the rows that are counted."""
    number = float(here.sum())
    if o.counted == "untruncated_rows":
        number = float((here & (counts > 0)).sum())
    if o.counted == "rewarded_rows":
        number = float((here & (advantages(o, b) != 0)).sum())
    ones, number = np.ones(len(counts)), max(1.0, number)
    if normaliser == "tokens":
        used = advantages(o, b) != 0 if o.counted == "rewarded_rows" else ones
        return ones * max(1.0, float((counts * here * used).sum()))
    if normaliser == "sequences":
        return np.maximum(1.0, counts) * number
    if normaliser == "sequence_sums":
        return ones * number
    if normaliser == "longest":
        return ones * number * max(1.0, float((counts * here).max()))
    if normaliser == "groups":  # the mean over groups of the groups' token means
        used = np.unique(b.groups[here])
        total = {int(g): float((counts * here)[b.groups == g].sum()) for g in used}
        each = np.array([total.get(int(g), 1.0) for g in b.groups])
        return np.maximum(1.0, each) * len(used)
    return ones * number * float(o.max_tokens or b.case.max_tokens)
