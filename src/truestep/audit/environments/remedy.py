"""What would have been right: another option or the newest release, each audited until one is RIGHT."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from truestep.audit.environments import virtual as environment
from truestep.audit.environments.bisect import newest_release
from truestep.audit.environments.launch import audit_one
from truestep.audit.measure.findings import Verdict
from truestep.audit.subjects import Configuration, Subject
from truestep.errors import UserError

# (options that differ, words), in the order in which they are tried where they change anything.
OPTIONS: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"average_tokens_across_devices": True}, "average_tokens_across_devices = true"),
    ({"manual": False}, "let the engine count the micro-batches"),
    ({"offload": False}, "no offload_optimizer"),
)


def find(subject: Subject, configuration: Configuration, python: Path, target: str, *, timeout: float) -> str:
    """The first change that makes this configuration RIGHT, in words; "" where none was found.

    ``target`` is the requirement that was audited, "" for a user's own environment: only options are tried.
    """
    for changes, words in OPTIONS:
        options = configuration.options
        if changed := {k: v for k, v in changes.items() if k in options and options[k] != v}:
            other = replace(configuration, options={**options, **changed}, documented="")
            if audit_one(subject, other, python, timeout=timeout).verdict is Verdict.RIGHT:
                return words
    pins = environment.parse(target) if "==" in target else {}
    for name in reversed(pins):
        if newer := _newer(name, pins):
            upgraded, other_python = newer
            if audit_one(subject, configuration, other_python, timeout=timeout).verdict is Verdict.RIGHT:
                return upgraded
    return ""


def _newer(name: str, pins: Mapping[str, str]) -> tuple[str, Path] | None:
    """``name==newest`` and a python that has it beside the other pins; None if it is not newer or fails."""
    try:
        newest = newest_release(Path(sys.executable), name)
        if newest == pins[name]:
            return None
        together = "+".join(f"{k}=={newest if k == name else v}" for k, v in pins.items())
        return f"{name}=={newest}", environment.build(together)
    except (UserError, environment.BuildFailed):
        return None
