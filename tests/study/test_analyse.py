"""The statistics against scipy and statsmodels, and against what they must say in cases that can be worked
out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from truestep.errors import UserError
from truestep.study.analyse import crossed, holm, parts, sample_sd, sign_flip, variance_and_df, verdict


def table(seed: int, seeds: int, problems: int, by_seed: float, by_problem: float, rest: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(seeds, 1)) * by_seed + rng.normal(size=(1, problems)) * by_problem
    return made + rng.normal(size=(seeds, problems)) * rest


def test_seeds_alone_are_the_t_interval_of_scipy() -> None:
    """Problems that are all alike leave the seeds, S - 1 degrees of freedom and nothing else."""
    by_seed = np.array([0.30, 0.35, 0.42, 0.31, 0.37])
    found = crossed([np.repeat(by_seed[:, None], 50, axis=1)])
    low, high = stats.t.interval(0.95, 4, loc=by_seed.mean(), scale=stats.sem(by_seed))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.df == pytest.approx(4)
    assert found.p_value == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue, rel=1e-9)
    assert found.sd_problems == pytest.approx(0, abs=1e-12)
    assert found.sd_seeds == pytest.approx(by_seed.std(ddof=1))


def test_problems_alone_are_the_paired_t_test_over_problems() -> None:
    by_problem = np.random.default_rng(0).normal(0.1, 0.4, 80)
    found = crossed([np.repeat(by_problem[None, :], 5, axis=0)])
    assert found.stderr == pytest.approx(stats.sem(by_problem))
    assert found.df == pytest.approx(0.7 * 79)
    loosest = stats.t.interval(0.95, 79, loc=by_problem.mean(), scale=stats.sem(by_problem))
    assert found.low < loosest[0] < loosest[1] < found.high
    assert found.high - found.low < 1.02 * (loosest[1] - loosest[0])


def test_variance_parts_are_those_of_a_crossed_analysis_of_variance() -> None:
    formula = pytest.importorskip("statsmodels.formula.api", reason="statsmodels is not installed")
    from statsmodels.stats.anova import anova_lm

    pandas = pytest.importorskip("pandas")
    y = table(1, 5, 12, 0.3, 0.5, 0.4)
    rows = [{"y": y[s, p], "s": str(s), "p": str(p)} for s in range(5) for p in range(12)]
    squares = anova_lm(formula.ols("y ~ C(s) + C(p)", pandas.DataFrame(rows)).fit())["mean_sq"]
    seeds, problems, rest = squares["C(s)"], squares["C(p)"], squares["Residual"]
    found = parts([y])
    assert float(found.seeds) == pytest.approx(seeds / 60)
    assert float(found.problems) == pytest.approx(problems / 60)
    assert float(found.residual) == pytest.approx(rest / 60)
    variance, df = variance_and_df(found)
    assert float(variance) == pytest.approx((seeds + problems - rest) / 60)
    satterthwaite = (seeds + problems - rest) ** 2 / (seeds**2 / 4 + problems**2 / 11 + rest**2 / 44)
    assert float(df) == pytest.approx(max(4.0, 0.7 * satterthwaite))


@pytest.mark.slow
def test_holm_is_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = rng.uniform(0, 0.2, 5)
        ours = holm({str(i): v for i, v in enumerate(p)})
        assert list(ours.values()) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}


def test_more_problems_do_not_help_where_seeds_disagree() -> None:
    few, many = (crossed([table(0, 5, n, 0.2, 0.0, 0.05)]) for n in (50, 5000))
    assert many.high - many.low > 0.8 * (few.high - few.low)
    assert 4 <= many.df < 4.5


def test_benchmarks_count_alike_and_a_seed_is_the_same_seed_everywhere() -> None:
    a, b = table(1, 6, 20, 0.0, 0.3, 0.1), table(2, 6, 400, 0.0, 0.3, 0.1) + 1
    shift = np.array([[0.3], [-0.3], [0.2], [-0.2], [0.1], [-0.1]])
    assert crossed([a, b], bounds=(-9, 9)).value == pytest.approx((a.mean() + b.mean()) / 2)
    together, opposed = crossed([a + shift, b + shift]), crossed([a + shift, b - shift])
    assert together.sd_seeds == pytest.approx(shift.std(ddof=1), abs=0.05)
    assert opposed.sd_seeds < 0.06
    assert together.num_problems == 420


def test_equal_tables_still_have_a_width() -> None:
    found = crossed([np.zeros((5, 100))])
    assert found.low < 0 < found.high
    assert found.p_value == 1.0
    assert found.detectable > 0
    assert crossed([np.ones((5, 100))], bounds=(0, 1)).high == 1.0


def test_one_seed_says_nothing_of_seeds() -> None:
    found = crossed([table(0, 1, 100, 0.0, 0.3, 0.0)])
    assert not found.seeds_known
    assert "one seed" in verdict(found, None)


def test_sign_flips_can_do_no_better_than_two_in_two_to_the_seeds() -> None:
    assert sign_flip(np.array([0.2, 0.3, 0.1, 0.2, 0.3])) == pytest.approx(2 / 2**5)
    assert sign_flip(np.array([0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2, 0.1])) == pytest.approx(2 / 2**8)
    assert sign_flip(np.array([0.2, -0.2])) == 1.0
    with pytest.raises(UserError, match="too expensive"):
        sign_flip(np.ones(30))


def test_a_null_result_names_what_could_have_been_seen() -> None:
    found = crossed([table(5, 5, 60, 0.1, 0.3, 0.2)])
    assert found.low < 0 < found.high
    assert f"{100 * found.detectable:.1f} points" in verdict(found, None)
    t = stats.t(found.df)
    assert found.detectable == pytest.approx((t.ppf(0.975) + t.ppf(0.8)) * found.stderr)
    clear = crossed([table(5, 5, 60, 0.01, 0.05, 0.1) + 0.5])
    assert verdict(clear, None) == "higher"
    assert verdict(clear, 0.2).startswith("no difference")


def test_decoding_samples_are_kept_apart() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(0, 1, (1, 400))
    correct = rng.binomial(8, np.repeat(chance, 6, 0)).astype(float)
    expected = math.sqrt(float((chance * (1 - chance)).mean()))
    assert sample_sd([correct], [8]) == pytest.approx(expected, rel=0.05)
    assert sample_sd([correct > 4], [1]) is None


def test_unequal_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="the same seeds"):
        crossed([np.zeros((5, 10)), np.zeros((4, 10))])
    with pytest.raises(UserError, match="at least one"):
        crossed([])


def test_two_seeds_are_never_trusted_more_than_by_themselves() -> None:
    draw = np.random.default_rng(3)
    for _ in range(20):
        table = draw.normal(0.3, 0.2, (2, 1)) + draw.normal(0, 0.3, (1, 50)) + draw.normal(0, 0.3, (2, 50))
        alone = stats.ttest_1samp(table.mean(1), 0.0)
        low, high = alone.confidence_interval(0.95)
        found = crossed([table], bounds=(-100.0, 100.0))
        assert found.low <= low + 1e-9
        assert found.high >= high - 1e-9
        assert found.p_value >= alone.pvalue - 1e-9


def test_a_small_benchmark_beside_a_large_one_keeps_its_few_degrees_of_freedom() -> None:
    """Nearly all of the error comes from the 15 problems of one benchmark: no more df than they leave."""
    draw = np.random.default_rng(4)
    small, large = draw.normal(0, 1, (1, 15)).repeat(5, 0), draw.normal(0, 1e-3, (1, 500)).repeat(5, 0)
    noise = draw.normal(0, 1e-3, (5, 15))
    assert crossed([small + noise, large], bounds=(-100.0, 100.0)).df < 15
