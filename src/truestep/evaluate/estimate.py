"""Scores with intervals: avg@k, unbiased pass@k and majority@k, clustered by problem.

Problems are the sampling unit. The samples of one problem are similar, so counting them as independent would
claim more than the data show. Every interval has a width greater than 0, even if all samples agree."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from truestep.errors import UserError
from truestep.evaluate.interval import NORMAL_QUANTILE, Interval, mean_interval, standard_error
from truestep.grade.equivalent import ballot
from truestep.records import RecordError, Stop, Verdict

# One sample: problem_id, sample_index, verdict, and, if known, stop, extracted, num_tokens.
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The score of a model, estimated from samples. n = correct + incorrect + unscored. ``score`` is the mean
    over problems of the share of correct samples. An unscored sample counts as incorrect;
    ``score_if_unscored_correct`` shows how much that could matter. ``stderr`` is None for one problem."""

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
    truncated_rate: float | None  # None, like the next three, if the records do not contain it
    extracted_rate: float | None
    unreadable_rate: float | None
    mean_tokens: float | None
    pass_at: Mapping[int, Interval]
    majority_at: Mapping[int, Interval] = field(default_factory=dict)  # empty if answers are not recorded
    strict_score: float | None = None  # the score by grade.policy's strict and lenient policies; None if the
    lenient_score: float | None = None  # records do not have it

    def __post_init__(self) -> None:
        if self.n != self.correct + self.incorrect + self.unscored:
            raise RecordError("samples were lost: n is not correct + incorrect + unscored")

    def to_json(self) -> dict[str, Any]:
        by_k = {"pass_at": self.pass_at, "majority_at": self.majority_at}
        return asdict(self) | {name: {str(k): asdict(v) for k, v in of.items()} for name, of in by_k.items()}


