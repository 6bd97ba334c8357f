"""Paired comparison of two evaluations on the same problems."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from truestep.errors import UserError
from truestep.evaluate.estimate import Row, by_problem
from truestep.evaluate.interval import standard_error, t_cdf, t_quantile
from truestep.records import Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of ``b`` with ``a`` on the same problems. ``difference`` is the share of correct samples
    of b minus that of a, averaged over problems, with its 95 % interval. ``p_value`` is from the paired t
    test, and ``p_exact`` from the sign-flip permutation test (McNemar's test if there is one sample per
    problem). ``detectable`` is the smallest true difference that such problems would detect with 80 % power
    at the 5 % level. For a single problem, ``detectable`` is None and the interval is [-1, 1]."""

    difference: float
    low: float
    high: float
    p_value: float
    p_exact: float
    detectable: float | None
    num_problems: int
    num_better: int
    num_worse: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: Iterable[Row], b: Iterable[Row]) -> Comparison:
    """Return the comparison of b with a, from per-sample records. Raises UserError if the problems differ."""
    counts_a, counts_b = _correct_of(a), _correct_of(b)
    if unpaired := sorted(counts_a.keys() ^ counts_b.keys()):
        have, lack = ("first", "second") if unpaired[0] in counts_a else ("second", "first")
        where = f"is in the {have} evaluation but not in the {lack} ({len(unpaired)} such problems)"
        raise UserError(f"problem {unpaired[0]} {where}; evaluate both on the same problems")
    scale = math.lcm(*(n for counts in (counts_a, counts_b) for _, n in counts.values()))
    pairs = [(counts_a[p], counts_b[p]) for p in counts_a]
    # Differences in units of 1 / scale are whole numbers, so that the exact test is exact.
    whole = [b * (scale // num_b) - a * (scale // num_a) for (a, num_a), (b, num_b) in pairs]
    difference, low, high, p_value, detectable = paired_t(np.array(whole) / scale, 1 / scale)
    p_exact = sign_flip_p([w // math.gcd(*whole) for w in whole] if any(whole) else [])
    return Comparison(
        difference=difference, low=low, high=high, p_value=p_exact if p_value is None else p_value,
        p_exact=p_exact, detectable=detectable, num_problems=len(whole),
        num_better=sum(w > 0 for w in whole), num_worse=sum(w < 0 for w in whole),
    )  # fmt: skip


def compare_values(a: Iterable[Row], b: Iterable[Row], name: str) -> dict[str, Any]:
    """Return the fields of a Comparison of b with a by the mean of a scorer, over the problems that have it on both
    sides. Values may have any size, so there is no exact test. One problem, or differences that are all the same, say
    nothing about the spread, so there is no interval. Raises UserError if no problem has it on both sides."""
    means_a, means_b = (_means_of(rows, name) for rows in (a, b))
    values = np.array([means_b[p] - means_a[p] for p in means_a if p in means_b])
    if not len(values):
        raise UserError(f"no problem has a value of {name} on both sides")
    found: dict[str, Any] = {
        "difference": float(values.mean()), "low": None, "high": None, "p_value": None, "p_exact": None,
        "detectable": None, "num_problems": len(values), "num_better": int((values > 0).sum()),
        "num_worse": int((values < 0).sum()),
    }  # fmt: skip
    if len(values) > 1 and np.ptp(values) > 0:
        mean, error, df = found["difference"], standard_error(values), len(values) - 1
        low, high, detectable = _around(mean, error, df)
        p_value = 2 * t_cdf(-abs(mean) / error, df)
        found |= {"low": low, "high": high, "p_value": p_value, "detectable": detectable}
    return found


def _means_of(rows: Iterable[Row], name: str) -> dict[str, float]:
    groups = {p: [(r.get("rewards") or {}).get(name) for r in g] for p, g in by_problem(rows).items()}
    known = {p: [value for value in group if value is not None] for p, group in groups.items()}
    return {p: float(np.mean(values)) for p, values in known.items() if values}


def _correct_of(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """Return the number of correct samples and the number of all samples of each problem."""
    return {p: (sum(r["verdict"] == Verdict.CORRECT for r in g), len(g)) for p, g in by_problem(rows).items()}


def paired_t(values: np.ndarray, unit: float) -> tuple[float, float, float, float | None, float | None]:
    """Return the mean, interval, p-value and detectable difference of paired differences. If all differences
    are the same, their spread is not informative, so pseudo-observations are added: half an observation of
    +unit, half of -unit, and one of 0. (With one sample per problem, this is the interval of Agresti and Min
    2005, doi:10.1002/sim.1781.) There is then no t statistic, and so no p-value."""
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return mean, -1.0, 1.0, None, None
    centre, error, degenerate = mean, standard_error(values), bool(np.ptp(values) == 0)
    if degenerate:
        centre = mean * n / (n + 2)
        second_moment = (n * mean**2 + unit**2) / (n + 2)
        error = math.sqrt((second_moment - centre**2) / (n + 2))
    low, high, detectable = _around(centre, error, n - 1)
    p_value = None if degenerate else 2 * t_cdf(-abs(mean) / error, n - 1)
    return mean, max(-1.0, min(low, mean)), min(1.0, max(high, mean)), p_value, detectable


def _around(centre: float, error: float, df: int) -> tuple[float, float, float]:
    """Return the ends of the 95 % interval, and the difference that is detected with 80 % power."""
    quantile = t_quantile(0.975, df)
    return centre - quantile * error, centre + quantile * error, (quantile + t_quantile(0.8, df)) * error


def sign_flip_p(whole: list[int]) -> float:
    """Return the exact two-sided p-value of a sum of whole numbers if a fair coin decides each sign. The
    distribution is built one number at a time. ``chance[i]`` is the probability of the sum i - reach."""
    reach = sum(abs(w) for w in whole)
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for size in (abs(w) for w in whole if w):
        chance = (
            np.roll(chance, size) + np.roll(chance, -size)
        ) / 2  # the values that wrap around the ends are 0
    observed = abs(sum(whole))
    return min(1.0, float(chance[np.abs(np.arange(-reach, reach + 1)) >= observed].sum()))
