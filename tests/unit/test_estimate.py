"""Scores, intervals and paired comparisons against exact enumeration, simulation and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from truestep.errors import UserError
from truestep.evaluate.compare import compare, paired_t, sign_flip_p
from truestep.evaluate.estimate import Estimate, estimate, majority, pass_interval
from truestep.evaluate.interval import beta_quantile, mean_interval, t_cdf, t_quantile
from truestep.records import RecordError

stats = pytest.importorskip("scipy.stats")

VERDICTS = {"c": "correct", "i": "incorrect", "u": "unscored"}


def rows_of(*problems: str, **more: object) -> list[dict]:
    """One word a problem, one letter a sample: c(orrect), i(ncorrect), u(nscored)."""
    return [
        {"problem_id": f"p{n}", "sample_index": i, "verdict": VERDICTS[letter], **more}
        for n, word in enumerate(problems)
        for i, letter in enumerate(word)
    ]


# ------------------------------------------------------------------------------------------------- accounting


def test_every_sample_is_accounted_for_and_an_unscored_one_is_not_correct() -> None:
    found = estimate(rows_of("cciu", "iiii", "cccc"))
    assert (found.n, found.correct, found.incorrect, found.unscored, found.num_problems) == (12, 6, 5, 1, 3)
    assert found.score == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert found.score_if_unscored_correct == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert found.to_json()["pass_at"].keys() == {"1"}


def test_problems_weigh_the_same_whatever_their_number_of_samples() -> None:
    assert estimate(rows_of("c" * 90, "i")).score == pytest.approx(0.5)


def test_rates_and_mean_length_are_over_all_samples() -> None:
    rows = rows_of("c", stop="length", extracted="7", num_tokens=10)
    rows += [{**rows_of("i", stop="stop", extracted="", num_tokens=0)[0], "problem_id": "q"}]
    found = estimate(rows)
    assert (found.truncated_rate, found.extracted_rate, found.mean_tokens) == (0.5, 0.5, 5.0)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        estimate([])
    with pytest.raises(UserError, match="pass_at = 3 needs samples_per_problem >= 3, got 2"):
        estimate(rows_of("ccc", "cc"), pass_at=(1, 3))
    with pytest.raises(RecordError, match="twice"):
        estimate(rows_of("c") + rows_of("c"))
    with pytest.raises(RecordError, match="lost"):
        Estimate(**{**vars(estimate(rows_of("ci"))), "incorrect": 0})


# ----------------------------------------------------------------------------------------------------- values


def test_student_distribution_agrees_with_scipy() -> None:
    for df in (1, 2, 5, 29, 499, 10_000):
        for t in (-40.0, -3.0, -0.5, 0.0, 1e-4, 1.0, 2.5, 8.0):
            assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9, abs=1e-14)
        for probability in (0.5, 0.8, 0.975, 0.999):
            assert t_quantile(probability, df) == pytest.approx(
                stats.t.ppf(probability, df), rel=1e-9, abs=1e-9
            )


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample() -> None:
    samples = [1, 0, 0, 1, 0, 0]
    for k in range(1, 7):
        draws = list(itertools.combinations(samples, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_interval(np.array([2.0]), np.array([6.0]), k).value == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    """Averaged over all outcomes of n independent samples it is 1 - (1 - p)^k."""
    n, k, p = 7, 3, 0.3
    mean = sum(
        math.comb(n, c)
        * p**c
        * (1 - p) ** (n - c)
        * pass_interval(np.array([float(c)]), np.array([float(n)]), k).value
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_pass_at_1_is_the_score_with_the_same_interval() -> None:
    found = estimate(rows_of("ciic", "iiii", "ccci", "icii"), pass_at=(1, 2, 4))
    assert found.pass_at[1].value == pytest.approx(found.score)
    assert (found.pass_at[1].low, found.pass_at[1].high) == pytest.approx((found.low, found.high))
    assert found.pass_at[1].value < found.pass_at[2].value < found.pass_at[4].value == 0.75


# -------------------------------------------------------------------------------------------------- intervals


def blaker(correct: int, n: int, alpha: float) -> tuple[float, float]:
    """By its definition, with scipy's binomial distribution on a fine grid."""
    points = np.linspace(0, 1, 4001)
    counts = np.arange(n + 1)[:, None]
    tails = np.minimum(stats.binom.cdf(counts, n, points), stats.binom.sf(counts - 1, n, points))
    accepted = (
        np.where(tails <= tails[correct] * (1 + 1e-9), stats.binom.pmf(counts, n, points), 0).sum(axis=0)
        > alpha
    )
    return points[accepted][0], points[accepted][-1]


