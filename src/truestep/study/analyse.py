"""Analysis of score tables, in which seeds and problems are crossed, and samples are nested in cells.

Every seed of an arm answers the same problems, so a score has two sources of error that do not average out
together: the training seed and the choice of problems. Both are counted. Tables are arrays [..., S seeds, P
problems] of the share of correct samples, one per benchmark; a paired difference is such a table too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from truestep.errors import UserError
from truestep.evaluate.compare import paired_t
from truestep.evaluate.interval import t_cdf, t_quantile

LEVEL, POWER = 0.975, 0.8
DF_SHARE = 0.7  # of Satterthwaite's degrees of freedom; see variance_and_df
MOST_FLIPPED = 20  # seeds whose sign patterns are counted one by one


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A mean over seeds and problems, with a 95 % interval and a p-value for a true mean of 0, at ``df``
    effective degrees of freedom. ``detectable`` is the smallest true value that such a table would detect
    with 80 % power at the 5 % level. With one seed, ``low`` and ``high`` are over problems only."""

    value: float
    low: float
    high: float
    stderr: float
    df: float
    p_value: float
    p_sign_flip: float
    detectable: float
    num_seeds: int
    num_problems: int
    seeds_known: bool
    sd_seeds: float
    sd_problems: float
    sd_residual: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The variance of a mean, split by source; ``seeds`` and ``problems`` each include the residual once."""

    mean: np.ndarray
    seeds: np.ndarray
    problems: np.ndarray
    residual: np.ndarray
    df_seeds: float
    df_problems: float
    df_residual: float
    noise_problems: np.ndarray  # Σ over benchmarks of (their part of ``problems``)² / (P_b - 1)


def parts(tables: Sequence[np.ndarray]) -> Parts:
    """Return the mean over benchmarks of the mean over seeds and problems, with its variance split by source.

    Shapes: tables of [..., S, P_b], results of [...]
    Equation: for one benchmark: var_s(row means)/S + var_p(column means)/P - MS_residual/(S P). Over several,
    rows are averaged first (all benchmarks share the seeds), and the other two parts are summed with weights
    1/B² (benchmarks do not share problems).
    Source: the two-way random model (Cornfield and Tukey 1956); unbiased for σ²_s/S + σ²_p/P + σ²_e/(SP)"""
    num_seeds, num = tables[0].shape[-2], len(tables)
    rows = sum(t.mean(-1) for t in tables) / num
    problems = residual = noise = np.zeros(tables[0].shape[:-2])
    for t in tables:
        columns, size = t.mean(-2), t.shape[-1]
        rest = t - t.mean(-1, keepdims=True) - columns[..., None, :] + t.mean((-1, -2), keepdims=True)
        free = (num_seeds - 1) * (size - 1)
        square = (rest**2).sum((-1, -2)) / free if free else np.zeros(t.shape[:-2])
        spread = columns.var(-1, ddof=1) if size > 1 else np.zeros(t.shape[:-2])
        problems = problems + spread / (size * num**2)
        noise = noise + (spread / (size * num**2)) ** 2 / max(1, size - 1)
        residual = residual + square / (num_seeds * size * num**2)
    total = sum(t.shape[-1] - 1 for t in tables)
    return Parts(
        mean=rows.mean(-1), problems=problems, residual=residual, noise_problems=noise,
        seeds=rows.var(-1, ddof=1) / num_seeds if num_seeds > 1 else np.zeros(rows.shape[:-1]),
        df_seeds=max(1, num_seeds - 1), df_problems=max(1, total),
        df_residual=max(1, (num_seeds - 1) * total),
    )  # fmt: skip


def variance_and_df(found: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Compute the variance of the mean and its effective degrees of freedom.

    The unbiased variance V_s + V_p - V_e can by chance be less than V_s or V_p, so V_s and V_p are used as
    lower bounds. Satterthwaite's df are too large if a source with few df has much of the variance: if five
    seeds have 90 % of it, coverage is 94.0 %, but 94.9 to 95.6 % with 0.7 of these df (at least the seeds').
    Equation: V = max(V_s, V_p, V_s + V_p - V_e); df = max(S - 1, 0.7 V² / Σ V_i²/df_i)
    Source: Satterthwaite 1946. Held by: benchmarks/coverage_study.py, tests/study/test_coverage.py"""
    plain = found.seeds + found.problems - found.residual
    variance = np.maximum(plain, np.maximum(found.seeds, found.problems))
    noise = found.seeds**2 / found.df_seeds + found.noise_problems
    noise = noise + found.residual**2 / found.df_residual
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.where(noise > 0, DF_SHARE * variance**2 / noise, found.df_problems)
    most = float(found.df_seeds + found.df_problems)
    return variance, np.clip(df, min(found.df_seeds, most), most)


