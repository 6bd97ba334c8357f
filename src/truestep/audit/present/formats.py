"""Converts findings into the JSON document, JUnit XML and SARIF 2.1.0."""

from __future__ import annotations

import enum
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from truestep import __version__
from truestep.audit.measure.findings import Verdict
from truestep.audit.present.words import Row, as_text, configuration_in_words, found_in_words, is_right, line
from truestep.rundir import redact

SCHEMA = 1
SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def to_document(rows: Sequence[Row], provenance: Row) -> dict[str, Any]:
    """Return the audit as one JSON object. Numbers that JSON lacks become the strings NaN and ±Infinity."""
    tool = {"name": "truestep", "version": __version__}
    return _plain({"schema": SCHEMA, "tool": tool, "provenance": provenance, "findings": rows})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_text(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or (isinstance(value, bool | int) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return _text(str(value))


def _text(text: str) -> str:
    return redact(text).encode("utf-8", "backslashreplace").decode()  # a lone surrogate has no encoding


def to_junit(rows: Sequence[Row]) -> str:
    """Return JUnit XML. A FAULT is a failure, a finding without an answer is skipped, and all others pass."""
    suite = ElementTree.Element("testsuite", name="truestep audit", tests=str(len(rows)))
    counts = {"failures": 0, "errors": 0, "skipped": 0}
    for row in rows:
        seconds = f"{sum(v for v in (row.get('seconds') or {}).values() if isinstance(v, int | float)):.3f}"
        name = configuration_in_words(row["configuration"])
        about = {"classname": line(row["subject"]), "name": name, "time": seconds}
        case, verdict = ElementTree.SubElement(suite, "testcase", about), row["verdict"]
        if verdict == Verdict.FAULT:
            counts["failures"] += 1
            failure = ElementTree.SubElement(case, "failure", message=found_in_words(row), type=verdict)
            failure.text = as_text(row)
        elif verdict in (Verdict.NOT_RUN, Verdict.NOT_OBSERVABLE):
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=f"{verdict}: {found_in_words(row)}")
        else:
            ElementTree.SubElement(case, "system-out").text = f"{verdict}: {as_text(row)}"
    suite.attrib |= {key: str(count) for key, count in counts.items()}
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


_LEVELS = {Verdict.FAULT: "error", Verdict.DEFAULT: "note", Verdict.DOCUMENTED_CHOICE: "note"}


def to_sarif(rows: Sequence[Row]) -> dict[str, Any]:
    """Return SARIF with one rule per kind of fault. Findings without an answer become notifications."""
    told = [row for row in rows if row["verdict"] in _LEVELS]
    rules = sorted({rule_of(row) for row in told})
    unanswered = [row for row in rows if row["verdict"] not in _LEVELS and not is_right(row)]
    notes = [_sarif_text(row, f"{row['verdict']}: ") for row in unanswered]
    notifications = [{"level": "warning", "message": {"text": text}} for text in notes]
    described = [{"id": r, "shortDescription": {"text": r.replace("-", " ")}} for r in rules]
    run = {
        "tool": {"driver": {"name": "truestep", "version": __version__, "rules": described}},
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notifications}],
        "results": [_sarif_result(row, rules) for row in told],
    }
    return {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def rule_of(row: Row) -> str:
    """Return the kind of a fault, which is its main code."""
    code = str((row.get("codes") or ["unnamed"])[0]).lower()
    return "-".join(re.findall(r"[a-z0-9]+", code))[:80] or "unnamed"


def _sarif_text(row: Row, lead: str = "") -> str:
    text = f"{lead}{line(row['subject'])} ({configuration_in_words(row['configuration'])}): {as_text(row)}"
    return text.replace("](", "] (")  # would become a link


def _sarif_result(row: Row, rules: list[str]) -> dict[str, Any]:
    rule = rule_of(row)
    identity = repr((rule, row["subject"], sorted((str(k), str(v)) for k, v in row["configuration"].items())))
    digest = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()
    name = {"fullyQualifiedName": line(row["subject"]), "kind": "module"}
    place: dict[str, Any] = {"logicalLocations": [name]}
    if where := location_of(row):
        region = {"startLine": where[1]}
        place["physicalLocation"] = {"artifactLocation": {"uri": where[0]}, "region": region}
    shown = {key: row.get(key) for key in ("versions", "weights", "relative_error", "residual")}
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "level": _LEVELS[row["verdict"]],
        "message": {"text": _sarif_text(row)},
        "locations": [place],
        "partialFingerprints": {"truestepFinding/v1": digest},
        "properties": _plain(shown),
    }


def location_of(row: Row) -> tuple[str, int] | None:
    """Return (URI, line counted from 1) of a finding's ``location``, which is FILE:LINE or FILE."""
    where = str(row.get("location") or "")
    file, _, at = where.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,9}", at):
        file, at = where, "1"
    if not file:
        return None
    path = PurePath(line(file, 1000))
    return Path(path).as_uri() if path.is_absolute() else quote(path.as_posix()), max(1, int(at))