def test_one_sample_a_problem_gives_blakers_interval() -> None:
    for correct, n in ((0, 30), (1, 30), (15, 30), (30, 30), (61, 200), (1, 1)):
        found = estimate(rows_of(*"c" * correct, *"i" * (n - correct)))
        expected = blaker(correct, n, 0.05 + min(0.01, 0.3 / n))
        assert (found.low, found.high) == pytest.approx(expected, abs=5e-4)
        assert found.low <= expected[0] + 1e-9
        assert found.high >= expected[1] - 1e-9


def test_many_trials_give_clopper_and_pearsons_interval() -> None:
    found = mean_interval(np.arange(5000) < 7, num_trials=5000)
    expected = stats.binomtest(7, 5000).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-8)


def test_beta_quantile_agrees_with_scipy() -> None:
    for a, b in ((0.7, 30.2), (12.0, 4.5), (900.0, 200.3)):
        for probability in (0.025, 0.5, 0.975):
            assert beta_quantile(probability, a, b) == pytest.approx(
                stats.beta.ppf(probability, a, b), rel=1e-8
            )


def test_many_problems_away_from_the_edges_give_the_t_interval_of_the_problem_means() -> None:
    values = np.random.default_rng(3).binomial(8, np.random.default_rng(4).beta(2, 2, 2000)) / 8
    found = mean_interval(values, num_trials=16_000)
    expected = stats.t.interval(0.95, 1999, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    "problems", [("c",), ("i", "i"), ("cccc",), ("iiii", "iiii"), ("ci", "ic"), ("ci",) * 40]
)
def test_no_interval_has_width_zero_and_each_holds_its_value(problems: tuple[str, ...]) -> None:
    found = estimate(rows_of(*problems), pass_at=range(1, len(problems[0]) + 1))
    for value, low, high in [
        (found.score, found.low, found.high),
        *(vars(i).values() for i in found.pass_at.values()),
    ]:
        assert 0 <= low <= value <= high <= 1
        assert high - low > 0.05


def test_samples_of_one_problem_do_not_count_as_problems() -> None:
    """64 copies of the same verdict are one observation of a problem, not 64."""
    alone, copied = estimate(rows_of(*"ccciiiii")), estimate(rows_of(*("c" * 64,) * 3, *("i" * 64,) * 5))
    assert copied.high - copied.low >= alone.high - alone.low
    assert estimate(rows_of(*("c" * 64,) * 8)).low <= estimate(rows_of(*"cccccccc")).low
    independent = estimate(rows_of(*("ccciiiii" * 8,) * 8))
    assert independent.high - independent.low < 0.6 * (alone.high - alone.low)


def test_coverage_of_single_samples_is_nominal() -> None:
    """Exact: summed over all outcomes of the binomial distribution."""
    coverage = []
    for n, p in itertools.product((30, 500), (0.05, 0.5, 0.95)):
        found = [mean_interval(np.arange(n) < c, n) for c in range(n + 1)]
        hit = [i.low <= p <= i.high for i in found]
        coverage.append(float(stats.binom.pmf(np.arange(n + 1), n, p) @ hit))
    print("single-sample coverage", np.round(coverage, 4))
    assert min(coverage) > 0.94
    assert np.mean(coverage) < 0.965


def test_coverage_of_several_samples_is_nominal_where_naive_pooling_fails() -> None:
    """400 simulations each (benchmarks/coverage_evaluate.py: many more); problems differ and have 4
    samples."""
    coverage, pooled, rng, k = [], [], np.random.default_rng(7), 4
    for n, p in itertools.product((30, 500), (0.05, 0.5, 0.95)):
        values = rng.binomial(k, rng.beta(5 * p, 5 * (1 - p), (400, n))) / k
        found = [mean_interval(row, n * k) for row in values]
        coverage.append(np.mean([i.low <= p <= i.high for i in found]))
        mean = values.mean(axis=1)
        pooled.append(np.mean(np.abs(mean - p) <= 1.96 * np.sqrt(mean * (1 - mean) / (n * k))))
    print("clustered coverage", np.round(coverage, 4), "pooled", np.round(pooled, 4))
    assert min(coverage) > 0.925
    assert abs(np.mean(coverage) - 0.95) < 0.015
    assert np.mean(pooled) < 0.92


def test_majority_at_k_is_the_share_of_draws_in_which_the_right_answer_wins() -> None:
    answers = ["7", "7", "7", "3", "3", "5", ""]
    for k in range(1, 8):
        wins = []
        for draw in itertools.combinations(answers, k):
            votes = {a: draw.count(a) for a in draw if a}
            best = [a for a, n in votes.items() if n == max(votes.values())]
            wins.append(("7" in best) / len(best) if best else 0)
        assert majority(3, [2, 1], 1, k) == pytest.approx(np.mean(wins), abs=1e-12)


