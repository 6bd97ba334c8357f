"""Reads the versions that lock files, lists of packages and commands of pip pin. Nothing is executed.

Held by: tests/audit/test_past_locks.py
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from truestep.redaction import redact

LOCKS = ("uv.lock", "poetry.lock", "pdm.lock", "pylock.toml", "Pipfile.lock")
WHOLE_ENVIRONMENT = 10  # at least this many packages
_NAME = r"([A-Za-z0-9][\w.\-]*)"
_PIN = re.compile(
    rf"""^[\s\-"']*{_NAME}(?:\[[^\]]*\])?\s*={{1,3}}\s*([\w.!+\-]{{1,60}})(?:=[\w.]+)?["']?\s*(?:[;\\#,].*)?$"""
)
_RANGE = re.compile(rf"""^[\s\-"']*{_NAME}(?:\[[^\]]*\])?\s*(@|[<>~!=]=?.*)""")
_COLUMNS = re.compile(rf"^{_NAME} +(\d[\w.!+\-]{{0,60}})(?: +\S+){{0,2}} *$")
_HEADS = re.compile(r"^(?:# packages in environment|# Name +Version|Package +Version)", re.MULTILINE)
_INSTALL = re.compile(r"\b(?:pip3?|uv)\s+(?:install|add)\s(.*?)(?:&&|\|\||;|$)")


class Broken(ValueError):
    """A file that cannot be read, or a value that is not allowed there; the message says why."""


@dataclass
class Pins:
    """The packages of one file, with names as in the package index."""

    versions: list[tuple[str, str]] = field(default_factory=list)
    ranges: dict[str, str] = field(default_factory=dict)  # package → the line that requires it, without a pin
    loose: bool = False  # some package is not pinned, not even to a file or an address

    @property
    def whole(self) -> int:
        """Return the number of packages if they are a whole environment with torch, else 0."""
        names = {name for name, _ in self.versions}
        enough = len(names) >= WHOLE_ENVIRONMENT and bool(names & {"torch", "pytorch"})
        return len(names) if enough and not self.loose else 0

    def add(self, name: Any, version: Any) -> None:
        if isinstance(name, str) and isinstance(version, str) and version:
            self.versions.append((normal(name), version))


def normal(name: str) -> str:
    """Return a package's name as in the index."""
    return re.sub(r"[-_.]+", "-", name).lower()


def of_text(text: str) -> Pins:
    """Read requirements, pip freeze, pip list, conda list, a conda environment, or commands of pip."""
    pins, columns = Pins(), _HEADS.search(text) is not None
    for line in text.splitlines():
        if len(line) > 500 or line.lstrip().startswith("#"):
            continue
        if found := _PIN.match(line) or (columns and _COLUMNS.match(line)):
            pins.add(found[1], found[2])
        elif found := _RANGE.match(line):
            pins.ranges.setdefault(normal(found[1]), line.strip()[:80])
            pins.loose = pins.loose or found[2][0] != "@"
    if "pip" in text or "uv add" in text:
        for line in command_lines(text):
            for word in (word for command in _INSTALL.findall(line[:10_000]) for word in command.split()):
                if found := _PIN.match(word):
                    pins.add(found[1], found[2].rstrip("\"'"))
    return pins


def of_lock(text: str) -> Pins:
    """Read uv.lock, poetry.lock, pdm.lock, pylock.toml or Pipfile.lock. Raises Broken."""
    pins = Pins()
    if text.lstrip().startswith("{"):
        document = parse_json(text)
        for table in (document.get("default"), document.get("develop")):
            for name, entry in table.items() if isinstance(table, Mapping) else ():
                version = entry.get("version") if isinstance(entry, Mapping) else None
                pins.add(name, version.lstrip("=") if isinstance(version, str) else None)
        return pins
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise Broken(f"not valid TOML: {redact(str(error))[:200]}") from None
    for entries in (document.get("package"), document.get("packages")):
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping):
                pins.add(entry.get("name"), entry.get("version"))
    return pins


def command_lines(text: str) -> list[str]:
    """Return the lines of a script without comments; a backslash continues a line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\\[ \t]*\n", " ", "\n".join(lines)).splitlines()


def parse_json(text: str) -> Any:
    """Parse JSON. Raises Broken."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Broken(f"not valid JSON: {error}") from None
    except RecursionError:
        raise Broken("not read: nested too deeply") from None
