"""Tells from the files of a past run, or from a lock file, which of the measured faults affect it. No code is run.

A fault has several conditions: a release, a trainer and settings. The answer is "not affected" if one is known
not to be met, "affected" if all are met, and "affected if" if the files do not give some of them. Otherwise it
is "unknown": a release was not measured, files contradict each other, or a file could not be read.
Held by: tests/audit/test_past.py, tests/audit/test_past_findings.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from truestep.audit.measure.findings import Cause, Causes, cause
from truestep.audit.postmortem.measured import KEYS, MEASURED, NOTHING, TRAINERS, Measured, Need
from truestep.audit.postmortem.run_files import MARKS, TRAINER, Evidence, gather

MOST_PROBLEMS = 5  # the most unread files that an answer names
Verdict = Literal["affected", "affected if", "not affected", "unknown"]


@dataclass(frozen=True)
class Check:
    """Whether one condition of a fault was met, with the reason; None if the files do not say. ``open`` if the
    fault occurs if the condition is met, which no file gives."""

    met: bool | None
    reason: Cause
    open: bool = False


def check(met: bool | None, kind: str, **values: Any) -> Check:
    return Check(met, cause("", kind, **values))


def not_given(kind: str, **values: Any) -> Check:
    return Check(None, cause("", kind, **values), open=True)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the files say about one measured fault."""

    measured: Measured
    answer: Verdict
    reasons: Causes


def look_back(path: Path) -> list[Answer]:
    """Return one answer per measured fault, in the order of ``MEASURED``. ``path`` is a folder or one file.
    Raises UserError if it does not exist."""
    evidence = gather(path)
    return [answer(measured, evidence) for measured in MEASURED]


def answer(measured: Measured, evidence: Evidence) -> Answer:
    """Combine the check of the release and the checks of all conditions into one answer."""
    released = _release_check(measured, evidence)
    checks = [released, *_conditions(measured, evidence)]
    by = {met: [c.reason for c in checks if c.met is met] for met in (True, False, None)}
    undecided = [c.reason for c in checks if c.met is None and not c.open]
    verdict: Verdict
    if by[False]:
        verdict, told = "not affected", by[False]
    elif not by[None]:
        verdict, told = "affected", by[True]
    elif not undecided and not evidence.problems:
        verdict, told = "affected if", [*by[None], *by[True]]
    else:
        unread = [cause("", "said", text=text) for text in evidence.problems[:MOST_PROBLEMS]]
        verdict, told = "unknown", [*(undecided or by[None]), *unread, *by[True]]
        if (more := len(evidence.problems) - MOST_PROBLEMS) > 0:
            told.append(cause("", "more_unread", files=more))
    return Answer(measured=measured, answer=verdict, reasons=tuple(told))


def release(version: str) -> tuple[int, ...] | None:
    """Return the numbers of a release, without trailing zeros; None for a pre-release or any other text."""
    found = re.fullmatch(r"v?(\d{1,9}(?:\.\d{1,9}){0,7})(?:\.post\d+)?(?:\+[\w.]+)?", version)
    return tuple(int(n) for n in re.sub(r"(\.0+)+$", "", found[1]).split(".")) if found else None


def judge_release(measured: Measured, version: str) -> Check:
    """Check whether this release has the fault. If it was not measured, infer from the releases around it."""
    name = {"package": measured.package, "version": version}
    own = release(version)
    if own is None:
        return check(None, "no_release", **name)
    releases = {True: measured.faulty, False: measured.right}
    points = sorted((release(v) or (), v, faulty) for faulty in releases for v in releases[faulty])
    for numbers, _, faulty in points:
        if numbers == own:
            return check(faulty, "measured", faulty=faulty, **name)
    below, above = [p for p in points if p[0] < own], [p for p in points if p[0] > own]
    if not below:
        _, oldest, faulty = above[0]
        return check(None, "older", oldest=oldest, faulty=faulty, **name)
    _, low, low_faulty = below[-1]
    if not above:
        return check(None, "newer", newest=low, faulty=low_faulty, **name)
    _, high, high_faulty = above[0]
    kind, met = ("between_alike", low_faulty) if low_faulty == high_faulty else ("between_different", None)
    return check(met, kind, low=low, high=high, faulty=low_faulty, **name)