def crossed(tables: Sequence[np.ndarray], *, bounds: tuple[float, float] = (-1.0, 1.0)) -> Crossed:
    """Compute the mean of the tables' means, with its interval. Shapes: [S, P_b] each. Raises UserError if
    the tables do not have the same seeds."""
    if not tables or len({t.shape[0] for t in tables}) != 1 or min(t.size for t in tables) == 0:
        raise UserError("a comparison needs at least one problem and the same seeds on every benchmark")
    found = parts([t.astype(float) for t in tables])
    num_seeds, num_problems = tables[0].shape[0], sum(t.shape[1] for t in tables)
    variance, df = (float(x) for x in variance_and_df(found))
    value, degenerate = float(found.mean), variance < 1e-30
    if degenerate:
        # The table shows no error, so the interval is computed as if every seed answered one more problem differently.
        _, low, high, _, detectable = paired_t(np.full(max(2, num_problems), value), 1.0)
        stderr, p_value = (high - low) / (2 * t_quantile(LEVEL, df)), 1.0 if value == 0 else 0.0
        detectable = detectable or 1.0
    else:
        stderr = math.sqrt(variance)
        half, p_value = t_quantile(LEVEL, df) * stderr, 2 * t_cdf(-abs(value) / stderr, df)
        if num_seeds == 2 and found.seeds > 0:
            # No mixture of df is correct for the single degree of freedom of two seeds (coverage down to 90 %).
            error = math.sqrt(float(found.seeds))
            half = max(half, t_quantile(LEVEL, 1) * error)
            p_value = max(p_value, 2 * t_cdf(-abs(value) / error, 1))
        low, high = value - half, value + half
        detectable = (t_quantile(LEVEL, df) + t_quantile(POWER, df)) * stderr
    return Crossed(
        value=value, low=max(bounds[0], low), high=min(bounds[1], high), stderr=stderr, df=df,
        p_value=min(1.0, p_value), p_sign_flip=sign_flip(sum(t.mean(1) for t in tables) / len(tables)),
        detectable=detectable, num_seeds=num_seeds, num_problems=num_problems, seeds_known=num_seeds > 1,
        sd_seeds=math.sqrt(max(0.0, float(found.seeds - found.residual) * num_seeds)),
        sd_problems=math.sqrt(max(0.0, float(found.problems - found.residual) * num_problems)),
        sd_residual=math.sqrt(float(found.residual) * num_seeds * num_problems),
    )  # fmt: skip


def sign_flip(by_seed: np.ndarray) -> float:
    """Return the exact two-sided sign-flip p-value of the mean over seeds, which is at best 2 / 2^S."""
    size = len(by_seed)
    if size > MOST_FLIPPED:
        raise UserError(f"an exact test over {size} seeds is too expensive; use at most {MOST_FLIPPED} seeds")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=size)))
    sums, seen = np.abs(signs @ by_seed), abs(by_seed.sum())
    return float((sums >= seen - 1e-12).mean())


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Return Holm's adjusted p-values, which limit the chance of any false finding among them to 5 %.

    Source: Holm 1979. Held by: tests/study/test_analyse.py (statsmodels)"""
    highest, adjusted = 0.0, dict.fromkeys(p_values, 0.0)
    for rank, name in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        adjusted[name] = highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
    return adjusted


def sample_sd(correct: Sequence[np.ndarray], samples: Sequence[int]) -> float | None:
    """Return the standard deviation of one sample around its chance of being correct, or None with one sample
    per problem. More samples reduce only this part of the error. Shapes: correct [S, P_b] counts"""
    pooled = [c / k * (1 - c / k) * k / (k - 1) for c, k in zip(correct, samples, strict=True) if k > 1]
    return math.sqrt(float(np.mean(np.concatenate([p.ravel() for p in pooled])))) if pooled else None


def verdict(found: Crossed, p_adjusted: float | None) -> str:
    """Say in words what can be concluded. A null result says which difference would have been detected."""
    p = found.p_value if p_adjusted is None else p_adjusted
    if not found.seeds_known:
        return "one seed: nothing can be concluded about training"
    if p < 0.05:
        return "higher" if found.value > 0 else "lower"
    points = f"{100 * found.detectable:.1f} points"
    return f"no difference shown (a difference of {points} would have been detected)"
