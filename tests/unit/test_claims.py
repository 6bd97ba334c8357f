"""The page of claims is what the results say; the rules of its verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import claims
import claims_made
from claims import (
    NOT_SHOWN,
    NOT_TESTABLE,
    REFUTED,
    SUPPORTED,
    Audited,
    Claim,
    Contrast,
    Count,
    of_interval,
    verdict_of,
)

from truestep.audit.measure.findings import Verdict

EVERY = [claim for group in claims_made.GROUPS.values() for claim in group]


def test_the_page_is_up_to_date() -> None:
    for path, text in claims.files().items():
        assert path.read_text(encoding="utf-8") == text, "run benchmarks/claims.py"


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.01, 0.2, 0.0, SUPPORTED),
        (-0.2, -0.01, 0.0, REFUTED),
        (-0.1, 0.1, 0.0, NOT_SHOWN),
        (0.01, 0.2, 0.05, NOT_SHOWN),
        (0.01, 0.04, 0.05, REFUTED),
        (0.06, 0.2, 0.05, SUPPORTED),
    ],
)
def test_an_interval_decides(low: float, high: float, margin: float, verdict: str) -> None:
    assert of_interval(low, high, margin) == verdict


def test_a_contrast_turned_round_has_the_opposite_verdict() -> None:
    one, other = (Contrast(study="letters", a=a, b=b) for a, b in (("sft-rl", "luffy"), ("luffy", "sft-rl")))
    assert (one.verdict, other.verdict) == (SUPPORTED, REFUTED)
    assert one.interval == tuple(-x for x in (other.interval[0], other.interval[2], other.interval[1]))


def test_a_primary_contrast_is_judged_after_the_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval above 0 is not enough if the corrected p-value is not below the level."""
    row = {"a": "x", "b": "y", "all": {"value": 0.2, "low": 0.1, "high": 0.3}, "p_adjusted": 0.06}
    for primary, verdict in ((True, NOT_SHOWN), (False, SUPPORTED)):
        rows = {"contrasts": [{**row, "primary": primary}]}
        monkeypatch.setattr(claims, "result", lambda path, rows=rows: rows)
        assert Contrast(study="s", a="x", b="y").verdict == verdict


def test_one_counterexample_refutes_and_all_evidence_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "result", lambda path: {"n": 9, "bad": int(path), "none": 0})
    good, bad = (Count(file=str(number), trials="n", failures="bad") for number in (0, 1))
    unknown = Count(file="0", trials="none", failures="bad")
    for evidence, verdict in (
        ((), NOT_TESTABLE),
        ((good,), SUPPORTED),
        ((good, unknown), NOT_SHOWN),
        ((good, unknown, bad), REFUTED),
    ):
        assert verdict_of(Claim(words="", refuted_if="", evidence=evidence)) == verdict


@pytest.mark.parametrize("verdict", Verdict)
def test_an_audit_that_saw_nothing_shows_nothing(verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = {
        "configuration": {},
        "verdict": verdict.value,
        "fault": "x" if verdict is Verdict.FAULT else "",
    }
    monkeypatch.setattr(claims, "result", lambda path: {"findings": [finding]})
    wanted = {Verdict.RIGHT: SUPPORTED, Verdict.NOT_RUN: NOT_SHOWN, Verdict.NOT_OBSERVABLE: NOT_SHOWN}
    assert Audited(release="a", having={}, fault="").verdict == wanted.get(verdict, REFUTED)


def test_every_claim_has_evidence_or_says_why_not() -> None:
    assert all(bool(claim.evidence) != bool(claim.why) for claim in EVERY)
    assert len({claim.words for claim in EVERY}) == len(EVERY)


def test_results_against_the_expectation_are_on_the_page() -> None:
    """SFT continued for the same FLOPs and rejection sampling beat RL in these studies."""
    refuted = {claim.words for claim in EVERY if verdict_of(claim) == REFUTED}
    assert any("SFT continued" in words for words in refuted)
    assert any("rejection sampling" in words for words in refuted)


def test_a_result_says_its_command_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": {"command": "run a", "commit": "0123456789"}, "b": {"command": "run b"}, "c": {}}
    found["d"] = {
        "provenance": {"command": ["run", "d"], "commit": "0123456789", "uncommitted_changes": True}
    }
    monkeypatch.setattr(claims, "result", found.__getitem__)
    assert [claims.source.__wrapped__(name) for name in "abcd"] == [
        "`run a` (0123456)",
        "`run b` (commit not recorded)",
        "command not recorded (commit not recorded)",
        "`run d` (0123456, with uncommitted changes)",
    ]
