"""What the scripts that write committed pages share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from truestep.rundir import write_atomic

ROOT = Path(__file__).resolve().parent.parent


def write_or_check(description: str | None, files: Callable[[], Mapping[Path, str]]) -> None:
    """Write the files that are out of date; with ``--check``, only name them and exit with 1."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    told = "do not write; exit with 1 if a file is out of date"
    parser.add_argument("--check", action="store_true", help=told)
    check, made = parser.parse_args().check, files()
    old = [p for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            write_atomic(path, made[path])
    sys.exit(1 if check and old else 0)


def table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def provenance(documents: Mapping[str, dict[str, Any]], folder: Path) -> list[str]:
    """Return the lines that say which command and commit made each result."""
    lines = ["", "Commands and provenance:", ""]
    for name, document in sorted(documents.items()):
        stamp, file = document["provenance"], (folder / f"{name}.json").relative_to(ROOT)
        made = f"commit {stamp['commit'][:12]}, {stamp['hardware']['cpu']}, {file}"
        lines.append(f"* `{document['command']}`: {made}")
    return lines
