"""Write the measured steps that ``truestep audit --past`` uses, and docs/stack/, from results/audit/.

    python benchmarks/stack.py [--check]

With ``--check``, no file is written, and the exit code is 1 if one is out of date. A configuration's key, a
subject or a fault that the tables do not have is an error that says which table to extend.
Held by: tests/audit/test_stack_pages.py
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import stack_pages

from truestep.audit import subjects
from truestep.audit.environments.releases import OPTIONS
from truestep.audit.postmortem import measured
from truestep.audit.present.words import SENTENCES
from truestep.rundir import read_json, write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BISECTED = ROOT / "results/audit", ROOT / "results/audit-bisect"
CHANGES = {words: changes for changes, words in OPTIONS}
# Results that were stored before causes were: how a part of the sentence begins → the cause's kind.
OLDER = (
    ("every backward overwrites", "kept_last"),
    ("steps were taken after", "step_sizes"),
    ("data is lost", "rows_lost"),
    ("mean of micro-batch means instead", "micro_mean"),
    ("sum of micro-batch means", "accumulation_missing"),
)


class Incomplete(ValueError):
    """A table has no row for something that was measured."""


def kinds_of(row: dict[str, Any], text: str) -> list[str]:
    """Return the kinds of a fault's causes; if the result has only ``text``, read them from its parts."""
    if row.get("causes") and text == row["fault"]:
        return list(dict.fromkeys(kind for cause in row["causes"] for kind in cause["kinds"]))
    by_text = {form: kind for kind, form in SENTENCES.items() if isinstance(form, str)}
    found = []
    for part in re.split(r"; |, and ", re.sub(r" \((?:not in every step|\w+ = \w+)\)$", "", text)):
        kind = by_text.get(part) or next((kind for begin, kind in OLDER if part.startswith(begin)), "")
        if not kind:
            raise Incomplete(
                f"{row['subject']}: {part!r} is not a sentence of present/words.py; add its kind to OLDER"
            )
        found.append(kind)
    return found


def measurements() -> Iterator[dict[str, Any]]:
    """Yield one row per audited configuration, then those of bisections."""
    rows = [row for path in sorted(RESULTS.glob("*.json")) for row in _of_document(path)]
    yield from rows
    for path in sorted(BISECTED.glob("*.json")):
        yield from _of_bisection(path, rows)


def _of_document(path: Path) -> Iterator[dict[str, Any]]:
    document = read_json(path)
    for row in document["findings"]:
        wrong = row["verdict"] in measured.FAULTY
        unknown = [key for key in row["configuration"] if key not in measured.KEYS and key != measured.HIDES]
        if unknown:
            raise Incomplete(
                f"{path.name}: add how a run's files show {unknown[0]!r} to KEYS in postmortem/measured.py"
            )
        if wrong and row["subject"].split(" + ")[0] not in measured.TRAINERS:
            raise Incomplete(f"{path.name}: add {row['subject']!r} to TRAINERS in postmortem/measured.py")
        asked = dict(re.findall(r"([\w.-]+)==([\w.]+)", document["command"]))
        versions = {name: version for name, version in row["versions"].items() if name != "torch"} or asked
        unsplit, remedy = row["cases"].get("unsplit"), row.get("remedy") or ""
        name, _, version = remedy.partition("==")
        made = {
            "subject": row["subject"],
            "versions": versions,
            "configuration": row["configuration"],
            "verdict": row["verdict"],
            "fault": re.sub(r" \(\w+ = \w+\)$", "", row["fault"]),  # the option is in the configuration
            "kinds": kinds_of(row, row["fault"]) if wrong else [],
            "unsplit": unsplit if unsplit is None else kinds_of(row, unsplit) if unsplit else [],
            "tokens": row["tokens"],
            "weights": [[round(w, 4) + 0.0 for w in rank] for rank in row["weights"]],
            "loss_shows_it": row["logged_loss_could_show_it"],
            "remedy": "" if remedy == "none found" else remedy,
            "changes": CHANGES.get(remedy, {}),
            "release": version if name == next(iter(versions), "") else "",
            "reason": row["reason"] if row["verdict"] in measured.UNSEEN else "",
            "file": str(path.relative_to(ROOT)),
            "command": document["command"],
            "commit": document["provenance"]["commit"][:12],
        }
        yield {key: value for key, value in made.items() if value not in ("", None, {}) and value != []} | (
            {"unsplit": []} if unsplit == "" else {}
        )


def _of_bisection(path: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the releases that a bisection ran; it runs the first configuration of the package's first subject."""
    document = read_json(path)
    subject = subjects.meant_by([document["package"]])[0]
    configuration = subject.configurations[0].to_json()
    same = [r for r in rows if (r["subject"], r["configuration"]) == (subject.name, configuration)]
    known = {r["versions"][document["package"]] for r in same if r["versions"]}
    kinds = next(r["kinds"] for r in same if r["verdict"] in measured.FAULTY)
    first, last = document["tried"][0][0], document["tried"][-1][0]
    for version, faulty in document["tried"]:
        if version not in known:
            yield {
                "subject": subject.name,
                "versions": {document["package"]: version},
                "configuration": configuration,
                "verdict": "FAULT" if faulty else "RIGHT",
                **({"kinds": kinds} if faulty else {}),
                "file": str(path.relative_to(ROOT)),
                "command": f"truestep audit {document['package']} --bisect {first}..{last}",
                "by_bisection": True,
            }


def data() -> str:
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in measurements())
    return '{"measurements": [\n' + lines + "\n]}\n"


def files() -> dict[Path, str]:
    """Return every file with its content."""
    text = data()
    rows = measured.parse(text)
    return {measured.FILE: text, **stack_pages.pages(rows, measured.faults(rows))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="do not write; exit with 1 if a file is out of date"
    )
    check = parser.parse_args().check
    made = files()
    old = [p for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            write_atomic(path, made[path])
    sys.exit(1 if check and old else 0)


if __name__ == "__main__":
    main()
