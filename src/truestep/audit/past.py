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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truestep.audit.formats import line
from truestep.audit.past_files import Evidence, gather

TRAINER, OPENRLHF_SFT = "transformers Trainer", "OpenRLHF sft"
MOST_PROBLEMS = 5  # unread files that an answer names
NAMES = {
    "zero_stage": "ZeRO stage",
    "offload": "offload_optimizer",
    "accumulation": "gradient accumulation",
    "processes": "processes",
    "average_tokens": "average_tokens_across_devices",
    "architecture": "model class",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether one condition of a fault was met: True, False, or None where the files do not say."""

    met: bool | None
    reason: str


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
    reasons: tuple[str, ...]
    source: str


def look_back(folder: Path) -> list[Answer]:
    """One answer a measured fault, in the order of ``MEASURED``. Raises UserError where there is no such
    folder."""
    evidence = gather(folder)
    return [answer(measured, evidence) for measured in MEASURED]


def answer(measured: Measured, evidence: Evidence) -> Answer:
    """The conjunction of the release and all conditions."""
    checks = [_release_check(measured, evidence), *(condition(evidence) for condition in measured.conditions)]
    verdict: Literal["affected", "not affected", "unknown"]
    if any(c.met is False for c in checks):
        verdict, told = "not affected", [c.reason for c in checks if c.met is False]
    elif all(c.met for c in checks):
        verdict, told = "affected", [c.reason for c in checks]
    else:
        unmet = [c.reason for c in checks if c.met is None]
        verdict, told = (
            "unknown",
            [*unmet, *evidence.problems[:MOST_PROBLEMS], *(c.reason for c in checks if c.met)],
        )
        if len(evidence.problems) > MOST_PROBLEMS:
            told.append(f"and {len(evidence.problems) - MOST_PROBLEMS} more files could not be read")
    # File names and versions come from whoever made the files.
    reasons = tuple(line(text, 500) for text in told)
    return Answer(finding=measured.finding, answer=verdict, reasons=reasons, source=measured.source)


# --------------------------------------------------------------------------------------------------- releases


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
    name = f"{measured.package} {version}"
    own = release(version)
    if own is None:
        return Check(met=None, reason=f"{name} is no release, and was not measured")
    points = sorted(
        (release(v) or (), v, faulty) for faulty in (True, False) for v in _releases(measured, faulty)
    )
    for numbers, _, faulty in points:
        if numbers == own:
            return Check(met=faulty, reason=f"{name} was measured: {_word(faulty)}")
    below, above = [p for p in points if p[0] < own], [p for p in points if p[0] > own]
    if not below:
        _, oldest, faulty = above[0]
        if faulty and measured.older_too:
            return Check(
                met=True, reason=f"{name} by inference: older than {oldest}, which was measured faulty"
            )
        return Check(met=None, reason=f"{name} is older than {oldest}, the oldest that was measured")
    _, low, low_faulty = below[-1]
    if not above:
        return Check(
            met=None, reason=f"{name} is newer than {low} ({_word(low_faulty)}), the newest that was measured"
        )
    _, high, high_faulty = above[0]
    if low_faulty == high_faulty:
        word = _word(low_faulty)
        return Check(
            met=low_faulty, reason=f"{name} by inference: between {low} and {high}, both measured {word}"
        )
    between = f"{low} ({_word(low_faulty)}) and {high} ({_word(high_faulty)})"
    return Check(met=None, reason=f"{name} was not measured: it lies between {between}")


def _releases(measured: Measured, faulty: bool) -> tuple[str, ...]:
    return measured.faulty if faulty else measured.right


def _word(faulty: bool) -> str:
    return "faulty" if faulty else "right"


def _release_check(measured: Measured, evidence: Evidence) -> Check:
    found = evidence.versions.get(measured.package, {})
    if not found:
        asked = evidence.ranges.get(measured.package)
        if evidence.complete and not asked:
            file, size = next(iter(evidence.complete.items()))
            return Check(met=False, reason=f"{measured.package} is not among the {size} packages of {file}")
        more = f" ({asked})" if asked else ""
        return Check(met=None, reason=f"no file pins the version of {measured.package}{more}")
    judged = [judge_release(measured, version) for version in found]
    told = "; ".join(f"{c.reason} ({file})" for c, file in zip(judged, found.values(), strict=True))
    return _together([c.met for c in judged], told)


def _together(answers: Sequence[bool | None], told: str) -> Check:
    """Several values of one thing: they decide only if they all decide the same."""
    if len(set(answers)) == 1:
        return Check(met=answers[0], reason=told)
    return Check(met=None, reason=f"the files contradict each other: {told}")


# ------------------------------------------------------------------------------------------------- conditions


def _setting(key: str, test: Callable[[Any], bool | None], note: str = "") -> Callable[[Evidence], Check]:
    """The condition that a setting passes a test; ``note`` is added where it does not."""

    def check(evidence: Evidence) -> Check:
        found = evidence.settings.get(key, {})
        if not found:
            return Check(met=None, reason=f"{NAMES[key]}: no file says")
        answers = [test(value) for value in found]
        told = ", ".join(f"{value} ({file})" for value, file in found.items())
        checked = _together(answers, f"{NAMES[key]} {told}")
        return (
            checked if checked.met or not note else Check(met=checked.met, reason=f"{checked.reason}; {note}")
        )

    return check


def _three_micro_batches(evidence: Evidence) -> Check:
    """The offload fault drops what is neither first nor last."""
    found = _accumulation(evidence)
    checked = _setting("accumulation", lambda k: k >= 3)(found)
    if checked.met is False:
        two = 2 in found.settings["accumulation"]
        note = (
            "with 2 the first and the last are all there is, and nothing is dropped"
            if two
            else "nothing is dropped"
        )
        return Check(met=False, reason=f"{checked.reason}: {note}")
    return checked if found.settings.get("accumulation") else Check(met=None, reason=_arithmetic(evidence))


def _boundary_by_hand(evidence: Evidence) -> Check:
    """It is the training loop that calls it, and no file of a run shows a loop."""
    return Check(
        met=None, reason="no file shows whether the loop calls set_gradient_accumulation_boundary itself"
    )


def _several_micro_batches(evidence: Evidence) -> Check:
    """A mean of means needs two of them; without accumulation only one process makes the mean surely
    right."""
    found = _accumulation(evidence)
    if not found.settings.get("accumulation"):
        return Check(met=None, reason=_arithmetic(evidence))
    checked = _setting("accumulation", lambda k: k >= 2)(found)
    if checked.met is False and set(evidence.settings.get("processes", {})) != {1}:
        text = f"{checked.reason}: right on one process; on several nothing was measured without accumulation"
        return Check(met=None, reason=text)
    return checked


def _accumulation(evidence: Evidence) -> Evidence:
    """Evidence whose accumulation is worked out from the batch sizes, where only they are given."""
    batch, micro, processes = (evidence.only(k) for k in ("batch_size", "micro_batch_size", "processes"))
    if evidence.settings.get("accumulation") or None in (batch, micro, processes) or not micro * processes:
        return evidence
    steps = max(1, batch // (micro * processes))
    file = f"{batch} / ({micro} × {processes}), {next(iter(evidence.settings['batch_size'].values()))}"
    return Evidence(settings={**evidence.settings, "accumulation": {steps: file}})


def _arithmetic(evidence: Evidence) -> str:
    """Why the accumulation is not known, and what would decide it."""
    batch, micro = evidence.only("batch_size"), evidence.only("micro_batch_size")
    if batch is None or not micro:
        return "gradient accumulation: no file says"
    file = next(iter(evidence.settings["batch_size"].values()))
    most = batch // (3 * micro)
    return f"gradient accumulation is {batch} / ({micro} × processes) ({file}): 3 or more on up to {most} processes"


def _trained_by(trainer: str) -> Callable[[Evidence], Check]:
    def check(evidence: Evidence) -> Check:
        found = evidence.settings.get("trainer", {})
        told = ", ".join(f"{name} ({file})" for name, file in found.items())
        if not found:
            return Check(met=None, reason=f"no file shows whether the {trainer} was used")
        return Check(met=trainer in found, reason=f"trained by {told}")

    return check


def _own_tokens(evidence: Evidence) -> Check:
    """The default of 5.23.0 averages; of other releases it is not known here."""
    if not evidence.settings.get("average_tokens") and set(evidence.versions.get("transformers", {})) == {
        "5.23.0"
    }:
        return Check(
            met=False, reason="average_tokens_across_devices is set nowhere; 5.23.0 averages by default"
        )
    return _setting("average_tokens", lambda on: not on)(evidence)


# ------------------------------------------------------------------------------------------ what was measured

_RAN = "recovered weights of the real step on a CPU: "
_OFFLOADED = (
    _setting("zero_stage", lambda stage: stage == 2, "only stage 2 was measured faulty"),
    _setting(
        "offload", lambda device: {"cpu": True, "none": False}.get(device), "measured with cpu and none"
    ),
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
            _setting(
                "architecture", lambda name: name == "GPT2LMHeadModel" or None, "only GPT-2 was measured"
            ),
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
        finding="DeepSpeed ZeRO-2 with an offloaded optimizer keeps the last micro-batch alone, in loops that set the "
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
