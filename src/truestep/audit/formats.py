"""Findings in words and in files: the JSON document, JUnit XML and SARIF 2.1.0.

Names of subjects, faults and reasons come from audited programs: nothing in them may break a format or a
terminal.
"""

from __future__ import annotations

import enum
import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from truestep import __version__
from truestep.audit.judge import Finding, Verdict
from truestep.errors import UserError
from truestep.rundir import redact

SCHEMA = 1
SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
NONE = "–"
# control, format (bidi overrides, zero width), surrogate, private and unassigned characters
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Row = Mapping[str, Any]  # a finding as ``to_json`` gives it

# ------------------------------------------------------------------------------------------------------ words


def visible(text: object) -> str:
    """Text whose every character shows, and that XML allows: what would not becomes its number."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE else f"⟨U+{ord(c):04X}⟩"
        for c in str(text)
    )


def line(text: object, limit: int = 400) -> str:
    """One visible line of at most ``limit`` characters."""
    shown = " ".join(visible(redact(str(text))).split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def number(value: Any) -> str:
    """Three digits; what is nearly 0 or 1 is written so."""
    if not isinstance(value, int | float):
        return NONE
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def small(value: Any) -> str:
    """A relative size of any magnitude: 0.69, 2e-06."""
    if not isinstance(value, int | float):
        return NONE
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-2 or not math.isfinite(value) else f"{value:.0e}"


def configuration_in_words(configuration: Row) -> str:
    """E.g. ZeRO-2, offload cpu, accumulation 4, 2 processes, float32; keys that nobody foresaw as they
    are."""
    parts = []
    for key, value in configuration.items():
        name = line(key, 60).replace("_", " ")
        if value is None or value == "":
            continue
        if key == "zero_stage":
            parts.append(f"ZeRO-{line(value, 20)}")
        elif key in ("world_size", "processes"):
            parts.append("1 process" if value == 1 else f"{line(value, 20)} processes")
        elif key in ("dtype", "arch"):
            parts.append(line(value, 60))
        elif key == "optimizer":
            parts.append({"sgd": "SGD", "adamw": "AdamW"}.get(str(value), line(value, 60)))
        elif isinstance(value, bool):
            parts.append(name if value else f"no {name}")
        elif isinstance(value, list | tuple):
            parts.append(f"{name} {' '.join(line(v, 60) for v in value)}")
        else:
            parts.append(f"{name} {number(value) if isinstance(value, float) else line(value, 120)}")
    return ", ".join(parts) or "as it comes"


def versions_in_words(row: Row) -> str:
    """The packages that the subject names, else all but torch; torch last."""
    versions: Mapping[str, Any] = row.get("versions") or {}
    named = [n for n in versions if n != "torch" and n.lower() in str(row.get("subject")).lower()]
    others = [n for n in versions if n != "torch" and n not in named]
    order = [*named, *others, *(n for n in versions if n == "torch")]
    return ", ".join(f"{line(n, 40)} {line(versions[n], 40)}" for n in order)


def found_in_words(row: Row) -> str:
    """What was found, or why nothing was."""
    if is_right(row):
        return line(
            "every token counts once" + (f"; not seen: {row['reason']}" if row.get("reason") else ""), 600
        )
    return line(row.get("fault") or row.get("reason") or "", 600)


def loss_in_words(row: Row) -> str:
    """Whether who watches the logged loss could have seen it."""
    could = row.get("logged_loss_could_show_it")
    if could is None:
        return "no loss was logged for this step, so it could not have shown it"
    values = (
        f"the logged loss is {_loss(row.get('logged_loss'))}, the right one {_loss(row.get('true_loss'))}"
    )
    return f"{values}: {'it could have shown it' if could else 'it could not have shown it'}"


def _loss(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else NONE


def is_right(row: Row) -> bool:
    return row.get("verdict") == Verdict.RIGHT


def by_rank(row: Row, key: str) -> list[list[Any]]:
    """``weights`` or ``tokens`` of each rank; [] where there are none."""
    return [list(rank) for rank in row.get(key) or []]


def as_text(row: Row) -> str:
    """A finding as a few plain lines."""
    lines = [found_in_words(row)]
    for key in ("tokens", "weights"):
        ranks = [", ".join(map(number, rank)) for rank in by_rank(row, key)]
        if ranks:
            lines.append(f"{key} per micro-batch: {' | '.join(ranks)}")
    if row.get("relative_error") is not None:
        lines.append(f"relative error {small(row['relative_error'])}, residual {small(row.get('residual'))}")
        if not is_right(row):
            lines.append(loss_in_words(row))
    if row.get("remedy"):
        lines.append(f"remedy: {line(row['remedy'])}")
    if row.get("reproducer"):
        lines.append(f"reproducer: {line(row['reproducer'])}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- JSON


def to_document(findings: Sequence[Finding], provenance: Row) -> dict[str, Any]:
    """The whole audit as one JSON object. Numbers that JSON does not know are the strings NaN and
    ±Infinity."""
    document = {
        "schema": SCHEMA,
        "tool": {"name": "truestep", "version": __version__},
        "provenance": dict(provenance),
        "findings": [f.to_json() for f in findings],
    }
    plain: dict[str, Any] = _plain(document)
    return plain


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


def from_document(document: Any, name: str = "document") -> list[Finding]:
    """The findings of a document; fields that this version does not know are left out.

    Raises UserError naming ``name``, the row and the field.
    """
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        got = document.get("schema") if isinstance(document, Mapping) else type(document).__name__
        raise UserError(
            f"{name}: schema: expected {SCHEMA}, got {got!r}; give what truestep audit --json wrote"
        )
    rows = document.get("findings")
    if not isinstance(rows, list):
        raise UserError(f"{name}: findings: expected a list; give what truestep audit --json wrote")
    return [_finding(row, f"{name}: findings row {number}") for number, row in enumerate(rows, 1)]


def _finding(row: Any, where: str) -> Finding:
    for key, kind in (("subject", str), ("configuration", Mapping), ("verdict", str)):
        if not isinstance(row, Mapping) or not isinstance(row.get(key), kind):
            expected = "an object" if kind is Mapping else "a text"
            raise UserError(f"{where}: {key}: expected {expected}; run the audit again")
    try:
        verdict = Verdict(row["verdict"])
    except ValueError:
        raise UserError(f"{where}: verdict: {row['verdict']!r}: write one of {', '.join(Verdict)}") from None
    known = {f.name for f in fields(Finding)} - {"verdict"}
    return Finding(verdict=verdict, **{k: _numbers(v) for k, v in row.items() if k in known})


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------------ JUnit


def to_junit(findings: Sequence[Finding]) -> str:
    """A FAULT is a failure; what gave no answer is skipped, with the reason; anything else has passed."""
    rows = [f.to_json() for f in findings]
    suite = ElementTree.Element("testsuite", name="truestep audit", tests=str(len(rows)))
    counts = {"failures": 0, "errors": 0, "skipped": 0}
    for row in rows:
        seconds = f"{sum(v for v in (row.get('seconds') or {}).values() if isinstance(v, int | float)):.3f}"
        name = configuration_in_words(row["configuration"])
        case = ElementTree.SubElement(
            suite, "testcase", classname=line(row["subject"]), name=name, time=seconds
        )
        verdict = row["verdict"]
        if verdict == Verdict.FAULT:
            counts["failures"] += 1
            failure = ElementTree.SubElement(case, "failure", message=found_in_words(row), type=verdict)
            failure.text = as_text(row)
        elif verdict in (Verdict.NOT_RUN, Verdict.NOT_OBSERVABLE, Verdict.WITHIN_NOISE):
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=f"{verdict}: {found_in_words(row)}")
        else:
            ElementTree.SubElement(case, "system-out").text = f"{verdict}: {as_text(row)}"
    suite.attrib |= {key: str(count) for key, count in counts.items()}
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


# ------------------------------------------------------------------------------------------------------ SARIF

_LEVELS = {Verdict.FAULT: "error", Verdict.DEFAULT: "note", Verdict.DOCUMENTED_CHOICE: "note"}


def to_sarif(findings: Sequence[Finding]) -> dict[str, Any]:
    """One rule a kind of fault. What gave no answer is a notification of the run, not a result."""
    rows = [f.to_json() for f in findings]
    told = [row for row in rows if row["verdict"] in _LEVELS]
    rules = {rule_of(row): _rule_text(row) for row in reversed(told)}
    unanswered = [row for row in rows if row["verdict"] not in _LEVELS and not is_right(row)]
    return {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "truestep",
                        "version": __version__,
                        "rules": [
                            {"id": i, "shortDescription": {"text": text}} for i, text in sorted(rules.items())
                        ],
                    }
                },
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "toolExecutionNotifications": [
                            {"level": "warning", "message": {"text": _sarif_text(row, f"{row['verdict']}: ")}}
                            for row in unanswered
                        ],
                    }
                ],
                "results": [_sarif_result(row, sorted(rules)) for row in told],
            }
        ],
    }


def rule_of(row: Row) -> str:
    """The kind of a fault: its main code, or its words without numbers and without what stands in
    brackets."""
    codes = row.get("codes") or [_rule_text(row)]
    words = re.findall(r"[a-z0-9]+" if row.get("codes") else r"[a-z]+", str(codes[0]).lower())
    return "-".join(words)[:80].rstrip("-") or "unnamed"


def _rule_text(row: Row) -> str:
    text = re.sub(r"\s*(\([^()]*\)|\[[^\[\]]*\])", "", found_in_words(row)).partition(";")[0]
    return text.strip() or "unnamed"


def _sarif_text(row: Row, lead: str = "") -> str:
    text = f"{lead}{line(row['subject'])} ({configuration_in_words(row['configuration'])}): {as_text(row)}"
    return text.replace("](", "] (")  # would be a link


def _sarif_result(row: Row, rules: list[str]) -> dict[str, Any]:
    rule = rule_of(row)
    identity = repr((rule, row["subject"], sorted((str(k), str(v)) for k, v in row["configuration"].items())))
    place: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": line(row["subject"]), "kind": "module"}]
    }
    where = location_of(row)
    if where:
        file, number_of_line = where
        place["physicalLocation"] = {
            "artifactLocation": {"uri": file},
            "region": {"startLine": number_of_line},
        }
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "level": _LEVELS[row["verdict"]],
        "message": {"text": _sarif_text(row)},
        "locations": [place],
        "partialFingerprints": {
            "truestepFinding/v1": hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()
        },
        "properties": _plain(
            {key: row.get(key) for key in ("versions", "weights", "relative_error", "residual")}
        ),
    }


def location_of(row: Row) -> tuple[str, int] | None:
    """(URI, line from 1) of a finding's ``location``: {file, line}, [file, line] or "file:line"."""
    where = row.get("location")
    if isinstance(where, Mapping):
        file, at = where.get("file") or where.get("path"), where.get("line")
    elif isinstance(where, list | tuple) and where:
        file, at = where[0], where[1] if len(where) > 1 else 1
    else:
        file, _, at = str(where or "").rpartition(":")
        if not at.isdecimal():
            file, at = where, "1"
    if not file:
        return None
    path = PurePath(line(file, 1000))
    uri = Path(path).as_uri() if path.is_absolute() else quote(path.as_posix())
    return uri, max(1, int(str(at))) if re.fullmatch(r"\d{1,9}", str(at)) else 1
