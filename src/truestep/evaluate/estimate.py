"""Scores with intervals: avg@k and the unbiased pass@k, clustered by problem.

Problems are the sampled unit: the samples of one problem are alike, so counting them as independent would promise more
than the data know. Every interval here has a width greater than 0, also where all samples agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from truestep.records import RecordError, Stop, Verdict
from truestep.settings import SettingsError

Row = Mapping[str, Any]  # one sample: problem_id, sample_index, verdict, and where known stop, extracted, num_tokens


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a set of samples says about a model. n = correct + incorrect + unscored.

    ``score`` is the mean over problems of the share of correct samples; an unscored sample counts as not correct, and
    ``score_if_unscored_correct`` says how much that could have cost. ``stderr`` is None where one problem leaves it
    unknown.
    """

    score: float
    low: float
    high: float
    stderr: float | None
    score_if_unscored_correct: float
    n: int
    correct: int
    incorrect: int
    unscored: int
    num_problems: int
    truncated_rate: float
    extracted_rate: float
    mean_tokens: float
    pass_at: Mapping[int, Interval]

    def __post_init__(self) -> None:
        if self.n != self.correct + self.incorrect + self.unscored:
            raise RecordError("samples were lost: n is not correct + incorrect + unscored")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "pass_at": {str(k): asdict(v) for k, v in self.pass_at.items()}}


def by_problem(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The samples of each problem. Raises SettingsError where there are none, RecordError where one is there twice."""
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["sample_index"] in groups[row["problem_id"]]:
            raise RecordError(f"sample {row['problem_id']}/{row['sample_index']} is there twice")
        groups[row["problem_id"]][row["sample_index"]] = row
    if not groups:
        raise SettingsError("no samples to score: expected at least one problem, write a data set with limit >= 1")
    return {problem: list(samples.values()) for problem, samples in groups.items()}


def estimate(rows: Iterable[Row], pass_at: Sequence[int] = (1,)) -> Estimate:
    """The score of per-sample records with its interval, pass@k for each k of ``pass_at``, and what became of them all.

    Raises SettingsError where a problem has fewer than k samples.
    """
    groups = by_problem(rows)
    samples = [row for group in groups.values() for row in group]
    num_correct = np.array([_count(group, Verdict.CORRECT) for group in groups.values()], dtype=float)
    num_unscored = np.array([_count(group, Verdict.UNSCORED) for group in groups.values()], dtype=float)
    sizes = np.array([len(group) for group in groups.values()], dtype=float)
    for k in pass_at:
        if not 1 <= k <= sizes.min():
            raise SettingsError(f"pass_at = {k} needs samples_per_problem >= {k}, got {int(sizes.min())}")
    means = num_correct / sizes
    score = mean_interval(means, num_trials=sizes.sum())
    return Estimate(
        score=score.value,
        low=score.low,
        high=score.high,
        stderr=standard_error(means) if len(means) > 1 else None,
        score_if_unscored_correct=float(((num_correct + num_unscored) / sizes).mean()),
        n=len(samples),
        correct=int(num_correct.sum()),
        incorrect=_count(samples, Verdict.INCORRECT),
        unscored=int(num_unscored.sum()),
        num_problems=len(groups),
        truncated_rate=float(np.mean([row.get("stop") == Stop.LENGTH for row in samples])),
        extracted_rate=float(np.mean([bool(row.get("extracted")) for row in samples])),
        mean_tokens=float(np.mean([row.get("num_tokens", 0) for row in samples])),
        pass_at={k: pass_interval(num_correct, sizes, k) for k in pass_at},
    )


def _count(rows: Iterable[Row], verdict: Verdict) -> int:
    return sum(row["verdict"] == verdict for row in rows)


def pass_interval(num_correct: np.ndarray, sizes: np.ndarray, k: int) -> Interval:
    """Unbiased pass@k over problems, with its interval.

    Equation: mean over problems of 1 - C(n-c, k) / C(n, k)
    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1
    """
    counts = zip(num_correct.astype(int).tolist(), sizes.astype(int).tolist(), strict=True)
    values = np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) for c, n in counts])
    return mean_interval(values, num_trials=float((sizes // k).sum()))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values (at least two)."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def mean_interval(values: np.ndarray, num_trials: float) -> Interval:
    """Mean of per-problem values in [0, 1] with a 95 % Wilson interval at the effective number of trials.

    The effective number is the one at which a proportion would have the standard error that the values show between
    problems (the design effect). It is never below the number of problems (samples of a problem wholly alike, which is
    also what is assumed where all values are 0 or all are 1), and never above ``num_trials`` (all samples independent).
    With one trial a problem this is the plain Wilson interval; with more, the error is itself estimated from the
    problems, so the quantile is Student's. Coverage is near 95 % except where the mean is near 0 or 1 AND a few of few
    problems carry it (mean 0.05 over 30 very unequal problems: about 0.88; the t interval has 0.84 there).

    Equation: |m - p| <= q * sqrt(p * (1 - p) / n_eff), solved for p; n_eff = m * (1 - m) / se^2
    """
    num_problems, mean = len(values), float(values.mean())
    most = max(float(num_problems), num_trials)
    if mean in (0.0, 1.0) or num_problems == 1:
        trials = float(num_problems)
    else:
        error = standard_error(values)
        trials = min(max(mean * (1 - mean) / error**2, num_problems), most) if error > 0 else most
    q = normal_quantile() if most == num_problems or num_problems == 1 else t_quantile(0.975, num_problems - 1)
    shrink = 1 + q * q / trials
    centre = (mean + q * q / (2 * trials)) / shrink
    half = q / shrink * math.sqrt(mean * (1 - mean) / trials + (q / (2 * trials)) ** 2)
    # rounding may leave the end at a mean of 0 or 1 a hair inside it
    return Interval(value=mean, low=max(0.0, min(mean, centre - half)), high=min(1.0, max(mean, centre + half)))


def normal_quantile() -> float:
    """The two-sided 95 % point of the normal distribution."""
    return 1.959963984540054


def t_cdf(t: float, df: float) -> float:
    """Student's distribution function with ``df`` degrees of freedom.

    Equation: tail = I_x(df / 2, 1 / 2) / 2 at x = df / (df + t^2)
    """
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))
    return tail if t < 0 else 1 - tail


@lru_cache(maxsize=256)
def t_quantile(probability: float, df: float) -> float:
    """The t at which ``t_cdf`` reaches a probability in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction (modified Lentz). ``y`` is 1 - x, which
    the caller knows to more digits than a subtraction leaves.

    Source: NIST DLMF 8.17.22
    """
    if x <= 0 or y <= 0:
        return float(y <= 0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side of the mean
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
