"""Write the measured steps that ``truestep audit --past`` uses, docs/stack/ and docs/findings.md from results/audit/.

    python benchmarks/stack.py [--check]

With ``--check``, no file is written, and the exit code is 1 if one is out of date. A configuration's key, a
subject or a fault that the tables do not have is an error that says which table to extend.
Held by: tests/audit/test_stack_pages.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import audit_findings
import audit_rl_findings
import pages
import stack_data
import stack_pages

from truestep.audit.postmortem import measured


def data() -> str:
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in stack_data.measurements())
    return '{"measurements": [\n' + lines + "\n]}\n"


def files() -> dict[Path, str]:
    """Return every file with its content."""
    text = data()
    findings = {page.PAGE: page.page() for page in (audit_findings, audit_rl_findings)}
    return {measured.FILE: text, **findings, **stack_pages.pages(measured.parse(text))}


if __name__ == "__main__":
    pages.write_or_check(__doc__, files)
