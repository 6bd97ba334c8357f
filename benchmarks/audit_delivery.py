"""Audit weight delivery in pinned releases and in faulty samplers, and write the table of docs/audit.md.

    python benchmarks/audit_delivery.py [--only NAME] [--table-only]

Results are stored as results/audit-delivery/NAME.json; NAME-faults.json has one row for every fault that was injected
(subjects/delivery_faults.py). What has a result is not run again (delete the file to repeat it). vLLM runs if
TRUESTEP_VLLM_PYTHON names a Python that has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages

from truestep.audit import subjects
from truestep.audit.environments import virtual
from truestep.audit.environments.launch import audit_one
from truestep.audit.present import words
from truestep.rundir import provenance, read_json, write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "results/audit-delivery", ROOT / "docs/audit.md"
BEGIN, END = "<!-- delivery: benchmarks/audit_delivery.py -->", "<!-- /delivery -->"
TIMEOUT = 900.0
# name → (requirement, or "" for this environment; the subject)
TARGETS: dict[str, tuple[str, str]] = {
    "truestep": ("", "truestep weight delivery"),
    "truestep-vllm": ("", "truestep with vLLM weight delivery"),
    "trl-1.16.0": ("trl==1.16.0", "TRL weight delivery"),
    "trl-0.21.0": ("trl==0.21.0", "TRL weight delivery"),
    "trl-1.16.0-peft-0.21.2": ("trl==1.16.0+peft==0.21.2", "PEFT with TRL weight delivery"),
}
WITH_FAULTS = ("truestep", "truestep-vllm", "trl-1.16.0", "trl-1.16.0-peft-0.21.2")
PLAIN, ADAPTED = ("cache", "nothing", "behind", "head", "first"), ("dropped", "twice")
UNTRAINED = tuple(
    fault for fault in PLAIN if fault != "head"
)  # of adapters: the output layer does not change


def run(name: str, target: str, subject: str) -> None:
    asked = ["audit", *filter(None, [target]), "--only", subject]
    command = [sys.executable, "-m", "truestep", *asked, "--json", "--timeout", f"{TIMEOUT:.0f}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if not done.stdout:
        print(f"{name}: exit code {done.returncode}, nothing to keep", file=sys.stderr)
        return
    write_json(FOLDER / f"{name}.json", {"command": f"truestep {' '.join(asked)}", **json.loads(done.stdout)})


def run_faults(name: str, target: str, subject: str) -> None:
    """Audit the subject's first plain configuration, and its first one with an adapter, with every fault."""
    python = virtual.build(target, say=print) if target else Path(sys.executable)
    (known,) = (s for s in subjects.TABLE if s.name == subject)
    adapted = [c for c in known.configurations if "lora" in (*c.options, c.options.get("adapter"))]
    plain = [c for c in known.configurations if c not in adapted]
    command = f"python benchmarks/audit_delivery.py --only {name}"
    document: dict[str, Any] = {"command": command, "provenance": provenance(0), "findings": []}
    for chosen, faults in ((plain[:1], PLAIN), (adapted[:1], ADAPTED if plain else ADAPTED + UNTRAINED)):
        for fault in faults if chosen else ():
            one = replace(chosen[0], options={**chosen[0].options, "fault": fault})
            row = words.row_of(audit_one(known, one, python, timeout=TIMEOUT))
            document["findings"].append(row)
            print(f"{name} {fault}: {row['verdict']} {row['fault']} {row['reason']}", flush=True)
            write_json(FOLDER / f"{name}-faults.json", document)


def what_ran(findings: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| subject | configuration | verdict | tokens | new weights | nearest other weights |",
        "|---|---|---|---|---|---|",
    ]
    for f in findings:
        found = f["delivery"]
        versions = ", ".join(f"{k} {v}" for k, v in f["versions"].items() if k not in ("torch", "truestep"))
        configuration = {k: v for k, v in f["configuration"].items() if k not in ("optimizer", "processes")}
        cells = [
            f"{f['subject'].replace(' weight delivery', '')}{f' ({versions})' if versions else ''}",
            words.configuration_in_words(configuration),
            f["verdict"] + (f": {f['fault'] or f['reason']}" if f["fault"] or f["reason"] else ""),
            str(found.get("tokens", "")),
            words.distance_in_words(found) if found else "",
            words.number(words.nearest(found)) if found else "",
        ]
        lines.append(pages.table_row(cells))
    return lines


def injected(documents: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| subject | injected fault | verdict | named |", "|---|---|---|---|"]
    for _, document in sorted(documents.items()):
        for f in document["findings"]:
            subject = f["subject"].replace(" weight delivery", "")
            lines.append(
                pages.table_row(
                    [subject, f["configuration"]["fault"], f["verdict"], f["fault"] or f["reason"]]
                )
            )
    return lines


def section() -> str:
    found = {path.stem: read_json(path) for path in sorted(FOLDER.glob("*.json"))}
    faults = {name: document for name, document in found.items() if name.endswith("-faults")}
    right = [f for name, document in found.items() if name not in faults for f in document["findings"]]
    ran = [f for f in right if f["configuration"]]
    lines = [BEGIN, *what_ran(ran), "", *injected(faults), *pages.provenance(found, FOLDER), END]
    return "\n".join(lines)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", default="", help="only this target")
    parser.add_argument("--table-only", action="store_true", help="only write the table again")
    given = parser.parse_args()
    for name, how in TARGETS.items():
        if given.table_only or given.only not in ("", name):
            continue
        if not (FOLDER / f"{name}.json").exists():
            run(name, *how)
        if name in WITH_FAULTS and not (FOLDER / f"{name}-faults.json").exists():
            run_faults(name, *how)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    write_atomic(PAGE, before + section() + after)
    print(PAGE)


if __name__ == "__main__":
    main()
