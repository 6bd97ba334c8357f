"""Finds the first and last faulty release in a range, and a remedy. No version is hard-coded here.

If both ends are correct, releases between them are tried, the middle one first, until one is faulty. The
search assumes that the faulty releases form one contiguous interval.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truestep.audit.environments import virtual as environment
from truestep.audit.environments.launch import audit_one
from truestep.audit.measure.findings import Verdict
from truestep.audit.subjects import Configuration, Subject
from truestep.errors import UserError
from truestep.redaction import redact

Probe = Callable[[str], bool | None]  # version → whether it is faulty; None if it could not be run


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The result of a search. ``before`` and ``after`` are the nearest correct releases, or "" if none."""

    first_bad: str = ""
    last_bad: str = ""
    before: str = ""
    after: str = ""
    tried: tuple[tuple[str, bool | None], ...] = ()


def search(releases: Sequence[str], probe: Probe, known_bad: str = "") -> Interval:
    """Search the sorted ``releases`` for faulty ones. Raises UserError if ``known_bad`` is not in them."""
    if known_bad and known_bad not in releases:
        wrong = f"--known-bad {known_bad} is not in the range"
        raise UserError(f"{wrong}; pass a release from {releases[0]} to {releases[-1]}")
    seen: dict[int, bool | None] = {}

    def faulty(index: int) -> bool | None:
        if index not in seen:
            seen[index] = probe(releases[index])
        return seen[index]

    last = len(releases) - 1
    ends = [i for i in (0, last) if faulty(i)]
    bad = ends[0] if ends else releases.index(known_bad) if known_bad else _interior(last, faulty)
    found = {}
    if bad is not None and faulty(bad):
        low = 0 if faulty(0) else _edge(bad, 0, faulty)
        high = last if faulty(last) else _edge(bad, last, faulty)
        rights = [i for i, f in seen.items() if f is False]
        before = releases[max((i for i in rights if i < low), default=low)] if low else ""
        after = releases[min((i for i in rights if i > high), default=high)] if high < last else ""
        found = {"first_bad": releases[low], "last_bad": releases[high], "before": before, "after": after}
    return Interval(**found, tried=tuple((releases[i], seen[i]) for i in sorted(seen)))


def _interior(last: int, faulty: Callable[[int], bool | None]) -> int | None:
    """Return a faulty release between two correct ones. The middle is tried first, then the middles of the
    halves, and so on."""
    gaps = [(0, last)]
    while gaps:
        start, stop = gaps.pop(0)
        middle = (start + stop) // 2
        if start < middle < stop:
            if faulty(middle):
                return middle
            gaps += [(start, middle), (middle, stop)]
    return None


def _edge(bad: int, right: int, faulty: Callable[[int], bool | None]) -> int:
    """Return the outermost faulty release between a faulty and a correct one; skip those that cannot run."""
    while abs(right - bad) > 1:
        middle = (bad + right) // 2
        around = sorted(range(min(bad, right) + 1, max(bad, right)), key=lambda i: abs(i - middle))
        answered = next((i for i in around if faulty(i) is not None), None)
        if answered is None:
            return bad
        bad, right = (answered, right) if faulty(answered) else (bad, answered)
    return bad


def parse_range(text: str) -> tuple[str, str]:
    """Return the two ends of a range such as ``0.15.0..0.19.8``. Raises UserError if it is not a range."""
    match = re.fullmatch(r"\s*(\d[\w.]*?)\s*\.\.\s*(\d[\w.]*)\s*", text)
    if not match:
        raise UserError(f"--bisect {text!r} is not a range; pass two versions, such as 0.15.0..0.19.8")
    return match[1], match[2]


def releases_between(python: Path, package: str, first: str, last: str) -> list[str]:
    """Return all final releases between two versions, as listed by the package index. Raises UserError."""
    if _key(first) > _key(last):
        raise UserError(f"--bisect {first}..{last}: the older release must come first; pass {last}..{first}")
    found = _releases(python, package)
    inside = sorted((v for v in found if _key(first) <= _key(v) <= _key(last)), key=_key)
    for end in (first, last):
        if end not in inside:
            raise UserError(f"{package} has no release {end}; pass one of {', '.join(found[:8])} …")
    return inside


def newest_release(python: Path, package: str) -> str:
    """Return the newest final release. Raises UserError if the index has none or does not answer."""
    found = _releases(python, package)
    if not found:
        raise UserError(f"{package}: the package index lists no final release")
    return max(found, key=_key)


def _releases(python: Path, package: str) -> list[str]:
    command = [str(python), "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    listed = re.search(r"Available versions:(.*)", done.stdout)
    if done.returncode or not listed:
        why = redact(done.stderr.strip() or "no answer")[-200:]
        raise UserError(f"cannot list the releases of {package} ({why})")
    return [v.strip() for v in listed[1].split(",") if re.fullmatch(r"\s*\d+(\.\d+)*\s*", v)]


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


# (options to change, the change in words), tried in this order; a change without effect is skipped.
OPTIONS: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"average_tokens_across_devices": True}, "average_tokens_across_devices = true"),
    ({"manual": False}, "let the engine count the micro-batches"),
    ({"offload": False}, "no offload_optimizer"),
)


def remedy(
    subject: Subject, configuration: Configuration, python: Path, target: str, *, timeout: float
) -> str:
    """Return the first change that makes this configuration RIGHT, in words, or "" if none was found.

    ``target`` is the audited requirement, or "" for a user's own environment, where only options are tried.
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
    """Return ``name==newest`` and a Python with that release and the other pins. Return None if the pinned
    release is the newest, or if this fails."""
    try:
        newest = newest_release(Path(sys.executable), name)
        if newest == pins[name]:
            return None
        together = "+".join(f"{k}=={newest if k == name else v}" for k, v in pins.items())
        return f"{name}=={newest}", environment.build(together)
    except (UserError, environment.BuildFailed):
        return None
