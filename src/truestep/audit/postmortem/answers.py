"""Tells from the files of a past run which of the measured faults affected it. No code is run.

It reads pinned versions (pip freeze, requirements, environment.yml, uv.lock, poetry.lock), DeepSpeed
configurations (also inside TrainingArguments, accelerate and LLaMA-Factory files), command lines in scripts,
trainer_state.json and the config.json next to it. A fault has several conditions. The answer is "not
affected" if one is known not to be met, "affected" if all are met, and otherwise "unknown". Files that
contradict each other make the answer "unknown".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from truestep.audit.measure.findings import Cause, Causes, cause
from truestep.audit.postmortem.run_files import Evidence, gather

TRAINER, OPENRLHF_SFT = "transformers Trainer", "OpenRLHF sft"
MOST_PROBLEMS = 5  # the most unread files that an answer names
Verdict = Literal["affected", "not affected", "unknown"]


@dataclass(frozen=True)
class Check:
    """Whether one condition of a fault was met, with the reason; None if the files do not say."""

    met: bool | None
    reason: Cause


def check(met: bool | None, kind: str, **values: Any) -> Check:
    return Check(met, cause("", kind, **values))


Condition = Callable[[Evidence], Check]


@dataclass(frozen=True)
class Measured:
    """A fault that was recovered from the parameters of real releases."""

    finding: str
    package: str
    faulty: tuple[str, ...]  # releases that were run
    right: tuple[str, ...]
    conditions: tuple[Condition, ...]
    source: str
    older_too: bool = False  # infer that all releases before the first faulty one have the fault


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the files say about one measured fault."""

    finding: str
    answer: Verdict
    reasons: Causes
    source: str


def look_back(folder: Path) -> list[Answer]:
    """Return one answer per measured fault, in the order of ``MEASURED``. Raises UserError if ``folder`` is
    not a directory."""
    evidence = gather(folder)
    return [answer(measured, evidence) for measured in MEASURED]


def answer(measured: Measured, evidence: Evidence) -> Answer:
    """Combine the check of the release and the checks of all conditions into one answer."""
    checks = [_release_check(measured, evidence), *(condition(evidence) for condition in measured.conditions)]
    by = {met: [c.reason for c in checks if c.met is met] for met in (True, False, None)}
    verdict: Verdict
    if by[False]:
        verdict, told = "not affected", by[False]
    elif not by[None]:
        verdict, told = "affected", by[True]
    else:
        unread = [cause("", "said", text=text) for text in evidence.problems[:MOST_PROBLEMS]]
        verdict, told = "unknown", [*by[None], *unread, *by[True]]
        if (more := len(evidence.problems) - MOST_PROBLEMS) > 0:
            told.append(cause("", "more_unread", files=more))
    return Answer(finding=measured.finding, answer=verdict, reasons=tuple(told), source=measured.source)


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
        older = faulty and measured.older_too
        return check(True if older else None, "older_is_faulty" if older else "older", oldest=oldest, **name)
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


def _setting(key: str, test: Callable[[Any], bool | None], note: str = "") -> Condition:
    """Return the condition that a setting passes ``test``. ``note`` names a sentence to add if it fails."""

    def condition(evidence: Evidence) -> Check:
        found = evidence.settings.get(key, {})
        if not found:
            return check(None, "not_said", setting=key)
        together = _together([test(value) for value in found], "setting", setting=key, found=found)
        return together if together.met or not note else _with(together, note=note)

    return condition


def _with(checked: Check, **values: str) -> Check:
    return Check(checked.met, replace(checked.reason, values={**checked.reason.values, **values}))


def _micro_batches(evidence: Evidence, least: int) -> Check:
    """Check whether a step has ``least`` or more micro-batches."""
    if not evidence.settings.get("accumulation"):
        return _arithmetic(evidence)
    return _setting("accumulation", lambda k: k >= least)(evidence)


def _three_micro_batches(evidence: Evidence) -> Check:
    """Check for three or more micro-batches, because the offload fault keeps only the first and the last."""
    checked = _micro_batches(evidence, 3)
    if checked.met is False:
        two = 2 in checked.reason.values["found"]
        return _with(checked, note="two_drop_nothing" if two else "drops_nothing")
    return checked


def _several_micro_batches(evidence: Evidence) -> Check:
    """Check for two or more micro-batches. If there is only one, the mean is known to be correct only with a
    single process."""
    checked = _micro_batches(evidence, 2)
    if checked.met is False and set(evidence.settings.get("processes", {})) != {1}:
        return replace(_with(checked, note="several_not_measured"), met=None)
    return checked