def by_problem(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group samples by problem. Raises UserError without samples, RecordError if a sample occurs twice."""
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["sample_index"] in groups[row["problem_id"]]:
            raise RecordError(f"sample {row['problem_id']}/{row['sample_index']} occurs twice")
        groups[row["problem_id"]][row["sample_index"]] = row
    if not groups:
        raise UserError("no samples to score; set limit >= 1, because at least one problem is needed")
    return {problem: list(samples.values()) for problem, samples in groups.items()}


def estimate(rows: Iterable[Row], pass_at: Sequence[int] = (1,)) -> Estimate:
    """Return the score of per-sample records with its interval, pass@k for each k in ``pass_at``, and all
    counts. Raises UserError if a problem has fewer than k samples."""
    groups = by_problem(rows)
    samples = [row for group in groups.values() for row in group]
    num_correct = np.array([_count(group, Verdict.CORRECT) for group in groups.values()], dtype=float)
    num_unscored = np.array([_count(group, Verdict.UNSCORED) for group in groups.values()], dtype=float)
    sizes = np.array([len(group) for group in groups.values()], dtype=float)
    for k in pass_at:
        if not 1 <= k <= sizes.min():
            raise UserError(f"pass_at = {k} needs samples_per_problem >= {k}, got {int(sizes.min())}")
    means = num_correct / sizes
    score = mean_interval(means, num_trials=sizes.sum())
    return Estimate(
        score=score.value, low=score.low, high=score.high,
        stderr=standard_error(means) if len(means) > 1 else None,
        score_if_unscored_correct=float(((num_correct + num_unscored) / sizes).mean()),
        n=len(samples), correct=int(num_correct.sum()), incorrect=_count(samples, Verdict.INCORRECT),
        unscored=int(num_unscored.sum()), num_problems=len(groups),
        truncated_rate=_mean(samples, "stop", lambda stop: stop == Stop.LENGTH),
        extracted_rate=_mean(samples, "extracted", bool), unreadable_rate=_mean(samples, "unreadable", bool),
        mean_tokens=_mean(samples, "num_tokens", float),
        pass_at={k: pass_interval(num_correct, sizes, k) for k in pass_at},
        majority_at=_majorities(groups, [k for k in pass_at if k > 1]),
        strict_score=_score_by(groups, "strict"), lenient_score=_score_by(groups, "lenient"),
    )  # fmt: skip


def _mean(rows: Sequence[Row], field: str, value: Callable[[Any], float]) -> float | None:
    """Return the mean over samples of a field's value; None if a sample does not have the field."""
    found = [row.get(field) for row in rows]
    return None if None in found else float(np.mean([value(f) for f in found]))


def _score_by(groups: Mapping[str, Sequence[Row]], policy: str) -> float | None:
    if not all(policy in row for group in groups.values() for row in group):
        return None
    return float(np.mean([_count(group, Verdict.CORRECT, policy) / len(group) for group in groups.values()]))


def _count(rows: Iterable[Row], verdict: Verdict, policy: str = "verdict") -> int:
    return sum(row[policy] == verdict for row in rows)


def pass_interval(num_correct: np.ndarray, sizes: np.ndarray, k: int) -> Interval:
    """Return unbiased pass@k with its interval. Source: Chen et al. 2021 (arXiv:2107.03374), eq. 1
    Equation: mean over problems of 1 - C(n-c, k) / C(n, k)"""
    counts = zip(num_correct.astype(int).tolist(), sizes.astype(int).tolist(), strict=True)
    values = np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) for c, n in counts])
    return mean_interval(values, num_trials=float((sizes // k).sum()))


def _majorities(groups: Mapping[str, Sequence[Row]], ks: Sequence[int]) -> dict[int, Interval]:
    """Return majority@k for each k, or nothing unless the extracted answer of every sample is recorded."""
    if not all(isinstance(row.get("extracted"), str) for group in groups.values() for row in group):
        return {}
    votes = [_votes(group) for group in groups.values()]
    values = {k: np.array([majority(*each, k) for each in votes]) for k in ks}
    return {k: mean_interval(v, float(sum(len(g) // k for g in groups.values()))) for k, v in values.items()}


def _votes(rows: Sequence[Row]) -> tuple[int, list[int], int]:
    """Return how many samples have a correct answer, each wrong answer (in any spelling), and no answer."""
    right = _count(rows, Verdict.CORRECT)
    others = [row["extracted"] for row in rows if row["verdict"] != Verdict.CORRECT]
    wrong = Counter(ballot(answer) for answer in others if answer)
    return right, sorted(wrong.values(), reverse=True), others.count("")


def majority(right: int, wrong: Sequence[int], silent: int, k: int) -> float:
    """Return the probability that the most frequent answer of k samples, drawn without replacement, is
    correct. Ties are broken by a fair draw, and samples without an answer do not vote. The result is
    exact. ``ways[v, t]`` counts the ways to draw v samples with wrong answers so that no wrong answer has
    more than j votes and t wrong answers have exactly j."""
    total = 0.0
    for j in range(1, min(right, k) + 1):
        ways = {(0, 0): 1}
        for size in wrong:
            grown: dict[tuple[int, int], int] = {}
            for (used, ties), count in ways.items():
                for drawn in range(min(size, j, k - j - used) + 1):
                    key = (used + drawn, ties + (drawn == j))
                    grown[key] = grown.get(key, 0) + count * math.comb(size, drawn)
            ways = grown
        for (used, ties), count in ways.items():
            total += math.comb(right, j) * count * math.comb(silent, k - j - used) / (1 + ties)
    return total / math.comb(right + sum(wrong) + silent, k)


def reward_names(rows: Iterable[Row]) -> list[str]:
    """Return the names of all scorers and their parts, also of a scorer that scored no sample."""
    return sorted({name for row in rows for key in ("rewards", "unrewarded") for name in row.get(key) or {}})


def mean_rewards(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return the mean of every reward over problems (None if no sample has it), with its standard error (None for one
    problem) and 95 % interval, the number of samples with it, and of those without it, which are in no mean, with the
    first one's problem and reason. Rewards may have any size, so the interval is the mean ± 1.96 standard errors. Means
    that are all the same say nothing about their spread, so they have no interval."""
    groups = by_problem(rows)
    samples = [row for group in groups.values() for row in group]
    found: dict[str, dict[str, Any]] = {}
    for name in reward_names(samples):
        every = [[(row.get("rewards") or {}).get(name) for row in group] for group in groups.values()]
        known = [[value for value in group if value is not None] for group in every]
        means = np.array([np.mean(group) for group in known if group])
        error = standard_error(means) if len(means) > 1 else None
        width = None if not error else NORMAL_QUANTILE * error
        mean = float(means.mean()) if len(means) else None
        scored = sum(map(len, known))
        found[name] = {
            "value": mean, "stderr": error, "low": None if width is None or mean is None else mean - width,
            "high": None if width is None or mean is None else mean + width, "num_problems": len(means),
            "scored": scored, "missing": len(samples) - scored,
        }  # fmt: skip
        lost = [row for row in samples if name in (row.get("unrewarded") or {})]
        if lost and (reason := lost[0]["unrewarded"][name]):
            found[name]["first_missing"] = f"{lost[0]['problem_id']}: {reason}"
    return found
