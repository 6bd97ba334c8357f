"""Run the targets of audit_findings.py again, and compare verdicts, faults and weights with the committed results.

    python benchmarks/audit_again.py [--only TEXT ...] [--out FOLDER]

It writes each new result to FOLDER (by default build/audit-again) and skips those that are there. Exits with 1 if a
finding is missing, has another verdict or other kinds of fault, or a weight that differs by more than .01 of the
largest one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit_findings
from stack_data import kinds_of

from truestep.rundir import read_json

CLOSE = 0.01  # of the largest weight


def key_of(finding: dict[str, Any]) -> str:
    """Options that a later version of the audit has added do not tell findings apart."""
    asked = {k: v for k, v in finding["configuration"].items() if k not in ("only", "unused")}
    return f"{finding['subject']} {sorted(asked.items())}"


def kinds(finding: dict[str, Any]) -> list[str]:
    return kinds_of(finding, finding["fault"]) if finding["fault"] else []


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    found = {key_of(f): f for f in new["findings"]}
    for one in old["findings"]:
        key = key_of(one)
        if (two := found.get(key)) is None:
            yield f"{key}: not there"
            continue
        for what, a, b in (("verdict", one["verdict"], two["verdict"]), ("kinds", kinds(one), kinds(two))):
            if a != b:
                yield f"{key}: {what} {a} was, {b} is"
        before, now = ([w for rank in f["weights"] for w in rank] for f in (one, two))
        least = CLOSE * max([1e-9, *map(abs, before)])
        if len(before) != len(now) or any(abs(a - b) > least for a, b in zip(before, now, strict=True)):
            yield f"{key}: weights {one['weights']} were, {two['weights']} are"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="*", default=[""], help="only targets whose name contains a text")
    parser.add_argument("--out", type=Path, default=audit_findings.ROOT / "build/audit-again")
    given = parser.parse_args()
    committed, audit_findings.FOLDER = audit_findings.FOLDER, given.out
    given.out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for name, words in audit_findings.TARGETS.items():
        old, path = committed / f"{name}.json", given.out / f"{name}.json"
        if not old.exists() or not any(text in name for text in given.only):
            continue
        if not path.exists():
            audit_findings.run(name, words)
        told = list(differences(read_json(old), read_json(path))) if path.exists() else ["no result"]
        wrong += len(told)
        print(f"{name}: {'the same' if not told else ''}", *told, sep="\n  " if told else "", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
