"""95 % intervals of a mean of values in [0, 1], one value per problem, and the distributions needed for them.

With one sample per problem, the count is binomial, and Blaker's exact interval is used. With several samples,
Clopper and Pearson's interval is used with an effective number of trials, as in complex surveys. Coverage is
measured by benchmarks/coverage_evaluate.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLAKER_UP_TO = 2_000  # trials; with more trials, Clopper and Pearson's interval is hardly wider
GRID = (200, 30)  # points tried for an exact interval's end: between its bounds, then between two of them
PULL = 0.5  # how strongly a spread that comes from few problems is pulled to the largest possible one
NORMAL_QUANTILE = 1.959963984540054  # the two-sided 95 % point
Ends = tuple[float, float]
INWARD = 0.2  # in units of one trial: how much narrower the clustered interval is than Clopper and Pearson's


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of independent values (at least two)."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def mean_interval(values: np.ndarray, num_trials: float) -> Interval:
    """Return the mean of per-problem values in [0, 1] with its 95 % interval, which never has width 0.
    ``num_trials`` is the number of samples behind the values, which is at least the number of problems."""
    num_problems, mean = len(values), float(values.mean())
    if num_trials <= num_problems or num_problems == 1:
        low, high = binomial_interval(mean * num_problems, num_problems)
    else:
        variance = float(values.var(ddof=1))
        low, high = clustered_interval(mean, variance, num_problems, num_trials)
    return Interval(value=mean, low=max(0.0, min(low, mean)), high=min(1.0, max(high, mean)))


def binomial_interval(correct: float, num: int) -> Ends:
    """Return the exact interval of a share: Blaker's for up to 2,000 trials, Clopper and Pearson's for more.
    Source: Blaker 2000 (doi:10.2307/3315916)"""
    if correct != round(correct) or num > BLAKER_UP_TO:
        return _beta_ends(correct, float(num), 0.05, 0.0)
    return _blaker(round(correct), num, alpha_of(num))


def alpha_of(num_problems: int) -> float:
    """Return one minus the level at which the ends are computed. The level is 94 % for the smallest sets, and
    tends to 95 %. If the ends contain the true value in at least 94 % of cases, whatever that value is, then
    they contain it more often on average. At a level of 95 %, the average would be 96.4 % for 30 problems.
    Equation: alpha = 5 % + min(1 %, 30 % / n)"""
    return 0.05 + min(0.01, 0.3 / num_problems)


@lru_cache(maxsize=4096)
def _blaker(correct: int, num: int, alpha: float) -> tuple[float, float]:
    """Return the ends of {p: P(a tail at most as likely as that of this count) > alpha}, rounded outwards."""
    ends = []
    for outside in _beta_ends(
        float(correct), float(num), alpha, 0.0
    ):  # Blaker's interval is inside these ends
        inside = correct / num
        for num_points in GRID if outside not in (0.0, 1.0) else ():
            points = np.linspace(outside, inside, num_points)
            first = np.flatnonzero(_acceptability(correct, num, points) > alpha)[0]
            outside, inside = points[max(0, first - 1)], points[first]
        ends.append(float(outside))
    return ends[0], ends[1]


def _acceptability(correct: int, num: int, points: np.ndarray) -> np.ndarray:
    """Return Blaker's acceptability of a count at each p: P(counts whose smaller tail is not greater)."""
    counts, log_choose = np.arange(num + 1), _log_choose(num)
    points = np.clip(points, 1e-12, 1 - 1e-12)
    found, step = np.empty(len(points)), max(1, 2_000_000 // (num + 1))
    for start in range(0, len(points), step):
        p = points[start : start + step, None]
        mass = np.exp(log_choose + counts * np.log(p) + (num - counts) * np.log1p(-p))
        below = np.minimum(np.cumsum(mass, axis=1), 1.0)
        above = np.minimum(np.cumsum(mass[:, ::-1], axis=1)[:, ::-1], 1.0)
        tail = np.minimum(below, above)
        no_greater = tail <= tail[:, correct, None] * (1 + 1e-9)
        found[start : start + step] = np.where(no_greater, mass, 0.0).sum(axis=1)
    return found


@lru_cache(maxsize=8)
def _log_choose(num: int) -> np.ndarray:
    logs = np.array([math.lgamma(i + 1) for i in range(num + 1)])
    return logs[num] - logs - logs[::-1]


def clustered_interval(mean: float, variance: float, num_problems: int, num_trials: float) -> Ends:
    """Return the interval of a mean of per-problem shares, if each problem has several samples. The effective
    number of trials is the number for which a simple proportion would have the standard error observed across
    the problems. It is between the number of problems (if all samples of a problem agree) and that of samples
    (if they are independent). Because the error is an estimate, the number is multiplied by the squared ratio
    of the normal quantile to the Student quantile, which makes it smaller. It is never less than the number
    of problems, since the mean of n shares varies no more than the mean of n verdicts. If few problems decide
    the mean, their spread is underestimated too, so it is pulled towards the largest possible one, m (1 - m).
    Equation: v' = (1 - w) v + w m (1 - m), w = PULL / (PULL + (n m (1 - m))^2), n_eff = n m (1 - m) / v'
    Source for the effective number: Korn and Graubard 1998, Survey Methodology 24:193; the pull is our own"""
    most = mean * (1 - mean)
    if most == 0:  # all samples agree: nothing is known about the spread
        return binomial_interval(mean * num_problems, num_problems)
    pull = PULL / (PULL + (num_problems * most) ** 2)
    spread = (1 - pull) * variance + pull * most
    effective = num_problems * most / spread if spread > 0 else num_trials
    effective = min(effective, num_trials) * (NORMAL_QUANTILE / t_quantile(0.975, num_problems - 1)) ** 2
    effective = max(effective, num_problems)
    return _beta_ends(mean * effective, effective, alpha_of(num_problems), INWARD)


def _beta_ends(correct: float, num: float, alpha: float, inward: float) -> tuple[float, float]:
    """Return Clopper and Pearson's ends, moved inward by ``inward`` trials; the count may be fractional."""
    wrong = num - correct
    low = beta_quantile(alpha / 2, correct + inward, wrong + 1 - inward) if correct > 0 else 0.0
    high = beta_quantile(1 - alpha / 2, correct + 1 - inward, wrong + inward) if wrong > 0 else 1.0
    return low, high


def t_cdf(t: float, df: float) -> float:
    """Return Student's distribution function with ``df`` degrees of freedom.
    Equation: tail = I_x(df / 2, 1 / 2) / 2 at x = df / (df + t^2)"""
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))
    return tail if t < 0 else 1 - tail


@lru_cache(maxsize=256)
def t_quantile(probability: float, df: float) -> float:
    """Return the t at which ``t_cdf`` reaches a probability in [0.5, 1)."""
    high = 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    return _solve(lambda t: t_cdf(t, df), probability, 0.0, high)


@lru_cache(maxsize=4096)
def beta_quantile(probability: float, a: float, b: float) -> float:
    """Return the x at which the beta distribution function I_x(a, b) reaches a probability."""
    return _solve(lambda x: _incomplete_beta(a, b, x, 1 - x), probability, 0.0, 1.0)


def _solve(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) as a continued fraction (modified Lentz).
    ``y`` is 1 - x, which is passed because a subtraction would be less exact. Source: NIST DLMF 8.17.22"""
    if x <= 0 or y <= 0:
        return float(y <= 0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges quickly on the other side of the mean
        return 1 - _incomplete_beta(b, a, y, x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(y) - log_beta) / a
    tiny, c, d, fraction = 1e-300, 1.0, 0.0, 1.0
    for m in range(2000):
        half, odd = divmod(m, 2)
        if m == 0:
            step = 1.0
        elif odd:
            step = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            step = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        d = 1 / ((1 + step * d) or tiny)
        c = (1 + step / c) or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * (fraction - 1)