def test_majority_at_one_is_the_score_and_grows_where_the_right_answer_leads() -> None:
    rows = rows_of("ccii", "iiic")
    for row, answer in zip(rows, ["2", "2", "3", "4", "9", "8", "7", "5"], strict=True):
        row["extracted"] = answer
    found = estimate(rows, pass_at=(1, 2, 3, 4)).majority_at
    assert set(found) == {2, 3, 4}
    assert found[4].value == pytest.approx((1 + 1 / 4) / 2)
    assert estimate(rows_of("ccii"), pass_at=(1, 2)).majority_at == {}


def test_one_wrong_answer_in_several_spellings_is_one_vote_each() -> None:
    rows = rows_of("cciii")
    for row, answer in zip(rows, ["1/2", "0.5", "7", "7.0", "$7"], strict=True):
        row["extracted"] = answer
    assert estimate(rows, pass_at=(1, 5)).majority_at[5].value == 0
    for row, answer in zip(rows, ["1/2", "0.5", "7", "8.0", "$9"], strict=True):
        row["extracted"] = answer
    assert estimate(rows, pass_at=(1, 5)).majority_at[5].value == 1


def test_several_samples_are_never_less_than_one_of_each_problem() -> None:
    """That all samples agree says as much of few problems as one sample of each would."""
    for num_problems in (2, 4, 30):
        one, many = (mean_interval(np.zeros(num_problems), num_trials=num_problems * k) for k in (1, 32))
        assert many == one


# ------------------------------------------------------------------------------------------------- comparison


def test_paired_difference_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    words = [["".join(rng.choice(["c", "i"], 4, p=[p, 1 - p])) for _ in range(40)] for p in (0.4, 0.6)]
    found = compare(rows_of(*words[0]), rows_of(*words[1]))
    a, b = ([word.count("c") / 4 for word in side] for side in words)
    expected = stats.ttest_rel(b, a)
    assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=1e-12)
    assert found.num_better == sum(y > x for x, y in zip(a, b, strict=True))


def test_swapping_the_sides_changes_the_sign_only() -> None:
    a, b = rows_of("cci", "iii", "cic", "iic"), rows_of("ccc", "iic", "iic", "ccc")
    forward, backward = compare(a, b), compare(b, a)
    assert (forward.difference, forward.low) == pytest.approx((-backward.difference, -backward.high))
    assert forward.p_value == pytest.approx(backward.p_value)
    assert (forward.num_better, forward.num_worse) == (backward.num_worse, backward.num_better)


def test_exact_p_is_mcnemars_for_single_samples_and_counts_all_sign_flips() -> None:
    for better, worse in ((9, 2), (5, 5), (1, 0)):
        found = compare(
            rows_of(*"i" * better, *"c" * worse, *"c" * 7), rows_of(*"c" * better, *"i" * worse, *"c" * 7)
        )
        assert found.p_exact == pytest.approx(stats.binomtest(better, better + worse).pvalue)
    whole = [3, -1, 2, 2, -4, 1]
    sums = [
        abs(sum(s * w for s, w in zip(signs, whole, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert sign_flip_p(whole) == pytest.approx(np.mean([s >= abs(sum(whole)) for s in sums]))


@pytest.mark.parametrize(("a", "b"), [("c" * 20, "c" * 20), ("i" * 20, "c" * 20), ("c", "i")])
def test_equal_differences_leave_an_interval_with_a_width(a: str, b: str) -> None:
    found = compare(rows_of(*a), rows_of(*b))
    assert found.low <= found.difference <= found.high
    assert found.high - found.low > 0.05
    assert found.p_value == found.p_exact == (1.0 if a == b else 0.5 ** (len(a) - 1))


def test_detectable_difference_is_found_in_four_of_five_studies() -> None:
    """Its definition, simulated: shift differences by it and count rejections."""
    rng, n = np.random.default_rng(11), 60
    values = rng.binomial(8, 0.5, (2, n))
    words = [["c" * c + "i" * (8 - c) for c in side] for side in values]
    found = compare(rows_of(*words[0]), rows_of(*words[1]))
    spread = np.std((values[1] - values[0]) / 8, ddof=1)
    studies = rng.normal(found.detectable, spread, (4000, n))
    power = np.mean(stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05)
    assert power == pytest.approx(0.8, abs=0.03)


def test_comparison_coverage_is_nominal() -> None:
    rng, coverage = np.random.default_rng(13), []
    for n, better, worse in ((30, 0.3, 0.1), (30, 0.1, 0.1), (500, 0.02, 0.02)):
        draws = rng.choice([1.0, -1.0, 0.0], p=[better, worse, 1 - better - worse], size=(2000, n))
        found = [paired_t(draw, unit=1.0) for draw in draws]
        coverage.append(np.mean([low <= better - worse <= high for _, low, high, *_ in found]))
    print("paired coverage", np.round(coverage, 4))
    assert min(coverage) > 0.93
    assert abs(np.mean(coverage) - 0.95) < 0.015


def test_different_problems_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"problem p1 is in the second evaluation but not in the first \(2 such"
    ):
        compare(rows_of("c"), rows_of("c", "c", "i"))
