"""The judge of RL steps against injected faults and against correct steps of other objectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.measure.rl import alternatives, cases
from truestep.audit.measure.rl.judge import depends_on_split, judge
from truestep.audit.measure.rl.objective import KNOWN, Objective, advantages, coefficients
from truestep.audit.measure.rl.observed import RLObservation
from truestep.audit.measure.rl.search import FIT, Seen
from truestep.audit.present.words import found_in_words, row_of
from truestep.testing.rl_mutants import CLEAN, MUTANTS, RLMutant
from truestep.testing.rl_trainer import GRPO, observe

LEAST = 1e-3  # relative; what a fault must change
QUICK = (
    "a mean over tokens in every micro-batch",
    "the advantage of the sample before",
    "clipped on both sides, whatever the sign",
    "the temperature is ignored",
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def runs_of(mutant: RLMutant, folder: Path) -> dict[str, RLObservation]:
    return observe(mutant.trainer, folder, mutant.asked, mutant.cases, mutant.ranks)


def text_of(finding: Finding) -> str:
    return found_in_words(row_of(finding))


def is_named(mutant: RLMutant, finding: Finding) -> bool:
    return bool(set(finding.codes) & set(mutant.names.split()))


def check(mutant: RLMutant, folder: Path) -> None:
    finding = judge("mutant", {}, runs_of(mutant, folder))
    assert finding.verdict in (Verdict.FAULT, Verdict.DEFAULT)
    assert is_named(mutant, finding), (mutant.text, finding.codes)
    assert text_of(finding)
    only_objective = set(finding.codes) <= alternatives.OBJECTIVES
    assert (finding.verdict is Verdict.DEFAULT) == only_objective


@pytest.mark.parametrize("text", QUICK)
def test_a_few_faults_are_found_and_named(text: str, tmp_path: Path) -> None:
    (mutant,) = [m for m in MUTANTS if m.text == text]
    check(replace(mutant, cases=("straddling", "minibatches")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.text)
def test_every_fault_is_found_and_named(mutant: RLMutant, tmp_path: Path) -> None:
    check(mutant, tmp_path)


def test_there_are_enough_faults_and_all_are_different() -> None:
    assert len(MUTANTS) >= 40
    assert max(Counter(m.text for m in MUTANTS).values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("clean", CLEAN, ids=lambda m: f"{m.text}, {m.ranks} ranks")
def test_every_correct_objective_is_right(clean: RLMutant, tmp_path: Path) -> None:
    finding = judge("clean", {}, runs_of(clean, tmp_path))
    assert finding.verdict is Verdict.RIGHT, text_of(finding)
    assert finding.relative_error is not None
    assert finding.relative_error < FIT / 2


def test_a_correct_step_is_right_and_far_from_every_alternative(tmp_path: Path) -> None:
    """Otherwise a fault could pass as RIGHT. Alternatives that are the same objective here are named."""
    asked = Objective()
    runs = observe(GRPO, tmp_path, {}, ("split", "reused", "minibatches"))
    assert judge("clean", {}, runs).verdict is Verdict.RIGHT
    seen = [Seen(name, s, run.batch(i)) for name, run in runs.items() for i, s in enumerate(run.steps)]
    same = set()
    for other in alternatives.alternatives(asked):
        worst = 0.0
        for one in seen:
            parts = coefficients(other.objective, one.batch)
            worst = max(worst, one.error(parts, parts.whole))
        if worst < LEAST:
            same.add((other.cause.kinds[0], str(other.cause.values.get("found"))))
    # Nothing is masked, no ratio with A < 0 is above 2, and sampler and trainer agree. There is one rank, and every
    # micro-batch of these cases has one whole group. Between some bounds of the clip, there is no ratio.
    alike = {
        "rl_clip_dual",
        "rl_correction",
        "rl_counted",
        "rl_old",
        "rl_clip_range",
        "rl_scope",
        "rl_grouping",
    }
    assert {kind for kind, _ in same} <= alike, same
    assert {("rl_counted", "all"), ("rl_scope", "rank"), ("rl_grouping", "micro_batch")} <= same
    different = {
        ("rl_scope", "micro_batch"),
        ("rl_grouping", "batch"),
        ("rl_old", "policy"),
        ("rl_counted", "padded"),
    }
    assert not different & same


def test_a_split_is_seen_without_an_objective(tmp_path: Path) -> None:
    (folder := tmp_path / "wrong").mkdir()
    wrong = next(m for m in MUTANTS if m.text == "a mean over tokens in every micro-batch")
    for trainer, expected in ((GRPO, False), (wrong.trainer, True)):
        place = folder / trainer.__name__
        place.mkdir()
        runs = observe(trainer, place, {}, ("whole", "split"))
        seen = [Seen(name, s, run.batch(i)) for name, run in runs.items() for i, s in enumerate(run.steps)]
        assert depends_on_split(seen) is expected


def test_no_objective_that_is_not_asked_for_is_taken_from_a_file() -> None:
    for broken in ({"scope": "everywhere"}, {"unknown": 1}, {"epsilon": "x"}):
        with pytest.raises(ValueError):
            Objective.from_json(broken)
    made = Objective.from_json({"beta": 1, "kl": "k3", "tau": [1, 2]})
    assert made == Objective(beta=1.0, kl="k3", tau=(1.0, 2.0))


def test_the_samples_show_what_they_must() -> None:
    rows = cases.samples()
    pairs = Counter(pair for r in rows for pair in zip(r.completion, r.completion[1:], strict=False))
    assert max(pairs.values()) == 1  # a model without attention sees every token but the first apart
    assert len({r.group for r in rows}) * cases.GROUP == len(rows)
    assert [len(r.completion) for r in rows if r.truncated] == [cases.MOST_TOKENS] * 2
    assert all(len(r.completion) < cases.MOST_TOKENS for r in rows if not r.truncated)
    spreads = [np.std([r.reward for r in rows if r.group == g]) for g in range(len(rows) // cases.GROUP)]
    assert min(spreads) == 0
    assert 0 < sorted(spreads)[1] < 2e-3 < max(spreads)


@pytest.mark.parametrize(
    ("scale", "ddof"), [("group_std", 1), ("group_std", 0), ("batch_std", 1), ("none", 1)]
)
def test_advantages_are_those_of_the_formulas(scale: str, ddof: int, tmp_path: Path) -> None:
    runs = observe(GRPO, tmp_path, {}, ("whole",))
    batch = runs["whole"].batch(0)
    found = advantages(Objective(scale=scale, ddof=ddof), batch)
    for row, sample in enumerate(batch.case.rows):
        group = [s.reward for s in batch.case.rows if s.group == sample.group]
        over = {"group_std": group, "batch_std": [s.reward for s in batch.case.rows]}.get(scale, [])
        spread = np.std(over, ddof=ddof) + 1e-4 if over else 1.0
        assert found[row] == pytest.approx((sample.reward - np.mean(group)) / spread, abs=1e-12)


def test_every_known_value_of_every_field_can_be_evaluated(tmp_path: Path) -> None:
    batch = observe(GRPO, tmp_path, {}, ("split",))["split"].batch(0)
    for name, values in KNOWN.items():
        for value in values:
            parts = coefficients(Objective(**{"kl": "k3", "beta": 0.1, "entropy": 0.1, name: value}), batch)
            assert np.isfinite(parts.whole).all(), (name, value)
