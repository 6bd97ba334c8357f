"""Was a past run hit? Answered from the files that it left, for every fault that was measured; nothing is
executed.

Read are: pinned versions (pip freeze, requirements, environment.yml, uv.lock, poetry.lock), DeepSpeed
configurations (also inside TrainingArguments, accelerate and LLaMA-Factory files), command lines in scripts,
trainer_state.json and the config.json beside it. An answer is a conjunction of conditions in three values:
one that is surely not met means "not affected", all met means "affected", anything else is "unknown". Files
that contradict each other make unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from truestep.audit.postmortem.run_files import Evidence, gather

TRAINER, OPENRLHF_SFT = "transformers Trainer", "OpenRLHF sft"
MOST_PROBLEMS = 5  # unread files that an answer names
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Reason:
    """One thing that the files say, or do not say; ``present.words`` makes the sentence of its kind."""

    kind: str
    values: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Whether one condition of a fault was met: True, False, or None if the files do not say."""

    met: bool | None
    reason: Reason


def check(met: bool | None, kind: str, **values: Any) -> Check:
    return Check(met, Reason(kind, values))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A fault that was recovered from the parameters of real releases."""

    finding: str
    package: str
    faulty: tuple[str, ...]  # releases that were run
    right: tuple[str, ...]
    conditions: tuple[Callable[[Evidence], Check], ...]
    source: str
    older_too: bool = False  # infer that whatever came before the first faulty release has the fault


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the files say about one measured fault."""

    finding: str
    answer: Literal["affected", "not affected", "unknown"]
    reasons: tuple[Reason, ...]
    source: str


def look_back(folder: Path) -> list[Answer]:
    """One answer a measured fault, in the order of ``MEASURED``. Raises UserError without such a folder."""
    evidence = gather(folder)
    return [answer(measured, evidence) for measured in MEASURED]


def answer(measured: Measured, evidence: Evidence) -> Answer:
    """The conjunction of the release and all conditions."""
    checks = [_release_check(measured, evidence), *(condition(evidence) for condition in measured.conditions)]
    by = {met: [c.reason for c in checks if c.met is met] for met in (True, False, None)}
    verdict: Literal["affected", "not affected", "unknown"]
    if by[False]:
        verdict, told = "not affected", by[False]
    elif not by[None]:
        verdict, told = "affected", by[True]
    else:
        unread = [Reason("said", {"text": text}) for text in evidence.problems[:MOST_PROBLEMS]]
        verdict, told = "unknown", [*by[None], *unread, *by[True]]
        if (more := len(evidence.problems) - MOST_PROBLEMS) > 0:
            told.append(Reason("more_unread", {"files": more}))
    return Answer(finding=measured.finding, answer=verdict, reasons=tuple(told), source=measured.source)


