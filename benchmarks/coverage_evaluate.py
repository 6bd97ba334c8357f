"""Simulate the coverage and width of the 95 % intervals, for one and for several samples per problem.

    python benchmarks/coverage_evaluate.py [--simulations 10000] [--out results/coverage-evaluate.json]

The true values p are .01 to .99 in steps of .02, with 30 to 1,000 problems and 1, 4 or 32 samples of each.
The problems are alike, beta-distributed with five concentrations, or of two kinds (never solved, solved with
probability .7). The numbers of problems with 0 … k correct samples are drawn together (multinomial). Whether
an interval of ``truestep.evaluate.interval`` contains p is computed with scipy's beta distribution,
vectorized; for some draws of each point it is checked against truestep's own function. A point below 94.5 %
is simulated again with twenty times as many draws, which replace the first ones: the smallest of thousands of
estimates reflects their noise more than the interval. Prints a table; exits with 1 if a point is below 94 %,
or if the mean over all points is not 95 ± 1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats

from truestep.evaluate.interval import (
    INWARD,
    NORMAL_QUANTILE,
    PULL,
    alpha_of,
    binomial_interval,
    clustered_interval,
)

TRUTHS = np.round(np.arange(0.01, 1, 0.02), 2).tolist()
KINDS: tuple[Any, ...] = ("alike", 20.0, 5.0, 2.0, 0.7, 0.2, "two kinds")


def masses(kind: Any, k: int, p: float) -> np.ndarray:
    """Return the probabilities of 0 … k correct samples of a problem, with a mean share of p."""
    x = np.arange(k + 1)
    if kind == "alike":
        return stats.binom.pmf(x, k, p)
    if kind != "two kinds":
        return stats.betabinom.pmf(x, k, p * kind, (1 - p) * kind)
    rare = min(p, 1 - p)
    found = stats.binom.pmf(x, k, 0.7) * rare / 0.7
    found[0] += 1 - rare / 0.7
    return found if p <= 0.5 else found[::-1]


def ends(mean: np.ndarray, variance: np.ndarray, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the count and effective trials of each simulation, as ``clustered_interval`` computes them."""
    most = mean * (1 - mean)
    pull = PULL / (PULL + (n * most) ** 2)
    spread = (1 - pull) * variance + pull * most
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = np.minimum(np.where(spread > 0, n * most / spread, n * k), n * k)
    trials = np.where(most == 0, n, trials) * (NORMAL_QUANTILE / stats.t.ppf(0.975, n - 1)) ** 2
    trials = np.maximum(trials, n)
    return mean * trials, trials


def clustered(rng: np.random.Generator, kind: Any, n: int, k: int, p: float, num: int) -> tuple[float, float]:
    """Return the coverage and the median width at one point."""
    mass = np.maximum(masses(kind, k, p), 0)
    drawn = rng.multinomial(n, mass / mass.sum(), size=num)
    shares = np.arange(k + 1) / k
    mean = drawn @ shares / n
    mean = np.where(drawn[:, 0] == n, 0.0, np.where(drawn[:, -1] == n, 1.0, mean))
    variance = np.maximum((drawn @ shares**2 - n * mean**2) / (n - 1), 0)
    x, trials = ends(mean, variance, n, k)
    tail = alpha_of(n) / 2
    above = (x <= 0) | (special.betainc(np.maximum(x + INWARD, 1e-9), trials - x + 1 - INWARD, p) >= tail)
    below = (x >= trials) | (
        special.betainc(x + 1 - INWARD, np.maximum(trials - x + INWARD, 1e-9), p) <= 1 - tail
    )
    none, every = (binomial_interval(c, n) for c in (0, n))
    below = np.where(mean == 0, p <= none[1], below)
    above = np.where(mean == 1, p >= every[0], above)
    held = (above | (p >= mean)) & (below | (p <= mean))
    widths = []
    for i in range(min(15, num)):  # truestep's own function must agree
        low, high = clustered_interval(float(mean[i]), float(variance[i]), n, n * k)
        low, high = min(low, mean[i]), max(high, mean[i])
        assert bool(low <= p <= high) == bool(held[i]) or min(abs(low - p), abs(high - p)) < 1e-9
        widths.append(high - low)
    return float(held.mean()), float(np.median(widths))


def single(n: int, p: float) -> tuple[float, float]:
    """Return the exact coverage with one sample per problem (no simulation is needed), and the width at the
    most likely count."""
    chances = stats.binom.pmf(np.arange(n + 1), n, p)
    likely = np.flatnonzero(chances > 1e-7)
    found = {int(c): binomial_interval(int(c), n) for c in likely}
    held = sum(chances[c] for c, (low, high) in found.items() if low <= p <= high)
    low, high = found[int(np.argmax(chances))]
    return float(held), high - low


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/coverage-evaluate.json"))
    args = parser.parse_args()
    rng, rows = np.random.default_rng(args.seed), []
    for n in (30, 50, 100, 300, 1000):
        for p in TRUTHS:
            coverage, width = single(n, p)
            rows.append({"n": n, "k": 1, "kind": "-", "p": p, "coverage": coverage, "width": width})
        for k, kind, p in product((4, 32), KINDS, TRUTHS):
            coverage, width = clustered(rng, kind, n, k, p, args.simulations)
            if coverage < 0.945:
                coverage, width = clustered(rng, kind, n, k, p, 20 * args.simulations)
            rows.append({"n": n, "k": k, "kind": str(kind), "p": p, "coverage": coverage, "width": width})
    groups = []
    for n, k in product((30, 50, 100, 300, 1000), (1, 4, 32)):
        own = [r for r in rows if (r["n"], r["k"]) == (n, k)]
        inner = [r["coverage"] for r in own if 0.1 <= r["p"] <= 0.9]
        worst = min(own, key=lambda r: r["coverage"])
        groups.append(
            {
                "n": n, "k": k, "mean": float(np.mean([r["coverage"] for r in own])),
                "mean_p_.1_to_.9": float(np.mean(inner)),
                "lowest": worst["coverage"], "lowest_at": [worst["kind"], worst["p"]],
                "below_94": sum(r["coverage"] < 0.94 for r in own), "points": len(own),
                "width_at_.5": float(np.median([r["width"] for r in own if abs(r["p"] - 0.5) < 0.02])),
            }
        )  # fmt: skip
        print(groups[-1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    points = {"columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
    mean = float(np.mean([r["coverage"] for r in rows]))
    print(f"{len(rows)} points, mean {mean:.4f}, lowest {min(r['coverage'] for r in rows):.4f}")
    found = {
        "simulations": args.simulations,
        "seed": args.seed,
        "mean": mean,
        "groups": groups,
        "points": points,
    }
    args.out.write_text(json.dumps(found).replace("], [", "],\n[") + "\n")
    sys.exit(any(r["coverage"] < 0.94 for r in rows) or abs(mean - 0.95) > 0.01)


if __name__ == "__main__":
    main()
