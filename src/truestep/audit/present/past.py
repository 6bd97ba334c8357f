"""Answers about past runs and lock files, and the measured faults themselves, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from truestep.audit.measure.findings import Cause
from truestep.audit.postmortem.answers import Answer
from truestep.audit.postmortem.measured import (
    BOUNDARY,
    CLASSES,
    DEFAULT,
    KEYS,
    Measured,
    Measurement,
    Need,
    numbers,
)
from truestep.audit.present.words import SENTENCES, Form, Row, line, number, sentence

SETTINGS = {
    "zero_stage": "ZeRO stage", "offload": "offload_optimizer", "accumulation": "gradient accumulation",
    "processes": "processes", "average_tokens": "average_tokens_across_devices", "architecture": "model class",
    "assistant_only": "assistant_only_loss",
}  # fmt: skip
_WORD = {True: "faulty", False: "correct"}
_CLASS = {arch: name for name, arch in CLASSES.items()}
_VALUES: Mapping[tuple[str, Any], str] = {
    ("offload", True): "cpu", ("offload", False): "none", ("processes", 1): "1", ("processes", 2): "2 or more",
    **{("arch", arch): name for arch, name in _CLASS.items()},
}  # fmt: skip


def value_in_words(key: str, value: Any) -> str:
    """Return the value of a configuration's key as files show it."""
    known = {True: "true", False: "false"} if isinstance(value, bool) else {DEFAULT: "the default"}
    return _VALUES.get((key, value)) or known.get(value) or str(value)


def values_in_words(key: str, values: Iterable[Any]) -> str:
    return " or ".join(sorted(value_in_words(key, value) for value in values))


def name_of(key: str) -> str:
    return SETTINGS.get(KEYS[key].setting, key.replace("_", " "))


def _setting_is(key: str, values: Iterable[Any]) -> str:
    counted = f"there are {values_in_words(key, values)} processes" if key == "processes" else ""
    return counted or f"{name_of(key)} is {values_in_words(key, values)}"


def _found(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} ({file})" for value, file in values["found"].items())


def _together(values: Mapping[str, Any], told: str) -> str:
    return told if values["agree"] else f"the files contradict each other: {told}"


def _only_measured(values: Mapping[str, Any]) -> str:
    known = [*values["faulty"], *values["right"]]
    return f"; only {values_in_words(values['key'], known)} was measured"


NOTES: dict[str, Form] = {
    "only_faulty": lambda v: (
        f"; only {values_in_words(v['key'], v['faulty'])} was found faulty when measured"
    ),
    "only_measured": _only_measured,
    "too_few_steps": "; the fault needs {least} or more micro-batches per step",
    "single_wrong": lambda v: (
        "; with several processes, steps of one micro-batch were also found faulty when measured "
        f"({', '.join(str(SENTENCES[kind]) for kind in v['kinds'])})"
    ),
}
_NAME = "{package} {version}"
REASONS: dict[str, Form] = {
    "said": "{text}",
    "more_unread": "and {files} more files could not be read",
    "no_release": _NAME + " is not a release, so it was not measured",
    "measured": lambda v: f"{v['package']} {v['version']} was measured: {_WORD[v['faulty']]}",
    "older": lambda v: f"{v['package']} {v['version']} is older than {v['oldest']} ({_WORD[v['faulty']]}), the oldest "
    "release that was measured",
    "newer": lambda v: f"{v['package']} {v['version']} is newer than {v['newest']} ({_WORD[v['faulty']]}), the newest "
    "release that was measured",
    "between_alike": lambda v: f"{v['package']} {v['version']} is inferred to be {_WORD[v['faulty']]}: it is "
    f"between {v['low']} and {v['high']}, which were both found {_WORD[v['faulty']]} when measured",
    "between_different": lambda v: f"{v['package']} {v['version']} was not measured; it is between {v['low']} "
    f"({_WORD[v['faulty']]}) and {v['high']} ({_WORD[not v['faulty']]})",
    "not_in_environment": "{package} is not among the {packages} packages in {file}",
    "not_pinned": lambda v: f"no file pins the version of {v['package']}" + (f" ({v['asked']})" if v["asked"] else ""),
    "releases": lambda v: _together(v, "; ".join(map(reason_in_words, v["reasons"]))),
    "setting": lambda v: _together(v, f"{SETTINGS.get(v['setting'], v['setting'])} {_found(v)}") + _note(v),
    "not_said": lambda v: f"if {_setting_is(v['key'], v['wanted'])} (not given in any file)",
    "steps_not_said": "if gradient accumulation is {least} or more (not given in any file)",
    "option_not_shown": lambda v: f"if {v['key'].replace('_', ' ')} is {values_in_words(v['key'], v['wanted'])} (no file "
    "shows it)",
    "boundary_not_shown": "if the loop calls set_gradient_accumulation_boundary itself (no file shows it)",
    "window_not_shown": "if the micro-batches of an epoch are not a multiple of those of a step (no file shows it)",
    "depends_on_processes": "if there are at most {most} processes: gradient accumulation is {batch} / ({micro} × "
    "processes) ({file}), and the fault needs {least} or more micro-batches per step",
    "trainer_not_shown": "if it was trained by {trainer} (not shown in any file)",
    "trained_by": lambda v: f"trained by {_found(v)}",
    "default_used": lambda v: f"{name_of(v['key'])} is not set in any file; the default of "
    f"{v['package']} {v['version']} was measured",
}  # fmt: skip