def release(version: str) -> tuple[int, ...] | None:
    """The numbers of a release, without trailing zeros; None for a pre-release or what is no version."""
    found = re.fullmatch(r"v?(\d{1,9}(?:\.\d{1,9}){0,7})(?:\.post\d+)?(?:\+[\w.]+)?", version)
    if not found:
        return None
    numbers = [int(n) for n in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def judge_release(measured: Measured, version: str) -> Check:
    """Whether this release has the fault: as measured, or between two releases that were measured alike."""
    name: Values = {"package": measured.package, "version": version}
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
    between: Values = {"low": low, "high": high, "faulty": low_faulty, **name}
    if low_faulty == high_faulty:
        return check(low_faulty, "between_alike", **between)
    return check(None, "between_different", **between)


def _release_check(measured: Measured, evidence: Evidence) -> Check:
    found, package = evidence.versions.get(measured.package, {}), measured.package
    if not found:
        asked = evidence.ranges.get(package)
        if evidence.complete and not asked:
            file, size = next(iter(evidence.complete.items()))
            return check(False, "not_in_environment", package=package, packages=size, file=file)
        return check(None, "not_pinned", package=package, asked=asked or "")
    judged = [judge_release(measured, version) for version in found]
    told = [
        Reason(c.reason.kind, {**c.reason.values, "file": file})
        for c, file in zip(judged, found.values(), strict=True)
    ]
    return _together([c.met for c in judged], "releases", reasons=told)


def _together(answers: Sequence[bool | None], kind: str, **values: Any) -> Check:
    """Several values of one thing: they decide only if they all decide the same."""
    agree = len(set(answers)) == 1
    return check(answers[0] if agree else None, kind, agree=agree, **values)


def _setting(key: str, test: Callable[[Any], bool | None], note: str = "") -> Callable[[Evidence], Check]:
    """The condition that a setting passes a test; ``note`` names a sentence that is added if it does not."""

    def condition(evidence: Evidence) -> Check:
        found = evidence.settings.get(key, {})
        if not found:
            return check(None, "not_said", setting=key)
        together = _together([test(value) for value in found], "setting", setting=key, found=found)
        return together if together.met or not note else _noted(together, note)

    return condition


def _noted(checked: Check, note: str) -> Check:
    return Check(checked.met, Reason(checked.reason.kind, {**checked.reason.values, "note": note}))


def _three_micro_batches(evidence: Evidence) -> Check:
    """The offload fault drops what is neither first nor last."""
    found = _accumulation(evidence)
    if not found.settings.get("accumulation"):
        return _arithmetic(evidence)
    checked = _setting("accumulation", lambda k: k >= 3)(found)
    if checked.met is False:
        return _noted(checked, "two_drop_nothing" if 2 in found.settings["accumulation"] else "drops_nothing")
    return checked


def _boundary_by_hand(evidence: Evidence) -> Check:
    """It is the training loop that calls it, and no file of a run shows a loop."""
    return check(None, "boundary_not_shown")


def _several_micro_batches(evidence: Evidence) -> Check:
    """A mean of means needs two; without accumulation the mean is surely right only on one process."""
    found = _accumulation(evidence)
    if not found.settings.get("accumulation"):
        return _arithmetic(evidence)
    checked = _setting("accumulation", lambda k: k >= 2)(found)
    if checked.met is False and set(evidence.settings.get("processes", {})) != {1}:
        return Check(None, _noted(checked, "several_not_measured").reason)
    return checked


def _accumulation(evidence: Evidence) -> Evidence:
    """Evidence whose accumulation is worked out from the batch sizes, if only they are given."""
    batch, micro, processes = (evidence.only(k) for k in ("batch_size", "micro_batch_size", "processes"))
    if evidence.settings.get("accumulation") or None in (batch, micro, processes) or not micro * processes:
        return evidence
    steps = max(1, batch // (micro * processes))
    file = f"{batch} / ({micro} × {processes}), {next(iter(evidence.settings['batch_size'].values()))}"
    return Evidence(settings={**evidence.settings, "accumulation": {steps: file}})


def _arithmetic(evidence: Evidence) -> Check:
    """Why the accumulation is not known, and what would decide it."""
    batch, micro = evidence.only("batch_size"), evidence.only("micro_batch_size")
    if batch is None or not micro:
        return check(None, "not_said", setting="accumulation")
    file, most = next(iter(evidence.settings["batch_size"].values())), batch // (3 * micro)
    return check(None, "depends_on_processes", batch=batch, micro=micro, file=file, most=most)


def _trained_by(trainer: str) -> Callable[[Evidence], Check]:
    def condition(evidence: Evidence) -> Check:
        found = evidence.settings.get("trainer", {})
        if not found:
            return check(None, "trainer_not_shown", trainer=trainer)
        return check(trainer in found, "trained_by", found=found)

    return condition


def _own_tokens(evidence: Evidence) -> Check:
    """The default of 5.23.0 averages; of other releases it is not known here."""
    told = evidence.settings.get("average_tokens")
    if not told and set(evidence.versions.get("transformers", {})) == {"5.23.0"}:
        return check(False, "averages_by_default")
    return _setting("average_tokens", lambda on: not on)(evidence)


_RAN = "recovered weights of the real step on a CPU: "
_OFFLOADED = (
    _setting("zero_stage", lambda stage: stage == 2, "only_stage_2"),
    _setting("offload", lambda device: {"cpu": True, "none": False}.get(device), "cpu_and_none"),
)
MEASURED: tuple[Measured, ...] = (
    Measured(
        finding="DeepSpeed ZeRO-2 with an offloaded optimizer drops the intermediate micro-batches",
        package="deepspeed",
        faulty=("0.15.2", "0.18.9"),
        right=("0.15.1", "0.19.0", "0.19.8"),
        conditions=(*_OFFLOADED, _three_micro_batches),
        source=_RAN
        + "0.15.2 and 0.18.9 [1, 0, 0, 1]; 0.15.1, 0.19.0, 0.19.8, stages 1 and 3, no offload: ones",
    ),
    Measured(
        finding="transformers Trainer takes the mean of micro-batch means",
        package="transformers",
        faulty=("4.45.2",),
        right=("5.23.0",),
        conditions=(_trained_by(TRAINER), _several_micro_batches),
        source=_RAN
        + "4.45.2 Llama, tokens 2, 17, 27, 2: [6, .706, .444, 6]; 5.23.0 Llama, GPT-2, Gemma-3: ones",
    ),
    Measured(
        finding="transformers Trainer sums micro-batch means of a model class that takes no loss arguments",
        package="transformers",
        faulty=("4.46.3",),
        right=("5.23.0",),
        conditions=(
            _trained_by(TRAINER),
            _setting("architecture", lambda name: name == "GPT2LMHeadModel" or None, "only_gpt2"),
            _several_micro_batches,
        ),
        source=_RAN
        + "4.46.3 GPT-2, tokens 2, 17, 27, 2: [24, 2.8, 1.8, 24], logged loss right; 5.23.0: ones",
    ),
    Measured(
        finding="transformers Trainer with average_tokens_across_devices off divides by each process's own tokens",
        package="transformers",
        faulty=("5.23.0",),
        right=(),
        conditions=(_trained_by(TRAINER), _own_tokens, _setting("processes", lambda count: count >= 2)),
        source=_RAN + "5.23.0 on 2 processes [.729 ×4, 1.591 ×4]; with the option on: ones",
    ),
    Measured(
        finding="OpenRLHF SFT takes the mean of micro-batch means",
        package="openrlhf",
        faulty=("0.10.2",),
        right=("0.10.4", "0.11.2"),
        conditions=(_trained_by(OPENRLHF_SFT), _several_micro_batches),
        source=_RAN + "0.10.2, tokens 2, 27, 2, 17: [6, .444, 6, .706]; 0.10.4, 0.11.2: ones",
        older_too=True,
    ),
    Measured(
        finding="DeepSpeed ZeRO-2 with an offloaded optimizer keeps only the last micro-batch, in loops that set the "
        "accumulation boundary by hand",
        package="deepspeed",
        faulty=("0.15.1", "0.15.2", "0.18.9"),
        right=("0.19.0", "0.19.8"),
        conditions=(*_OFFLOADED, _boundary_by_hand),
        source=_RAN + "0.15.1, 0.15.2 and 0.18.9 [0, 0, 0, 1]; 0.19.0, 0.19.8: ones",
    ),
    Measured(
        finding="verl's agg_loss takes the mean of micro-batch means",
        package="verl",
        faulty=("0.6.0",),
        right=("0.9.1",),
        conditions=(_several_micro_batches,),
        source=_RAN
        + "its function in a loop of ours, 0.6.0, tokens 2, 27, 3, 17: [6.1, .45, 4.1, .72]; 0.9.1: ones",
    ),
)
