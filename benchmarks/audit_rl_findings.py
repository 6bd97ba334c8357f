"""Audit the RL steps of pinned releases, one command each, and write the results to docs/findings-rl.md.

    python benchmarks/audit_rl_findings.py [--only TEXT] [--table-only]

Results are stored as results/audit-rl/NAME.json. A release that has a result is not run again (delete the file to
repeat it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pages

from truestep.audit.present.words import configuration_in_words
from truestep.rundir import read_json, write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "results/audit-rl", ROOT / "docs/findings-rl.md"
TARGETS: dict[str, tuple[str, ...]] = {
    **{
        f"trl-{version}": (f"trl=={version}", "--only", "GRPO")
        for version in ("0.15.2", "0.17.0", "0.21.0", "0.24.0", "0.29.1", "1.16.0")
    },
    "openrlhf-0.11.2": ("openrlhf==0.11.2", "--only", "ActorPPO"),
    "verl-0.9.1": ("verl==0.9.1", "--only", "policy"),
}


def run(name: str, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "truestep", "audit", *words, "--json", "--timeout", "900"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if not done.stdout:
        print(f"{name}: exit code {done.returncode}, nothing to keep", file=sys.stderr)
        return
    told = {"command": " ".join(["truestep audit", *words]), **json.loads(done.stdout)}
    write_json(FOLDER / f"{name}.json", told)


def page() -> str:
    lines = [
        "# Findings about RL steps",
        "",
        "`python benchmarks/audit_rl_findings.py` makes this page from results/audit-rl/. [audit.md](audit.md#rl-steps) says how",
        "objectives are found from coefficients of tokens, and what the verdicts mean. The error is the relative error of the",
        "gradient that the named objective predicts; for a correct step, it is the error of the configured objective.",
        "",
        "| subject | versions | configuration | verdict | what | error |",
        "|---|---|---|---|---|---|",
    ]
    documents = {path.stem: read_json(path) for path in sorted(FOLDER.glob("*.json"))}
    for _, document in sorted(documents.items()):
        for f in document["findings"]:
            versions = ", ".join(f"{k} {v}" for k, v in f["versions"].items() if k != "torch")
            error = "" if f["relative_error"] is None else f"{f['relative_error']:.1e}"
            what = "; ".join(text for text in (f["fault"], f["reason"]) if text)
            cells = [
                f["subject"],
                versions,
                configuration_in_words(f["configuration"]),
                f["verdict"],
                what,
                error,
            ]
            lines.append(pages.table_row(cells))
    lines += pages.provenance(documents, FOLDER)
    return "\n".join(lines) + "\n"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", default="", help="only targets whose name contains this text")
    parser.add_argument("--table-only", action="store_true", help="only write the page again")
    given = parser.parse_args()
    for name, words in TARGETS.items():
        if given.only in name and not given.table_only and not (FOLDER / f"{name}.json").exists():
            run(name, words)
    write_atomic(PAGE, page())
    print(PAGE)


if __name__ == "__main__":
    main()