def _note(values: Mapping[str, Any]) -> str:
    form = NOTES.get(values.get("note", ""), "")
    return form.format(**values) if isinstance(form, str) else form(values)


def reason_in_words(reason: Cause) -> str:
    file = f" ({reason.values['file']})" if {"version", "file"} <= reason.values.keys() else ""
    return sentence(reason, REASONS) + file


def plain_sentence(kind: str) -> str:
    """Return the sentence of a kind of cause, or "" if it needs numbers."""
    form = SENTENCES.get(kind)
    return form if isinstance(form, str) and "{" not in form else ""


def kinds_in_words(kinds: Iterable[str]) -> str:
    return ", and ".join(plain_sentence(kind) or kind.replace("_", " ") for kind in kinds)


def fault_in_words(measured: Measured) -> str:
    """Return what goes wrong, as in docs/findings.md if a result shows only this fault."""
    same = (m.fault for m in measured.shown if m.kinds == measured.kinds)
    return next(same, "") or kinds_in_words(measured.kinds)


def need_in_words(need: Need) -> str:
    if need.key == BOUNDARY:
        return "a loop that sets the accumulation boundary itself"
    if need.key == "processes":
        return "1 process" if need.faulty == {1} else "2 or more processes"
    return f"{name_of(need.key)} {values_in_words(need.key, need.faulty)}"


def conditions_in_words(measured: Measured) -> list[str]:
    """Return the conditions under which the fault occurs, apart from the release."""
    told = [need_in_words(need) for need in measured.needs]
    if measured.least > 1:
        told.append(f"{measured.least} or more micro-batches per step")
    if measured.hidden:
        told.append("an epoch whose micro-batches are not a multiple of those of a step")
    return told


def title(measured: Measured) -> str:
    """Return the fault with its conditions in one line."""
    return f"{measured.subject}: {fault_in_words(measured)} ({', '.join(conditions_in_words(measured))})"


def releases_in_words(measured: Measured) -> str:
    """Return the faulty releases as ranges between which no release was right, such as "0.15.2 to 0.18.9"."""
    points = sorted([(numbers(v), v, v in measured.faulty) for v in (*measured.faulty, *measured.right)])
    runs: list[list[str]] = []
    for (_, version, faulty), before in zip(points, [(None, "", False), *points], strict=False):
        if faulty and before[2]:
            runs[-1].append(version)
        elif faulty:
            runs.append([version])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def fixes(measured: Measured) -> list[str]:
    """Return the changes after which the same step was measured and was right."""
    told = [f"{measured.package} {', '.join(measured.newer)}"] * bool(measured.newer)
    options = {m.remedy: m.version for m in measured.shown if m.changes}
    told += [f"{remedy} (measured with {measured.package} {version})" for remedy, version in options.items()]
    return told + [
        f"{name_of(need.key)} {values_in_words(need.key, need.right)}"
        for need in measured.needs
        if not told and need.right and need.key == measured.needs[0].key
    ]


def weights_in_words(measurement: Measurement) -> str:
    return " | ".join(f"[{', '.join(number(w) for w in rank)}]" for rank in measurement.weights)


def source(measured: Measured) -> str:
    """Return the weights of one process of every faulty release, and the right releases."""
    first = {m.version: m for m in reversed(measured.shown)}
    told = [
        f"{version} {weights_in_words(first[version])}" for version in measured.faulty if version in first
    ]
    others = [version for version in measured.faulty if version not in first]
    told += [f"also faulty: {', '.join(others)}"] * bool(others) + [
        f"correct: {', '.join(measured.right) or 'none found'}"
    ]
    return f"recovered weights of the real step on a CPU: {measured.package} {'; '.join(told)}"


def is_absent(answer: Answer) -> bool:
    """Check whether no file names the package of the fault."""
    return any("not_pinned" in r.kinds and not r.values["asked"] for r in answer.reasons)


def answer_row(answer: Answer) -> Row:
    """Return an answer with its reasons as text. File names and versions come from untrusted files."""
    measured = answer.measured
    return {
        "finding": title(measured),
        "answer": answer.answer,
        "reasons": [line(reason_in_words(reason), 500) for reason in answer.reasons],
        "source": source(measured),
        "package": measured.package,
        "faulty": list(measured.faulty),
        "right": list(measured.right),
        "conditions": conditions_in_words(measured),
        "fixes": fixes(measured),
        "links": list(measured.links),
        "evidence": list(dict.fromkeys(m.file for m in (*measured.shown, *measured.bisected))),
    }
