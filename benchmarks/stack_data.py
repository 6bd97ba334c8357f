"""Turn results/audit/ and results/audit-bisect/ into the rows of measured.json (stack.py writes it)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truestep.audit import subjects
from truestep.audit.environments.releases import OPTIONS
from truestep.audit.postmortem import measured
from truestep.audit.present.words import SENTENCES
from truestep.rundir import read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BISECTED = ROOT / "results/audit", ROOT / "results/audit-bisect"
CHANGES = {words: changes for changes, words in OPTIONS}
# Sentences that are made from numbers or were worded differently: how a part begins → the cause's kind. Only
# the main fault of a newer result has its causes.
BEGINNINGS = (
    ("the auxiliary loss has", "auxiliary_loss"),
    ("micro-batches are dropped", "dropped"),
    ("rank ", "dropped"),
    ("an unknown pattern of weights", "unknown_weights"),
    ("every backward overwrites", "kept_last"),
    ("steps were taken after", "step_sizes"),
    ("data is lost", "rows_lost"),
    ("mean of micro-batch means instead", "micro_mean"),
    ("sum of micro-batch means", "accumulation_missing"),
)


# A sentence with only a blank would fit everything.
FORMS = {
    kind: re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(form)))
    for kind, form in SENTENCES.items()
    if isinstance(form, str) and re.sub(r"\{.*?\}", "", form).strip()
}


class Incomplete(ValueError):
    """A table has no row for something that was measured."""


def kinds_of(row: dict[str, Any], text: str) -> list[str]:
    """Return the kinds of a fault's causes; if the result has only ``text``, read them from its parts."""
    if row.get("causes") and text == row["fault"]:
        return list(dict.fromkeys(kind for cause in row["causes"] for kind in cause["kinds"]))
    found = []
    for part in re.split(r"; |, and ", re.sub(r" \((?:not in every step|\w+ = \w+)\)$", "", text)):
        by_form = (kind for kind, form in FORMS.items() if form.fullmatch(part))
        by_beginning = (kind for begin, kind in BEGINNINGS if part.startswith(begin))
        kind = next(by_form, "") or next(by_beginning, "")
        if not kind and text != row["fault"] and part in row["fault"]:
            found += kinds_of(row, row["fault"])
        elif not kind:
            raise Incomplete(
                f"{row['subject']}: {part!r} is not a sentence of present/words.py; add its kind to BEGINNINGS"
            )
        found.append(kind)
    return list(dict.fromkeys(filter(None, found)))


def measurements() -> Iterator[dict[str, Any]]:
    """Yield one row per audited configuration, then those of bisections."""
    rows = [row for path in sorted(RESULTS.glob("*.json")) for row in _of_document(path)]
    yield from rows
    for path in sorted(BISECTED.glob("*.json")):
        yield from _of_bisection(path, rows)


def _of_document(path: Path) -> Iterator[dict[str, Any]]:
    document = read_json(path)
    for row in document["findings"]:
        if row.get("asked"):  # an RL step, which --past does not look back at
            continue
        wrong = row["verdict"] in measured.FAULTY
        known = {*measured.KEYS, *measured.ROUNDING, measured.HIDES}
        unknown = [key for key in row["configuration"] if key not in known]
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
            "reproducer": re.sub(r"\.py shows it: .*", ".py", row.get("reproducer") or "", flags=re.DOTALL)
            if ".py shows it: " in (row.get("reproducer") or "")
            else "",
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
