"""Simulate how often the 95 % intervals of a study contain the truth, compared with simpler intervals.

    python benchmarks/coverage_study.py [--simulations 4000] [--seed 0] [--out results/coverage/study.json]

Each setting draws whole studies. Training seeds and problems are drawn again for each study, because they are
the population that an interval describes; scores are counts of correct samples from a logistic model, or
normal. The true value is known: either the simulation sets it, or it is computed by quadrature. Exits with 1
if the coverage of a setting is below 93.5 % or the mean coverage is not within 95 ± 1.5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from truestep.evaluate.interval import t_quantile
from truestep.rundir import provenance, write_json
from truestep.seeding import Purpose, generator
from truestep.study.analyse import Parts, parts, variance_and_df

BATCH = 250  # studies drawn at once


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One simulated population. Spreads are standard deviations of logits (``kind`` "score", "difference"), or
    of scores ("normal")."""

    name: str
    kind: str
    seeds: int
    problems: tuple[int, ...] = (200,)
    samples: int = 1
    mean: tuple[float, float] = (0.0, 0.5)  # of the two arms' logits; a normal difference uses only the first
    shared: float = 1.5  # between problems, the same for both arms
    by_problem: float = 0.0  # between problems, separately for each arm
    by_seed: float = 0.0
    both: float = 0.3  # seed × problem


def declared() -> list[Setting]:
    found = []
    for seeds in (5, 8):
        regimes: tuple[tuple[str, dict[str, float]], ...] = (
            ("seed-dominated", {"by_seed": 0.5, "by_problem": 0.3}),
            ("problem-dominated", {"by_seed": 0.02, "by_problem": 1.5}),
            ("both alike", {"by_seed": 0.2, "by_problem": 1.0}),
            ("samples alone", {"by_seed": 0.0, "by_problem": 0.0, "both": 0.0}),
        )
        for regime, spreads in regimes:
            name = f"{regime}, {seeds} seeds"
            found.append(Setting(name=f"{name}, difference", kind="difference", seeds=seeds, **spreads))
            found.append(
                Setting(name=f"{name}, normal", kind="normal", seeds=seeds, mean=(0.3, 0.0), **spreads)
            )
        found.append(
            Setting(name=f"both alike, {seeds} seeds, score", kind="score", seeds=seeds, by_seed=0.25)
        )
        found.append(Setting(name=f"both alike, {seeds} seeds, 4 samples, 40 problems", kind="difference", seeds=seeds,
                             samples=4, problems=(40,), by_seed=0.2, by_problem=0.6))  # fmt: skip
        found.append(Setting(name=f"both alike, {seeds} seeds, three benchmarks", kind="difference", seeds=seeds,
                             problems=(30, 60, 200), by_seed=0.15, by_problem=0.8))  # fmt: skip
        found.append(Setting(name=f"weak (5 % correct), {seeds} seeds, difference", kind="difference", seeds=seeds,
                             mean=(-4.0, -3.6), by_seed=0.4, by_problem=0.6))  # fmt: skip
    return found


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def expected(mean: float, s: Setting) -> float:
    """Return the score of the population: the mean of the logistic function of a normal variable, by
    quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = np.sqrt(s.shared**2 + s.by_problem**2 + s.by_seed**2 + s.both**2)
    return float((weights * logistic(mean + spread * nodes)).sum() / weights.sum())


def truth(s: Setting) -> float:
    if s.kind == "normal":
        return s.mean[0]
    return expected(s.mean[1], s) - (expected(s.mean[0], s) if s.kind == "difference" else 0.0)


def draw(s: Setting, num: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw ``num`` studies, as one array [num, S, P] per benchmark."""
    arms = {arm: rng.normal(size=(num, s.seeds, 1)) * s.by_seed for arm in (0, 1)}
    tables = []
    for size in s.problems:
        problem = rng.normal(size=(num, 1, size)) * s.shared
        scores = []
        for arm in (0, 1):
            own = (
                rng.normal(size=(num, 1, size)) * s.by_problem
                + rng.normal(size=(num, s.seeds, size)) * s.both
            )
            if s.kind == "normal":
                scores.append((s.mean[0] if arm else 0.0) + (arms[arm] + own if arm else 0.0) + 0 * problem)
            else:
                chance = logistic(s.mean[arm] + problem + arms[arm] + own)
                scores.append(rng.binomial(s.samples, chance) / s.samples)
        tables.append(scores[1] if s.kind == "score" else scores[1] - scores[0])
    if s.kind == "normal":
        tables = [t + rng.normal(size=t.shape) * 0.5 for t in tables]
    return tables


Rule = Callable[[Parts], tuple[np.ndarray, np.ndarray]]
RULES: dict[str, Rule] = {
    "crossed": variance_and_df,
    "seeds alone": lambda p: (p.seeds, np.full(p.seeds.shape, p.df_seeds)),
    "problems alone": lambda p: (p.problems, np.full(p.seeds.shape, p.df_problems)),
}
GRID = np.geomspace(1, 4000, 400)
QUANTILES = np.array([t_quantile(0.975, d) for d in GRID])  # between its points the error is below 1e-4


def cover(s: Setting, num: int, seed: int) -> dict[str, dict[str, float]]:
    """Return for each rule the share of intervals that contain the truth, and their mean half width."""
    rng = generator(seed, Purpose.BOOTSTRAP, 0, s.name)
    hits, widths, target = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, 0.0), truth(s)
    for start in range(0, num, BATCH):
        found = parts(draw(s, min(BATCH, num - start), rng))
        for name, rule in RULES.items():
            variance, df = rule(found)
            error = np.sqrt(np.maximum(variance, 1e-30))
            half = np.interp(df, GRID, QUANTILES) * error
            hits[name] += int((np.abs(found.mean - target) <= half).sum())
            widths[name] += float(half.sum())
    return {r: {"coverage": hits[r] / num, "half_width": widths[r] / num} for r in RULES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/coverage/study.json"))
    given = parser.parse_args()
    rows = []
    for setting in declared():
        rows.append(
            {**asdict(setting), "truth": truth(setting), **cover(setting, given.simulations, given.seed)}
        )
        shown = "  ".join(
            f"{r} {rows[-1][r]['coverage']:.4f} ±{rows[-1][r]['half_width']:.4f}" for r in RULES
        )
        print(f"{setting.name}: {shown}", flush=True)
    coverage = [row["crossed"]["coverage"] for row in rows]
    summary = {"simulations": given.simulations, "lowest": min(coverage), "mean": float(np.mean(coverage))}
    write_json(given.out, {**summary, "settings": rows, "provenance": provenance(given.seed)})
    print(json.dumps(summary))
    sys.exit(0 if summary["lowest"] >= 0.935 and abs(summary["mean"] - 0.95) <= 0.015 else 1)


if __name__ == "__main__":
    main()