def _arithmetic(evidence: Evidence) -> Check:
    """Return why the number of accumulation steps is unknown, and what it depends on."""
    batch, micro = evidence.only("batch_size"), evidence.only("micro_batch_size")
    if batch is None or not micro:
        return check(None, "not_said", setting="accumulation")
    file, most = next(iter(evidence.settings["batch_size"].values())), batch // (3 * micro)
    return check(None, "depends_on_processes", batch=batch, micro=micro, file=file, most=most)


def _trained_by(trainer: str) -> Condition:
    def condition(evidence: Evidence) -> Check:
        found = evidence.settings.get("trainer", {})
        if not found:
            return check(None, "trainer_not_shown", trainer=trainer)
        return check(trainer in found, "trained_by", found=found)

    return condition


def _own_tokens(evidence: Evidence) -> Check:
    """Check that averaging is off. 5.23.0 averages by default; the defaults of other releases are unknown."""
    told = evidence.settings.get("average_tokens")
    if not told and set(evidence.versions.get("transformers", {})) == {"5.23.0"}:
        return check(False, "averages_by_default")
    return _setting("average_tokens", lambda on: not on)(evidence)


_TRAINER_STEP = "transformers Trainer "
_OFFLOAD = "DeepSpeed ZeRO-2 with an offloaded optimizer "
_OFFLOADED = (
    _setting("zero_stage", lambda stage: stage == 2, "only_stage_2"),
    _setting("offload", lambda device: {"cpu": True, "none": False}.get(device), "cpu_and_none"),
)
_BY_TRAINER = _trained_by(TRAINER)
_GPT2 = _setting("architecture", lambda name: name == "GPT2LMHeadModel" or None, "only_gpt2")
_SEVERAL_PROCESSES = _setting("processes", lambda count: count >= 2)


def _measured(
    package: str, finding: str, faulty: str, right: str, weights: str, *met: Condition, **more: bool
) -> Measured:
    """Return a measured fault. ``faulty`` and ``right`` are releases; ``weights`` is from their CPU steps."""
    source, by = f"recovered weights of the real step on a CPU: {weights}", tuple(faulty.split())
    return Measured(finding, package, by, tuple(right.split()), tuple(met), source, **more)


MEASURED: tuple[Measured, ...] = (
    _measured(
        "deepspeed", _OFFLOAD + "drops the intermediate micro-batches", "0.15.2 0.18.9", "0.15.1 0.19.0 0.19.8",
        "0.15.2 and 0.18.9 [1, 0, 0, 1]; 0.15.1, 0.19.0, 0.19.8, stages 1 and 3, no offload: ones",
        *_OFFLOADED, _three_micro_batches,
    ),
    _measured(
        "transformers", _TRAINER_STEP + "takes the mean of micro-batch means", "4.45.2", "5.23.0",
        "4.45.2 Llama, tokens 2, 17, 27, 2: [6, .706, .444, 6]; 5.23.0 Llama, GPT-2, Gemma-3: ones",
        _BY_TRAINER, _several_micro_batches,
    ),
    _measured(
        "transformers", _TRAINER_STEP + "sums micro-batch means if the model class takes no loss arguments",
        "4.46.3", "5.23.0", "4.46.3 GPT-2, tokens 2, 17, 27, 2: [24, 2.8, 1.8, 24], logged loss correct; 5.23.0: ones",
        _BY_TRAINER, _GPT2, _several_micro_batches,
    ),
    _measured(
        "transformers", _TRAINER_STEP + "divides by each process's own tokens if average_tokens_across_devices is off",
        "5.23.0", "", "5.23.0 on 2 processes [.729 ×4, 1.591 ×4]; with the option on: ones",
        _BY_TRAINER, _own_tokens, _SEVERAL_PROCESSES,
    ),
    _measured(
        "openrlhf", "OpenRLHF SFT takes the mean of micro-batch means", "0.10.2", "0.10.4 0.11.2",
        "0.10.2, tokens 2, 27, 2, 17: [6, .444, 6, .706]; 0.10.4, 0.11.2: ones",
        _trained_by(OPENRLHF_SFT), _several_micro_batches, older_too=True,
    ),
    _measured(
        "deepspeed",
        _OFFLOAD + "keeps only the last micro-batch, in loops that set the accumulation boundary by hand",
        "0.15.1 0.15.2 0.18.9", "0.19.0 0.19.8",
        "0.15.1, 0.15.2 and 0.18.9 [0, 0, 0, 1]; 0.19.0, 0.19.8: ones", *_OFFLOADED,
        lambda evidence: check(None, "boundary_not_shown"),  # no file shows the loop that calls it
    ),
    _measured(
        "verl", "verl's agg_loss takes the mean of micro-batch means", "0.6.0", "0.9.1",
        "its function in our own loop, 0.6.0, tokens 2, 27, 3, 17: [6.1, .45, 4.1, .72]; 0.9.1: ones",
        _several_micro_batches,
    ),
)  # fmt: skip