def _release_check(measured: Measured, evidence: Evidence) -> Check:
    found, package = evidence.versions.get(measured.package, {}), measured.package
    if not found:
        asked = evidence.ranges.get(package)
        if evidence.complete and not asked:
            file, size = next(iter(evidence.complete.items()))
            return check(False, "not_in_environment", package=package, packages=size, file=file)
        return check(None, "not_pinned", package=package, asked=asked or "")
    judged = [judge_release(measured, version) for version in found]
    told = [_with(c, file=file).reason for c, file in zip(judged, found.values(), strict=True)]
    return _together([c.met for c in judged], "releases", reasons=told)


def _together(answers: Sequence[bool | None], kind: str, **values: Any) -> Check:
    """Return the common answer for several values of one setting; it is None if the answers differ."""
    agree = len(set(answers)) == 1
    return check(answers[0] if agree else None, kind, agree=agree, **values)


def _with(checked: Check, **values: Any) -> Check:
    return replace(checked, reason=replace(checked.reason, values={**checked.reason.values, **values}))


def _conditions(measured: Measured, evidence: Evidence) -> Iterator[Check]:
    if trainer := TRAINERS[measured.subject]:
        yield _trained_by(trainer, evidence)
    for need in measured.needs:
        yield _needed(need, measured, evidence)
    if measured.least > 1:
        yield _micro_batches(measured, evidence)
    if measured.hidden:
        yield not_given(measured.hidden)


def _trained_by(trainer: str, evidence: Evidence) -> Check:
    found = evidence.settings.get("trainer", {})
    kind_of_it = found.keys() == {TRAINER} and trainer in MARKS.values()  # its files do not say which
    if not found or kind_of_it:
        return not_given("trainer_not_shown", trainer=trainer)
    return check(trainer in found, "trained_by", found=found)


def _needed(need: Need, measured: Measured, evidence: Evidence) -> Check:
    """Check a setting against the values that were faulty and right."""
    key = KEYS[need.key]
    if not key.setting:
        return not_given(key.hidden, key=need.key, wanted=need.faulty)
    found = evidence.settings.get(key.setting, {})
    if not found:
        return _default(need, measured, evidence) or not_given("not_said", key=need.key, wanted=need.faulty)

    def met(value: Any) -> bool | None:
        read = key.read(value)
        return True if read in need.faulty else False if read in need.right or value == key.off else None

    together = _together([met(value) for value in found], "setting", setting=key.setting, found=found)
    note = "" if together.met else "only_faulty" if together.met is False else "only_measured"
    return (
        _with(together, note=note, key=need.key, faulty=need.faulty, right=need.right) if note else together
    )


def _default(need: Need, measured: Measured, evidence: Evidence) -> Check | None:
    """Check the default if the run's own settings do not change it. It is known only for audited releases."""
    default, versions = KEYS[need.key].default, evidence.versions.get(measured.package, {})
    known = versions and {*versions} <= {*measured.faulty, *measured.right}
    if default is NOTHING or not known or "trainer" not in evidence.settings:
        return None
    return check(default in need.faulty, "default_used", key=need.key, package=measured.package,
                 version=next(iter(versions)))  # fmt: skip


def _micro_batches(measured: Measured, evidence: Evidence) -> Check:
    """Check whether a step has as many micro-batches as the fault needs."""
    least, found = measured.least, evidence.settings.get("accumulation", {})
    if not found:
        return _arithmetic(least, evidence)
    together = _together([steps >= least for steps in found], "setting", setting="accumulation", found=found)
    if together.met is False:
        if measured.single.get(2) and 1 in found:  # several processes are wrong even then
            return _single(measured, together, evidence)
        return _with(together, note="too_few_steps", least=least)
    return together


def _single(measured: Measured, checked: Check, evidence: Evidence) -> Check:
    """Check a step with one micro-batch per process, which was right only with one process."""
    several = {count >= 2 for count in evidence.settings.get("processes", {})}
    if several == {False}:
        return checked
    noted = _with(checked, note="single_wrong", kinds=measured.single[2])
    return replace(noted, met=True if several == {True} else None, open=not several)


def _arithmetic(least: int, evidence: Evidence) -> Check:
    """Return why the number of accumulation steps is unknown, and what it depends on."""
    batch, micro = evidence.only("batch_size"), evidence.only("micro_batch_size")
    if batch is None or not micro:
        return not_given("steps_not_said", least=least)
    file, most = next(iter(evidence.settings["batch_size"].values())), batch // (least * micro)
    values = {"batch": batch, "micro": micro, "file": file, "least": least, "most": most}
    return not_given("depends_on_processes", **values)
