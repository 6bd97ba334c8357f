"""Write the measured steps that ``truestep audit --past`` uses, docs/stack/ and docs/findings.md from results/audit/.

    python benchmarks/stack.py [--check]

With ``--check``, no file is written, and the exit code is 1 if one is out of date. A configuration's key, a
subject or a fault that the tables do not have is an error that says which table to extend.
Held by: tests/audit/test_stack_pages.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import audit_findings
import stack_data
import stack_pages

from truestep.audit.postmortem import measured
from truestep.rundir import write_atomic


def data() -> str:
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in stack_data.measurements())
    return '{"measurements": [\n' + lines + "\n]}\n"


def files() -> dict[Path, str]:
    """Return every file with its content."""
    text = data()
    pages = stack_pages.pages(measured.parse(text))
    return {measured.FILE: text, audit_findings.PAGE: audit_findings.page(), **pages}


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
        print(f"{path.relative_to(stack_data.ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            write_atomic(path, made[path])
    sys.exit(1 if check and old else 0)


if __name__ == "__main__":
    main()
