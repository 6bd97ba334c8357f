"""Write docs/results/claims.md: what the paper, the field and this project claim, and what the results say about it.

    python benchmarks/claims.py [--check]

Numbers and verdicts are computed from results/ by the rules in ``verdict_of``; only the sentences are written by hand
(benchmarks/claims_made.py). With ``--check``, no file is written, and the exit code is 1 if the page is out of date.
Held by: tests/unit/test_claims.py
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent))

import pages

from truestep.audit.measure.findings import Verdict
from truestep.rundir import read_json

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/results/claims.md"
SUPPORTED, REFUTED, NOT_SHOWN, NOT_TESTABLE = "supported", "refuted", "not shown", "not testable at this size"
LEVEL = 0.05  # of a primary contrast, after Holm's correction
OPEN_AUDIT = (Verdict.NOT_RUN, Verdict.NOT_OBSERVABLE)


class Incomplete(Exception):
    """A claim names a result that does not exist."""


@functools.cache
def result(path: str) -> Mapping[str, Any]:
    """Return a JSON file of results/."""
    found: Mapping[str, Any] = read_json(ROOT / "results" / path)
    return found


@functools.cache
def source(path: str) -> str:
    """Return the command and the commit behind a JSON file of results/, as far as they were recorded."""
    found = result(path)
    beside = f"{Path(path).parent.as_posix()}/provenance.json"
    provenance = found.get("provenance") or (
        result(beside) if (ROOT / "results" / beside).exists() else found
    )
    command = found.get("command") or provenance.get("command") or "command not recorded"
    commit = provenance.get("commit", "")[:7] or "commit not recorded"
    changed = ", with uncommitted changes" if provenance.get("uncommitted_changes") else ""
    said = command if isinstance(command, str) else " ".join(command)
    return f"{said if command == 'command not recorded' else f'`{said}`'} ({commit}{changed})"


class Evidence(Protocol):
    @property
    def file(self) -> str: ...

    @property
    def verdict(self) -> str: ...

    @property
    def words(self) -> str: ...


def of_interval(low: float, high: float, margin: float) -> str:
    """Return the verdict on "the difference is above ``margin``", which is not negative."""
    if low > margin:
        return SUPPORTED
    return REFUTED if high < margin or high < 0 else NOT_SHOWN


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A contrast of a study. It bears on the claim that arm ``a`` has a higher score than arm ``b``, by more than
    ``margin``. The study may have declared it the other way round."""

    study: str
    a: str
    b: str
    margin: float = 0.0

    @property
    def file(self) -> str:
        return f"study/{self.study}/results.json"

    @property
    def row(self) -> tuple[Mapping[str, Any], int]:
        """The study's row, and the sign of its difference for the claim."""
        for row in result(self.file)["contrasts"]:
            if (row["a"], row["b"]) in ((self.a, self.b), (self.b, self.a)):
                return row, 1 if row["a"] == self.a else -1
        raise Incomplete(f"study {self.study} has no contrast of {self.a} and {self.b}")

    @property
    def interval(self) -> tuple[float, float, float]:
        """Value, low and high, as shares."""
        row, sign = self.row
        low, high = sorted((sign * row["all"]["low"], sign * row["all"]["high"]))
        return sign * row["all"]["value"], low, high

    @property
    def verdict(self) -> str:
        row, _ = self.row
        if row["primary"] and row["p_adjusted"] >= LEVEL:
            return NOT_SHOWN
        return of_interval(*self.interval[1:], self.margin)

    @property
    def words(self) -> str:
        row, _ = self.row
        value, low, high = (100 * x for x in self.interval)
        power = f"detectable {100 * row['all']['detectable']:.1f}"
        kind = "primary" if row["primary"] else "secondary"
        link = f"[{self.study}](../../results/study/{self.study}/table.md)"
        seeds = f"{len(row['seeds'])} seeds"
        return (
            f"{link}: `{self.a}` − `{self.b}` {_signed(value)} [{_signed(low)}, {_signed(high)}] "
            f"({power}, {seeds}, {kind}): {self.verdict}"
        )


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Two stages of one run, compared on the same problems. It bears on the claim that ``later`` has the higher score
    than ``earlier``."""

    run: str
    earlier: str
    later: str

    @property
    def file(self) -> str:
        return f"{self.run}/summary.json"

    @property
    def row(self) -> Mapping[str, Any]:
        for row in result(self.file)["comparisons"]:
            if (row["from"], row["to"]) == (self.earlier, self.later):
                return dict(row)
        raise Incomplete(f"results/{self.run} does not compare {self.earlier} and {self.later}")

    @property
    def verdict(self) -> str:
        return of_interval(self.row["low"], self.row["high"], 0.0)

    @property
    def words(self) -> str:
        row = self.row
        value, low, high = (_signed(100 * row[key]) for key in ("difference", "low", "high"))
        return (
            f"[{self.run}](../../results/{self.run}/summary.json): `{self.later}` − `{self.earlier}` {value} [{low}, {high}] "
            f"(detectable {100 * row['detectable']:.1f}, 1 seed, {row['num_problems']} problems): {self.verdict}"
        )


@dataclass(frozen=True, kw_only=True)
class Audited:
    """A finding of an audit. It bears on the claim that the release has a fault with ``fault`` in its words, or, if
    that is empty, that the release is right."""

    release: str
    having: Mapping[str, Any]
    fault: str

    @property
    def file(self) -> str:
        return f"audit/{self.release}.json"

    @property
    def finding(self) -> Mapping[str, Any]:
        for found in result(self.file)["findings"]:
            configuration = {"manual": False, "optimizer": "sgd", **found["configuration"]}
            wanted = {"manual": False, "optimizer": "sgd", **self.having}
            if all(configuration.get(key) == value for key, value in wanted.items()):
                return dict(found)
        raise Incomplete(f"results/{self.file} has no finding with {self.having}")

    @property
    def verdict(self) -> str:
        found = self.finding
        if found["verdict"] in OPEN_AUDIT:
            return NOT_SHOWN
        holds = self.fault in found["fault"] if self.fault else found["verdict"] == "RIGHT"
        return SUPPORTED if holds else REFUTED

    @property
    def words(self) -> str:
        found = self.finding
        said = f" ({found['fault']})" if found["fault"] else ""
        how = ", ".join(f"{key} {value}" for key, value in self.having.items())
        link = f"[{self.release}](../../results/{self.file})"
        return f"{link}, {how}: {found['verdict']}{said}: {self.verdict}"


@dataclass(frozen=True, kw_only=True)
class Count:
    """Two counts of a file, each by its key: of ``trials`` and of ``failures``, or of ``successes`` instead. The claim
    is that none failed."""

    file: str
    trials: str
    failures: str = ""
    successes: str = ""
    what: str = "failed"

    @property
    def numbers(self) -> tuple[int, int]:
        """Failures and trials."""
        found = result(self.file)
        trials = _number(found[self.trials])
        failed = trials - _number(found[self.successes]) if self.successes else _number(found[self.failures])
        return failed, trials

    @property
    def verdict(self) -> str:
        failed, trials = self.numbers
        return REFUTED if failed else SUPPORTED if trials else NOT_SHOWN

    @property
    def words(self) -> str:
        failed, trials = self.numbers
        bound = "" if failed else f" (95 % interval [0, {100 * (1 - 0.025 ** (1 / trials)):.1f}] %)"
        name = self.file.removesuffix(".json")
        return f"[{name}](../../results/{self.file}): {failed} of {trials} {self.what}{bound}: {self.verdict}"


def _number(value: Any) -> int:
    return len(value) if isinstance(value, list) else int(value)


@dataclass(frozen=True, kw_only=True)
class Equal:
    """Fields of a file that must have these values."""

    file: str
    values: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        found = result(self.file)
        return SUPPORTED if all(found[key] == value for key, value in self.values.items()) else REFUTED

    @property
    def words(self) -> str:
        found = result(self.file)
        said = ", ".join(f"{key.replace('_', ' ')} {found[key]}" for key in self.values)
        return f"[{self.file.removesuffix('.json')}](../../results/{self.file}): {said}: {self.verdict}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, who makes it, what would refute it, and the evidence. Without evidence, ``why`` says why none is
    possible here."""

    words: str
    refuted_if: str
    evidence: tuple[Evidence, ...] = ()
    why: str = ""


def verdict_of(claim: Claim) -> str:
    """Return the verdict on a claim, which is meant to hold wherever it was tested: one counterexample refutes it, and
    all evidence must support it."""
    found = [one.verdict for one in claim.evidence]
    if not found:
        return NOT_TESTABLE
    if REFUTED in found:
        return REFUTED
    return SUPPORTED if set(found) == {SUPPORTED} else NOT_SHOWN


INTRO = f"""# Claims

`python benchmarks/claims.py` writes this page from results/, and a test compares them. Numbers and verdicts are computed; only the
sentences are written by hand. {{counts}}

The rules were fixed for all claims together:

* **A difference between two arms of a study.** It is supported if its 95 % interval is above 0, and refuted if the interval is
  below 0. Otherwise it is not shown, and so is a primary contrast whose p-value is {LEVEL:g} or more after Holm's correction. The
  differences are in points. *Detectable* is the difference that the study would have shown with a probability of 80 %.
  Secondary contrasts are not corrected for their number.
* **Two stages of one run** are judged by the same rule. Their interval is over problems only, because there is one seed.
* **A finding of an audit.** It is supported if the release has the fault that the claim names (or is right, if the claim says
  so), refuted if the audit finds something else, and not shown if the audit could not run or see it.
* **A count.** It is supported if none of the trials failed. One failure refutes it.
* **A claim with several pieces of evidence** is meant to hold in all of them: it is refuted by one, and supported only by all.

The studies train models with less than 1 M parameters on short generated tasks. They can refute a claim that is meant to hold in
general, and only at this size; they cannot confirm a number that was measured with 7 B parameters."""


def page(groups: Mapping[str, Sequence[Claim]]) -> str:
    """Return the page."""
    every = [verdict_of(claim) for claims in groups.values() for claim in claims]
    parts = [f"{every.count(v)} {v}" for v in (SUPPORTED, REFUTED, NOT_SHOWN, NOT_TESTABLE)]
    text = [INTRO.format(counts=f"Verdicts on {len(every)} claims: {', '.join(parts)}.")]
    for title, claims in groups.items():
        rows = [
            pages.table_row(
                ("claim", "what would refute it", "what was run", "command and commit", "verdict")
            ),
            "|---|---|---|---|---|",
        ]
        for claim in claims:
            run = "<br>".join(one.words for one in claim.evidence) or claim.why
            sources = "<br>".join(dict.fromkeys(source(one.file) for one in claim.evidence)) or "none"
            verdict = verdict_of(claim)
            shown = f"**{verdict}**" if verdict == REFUTED else verdict
            rows.append(pages.table_row((claim.words, claim.refuted_if, run, sources, shown)))
        text += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(text) + "\n"


def files() -> dict[Path, str]:
    import claims_made

    return {PAGE: page(claims_made.GROUPS)}


if __name__ == "__main__":
    # The classes must be those that claims_made imports.
    from claims import files as made

    pages.write_or_check(__doc__, made)
