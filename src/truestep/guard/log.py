"""The records of a guarded run: lines for people, JSON Lines for programs."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from truestep.audit.measure.findings import Cause
from truestep.audit.present import words
from truestep.guard.judge import Judged

SCHEMA = 1


class Log:
    """Writes records to a file if there is one, and says a line if there is something to say."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path else None
        self.file: IO[str] | None = None
        self.said: set[str] = set()

    def record(self, step: int, judged: Judged, seconds: float, source: str) -> dict[str, Any]:
        """Return the JSON record of one watched step. It has no data of the user."""
        row: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "step",
            "step": step,
            "verdict": judged.verdict.value,
        }
        row["codes"] = list(dict.fromkeys(c.code for c in judged.causes))
        row["fault"] = "; ".join(words.sentence(c) for c in judged.causes)
        row["notes"] = [words.sentence(c) for c in judged.notes]
        for name in (
            "weights",
            "errors",
            "tokens",
            "token_weights",
            "residual",
            "scale",
            "condition",
            "dtype",
        ):
            row[name] = _plain(getattr(judged, name))
        row["causes"] = _plain([asdict(c) for c in judged.causes])
        return {**row, "gradient": source, "seconds": round(seconds, 6)}

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. If that fails, say so once and write no more: a process that raised here would not
        take part in the next exchange, and the other ranks would wait for it."""
        if self.path is None:
            return
        try:
            self._append(self.path, json.dumps(record))
        except (OSError, ValueError, TypeError) as error:
            self.say(
                f"truestep guard: the log {self.path} cannot be written ({words.line(error)}); no more is written"
            )
            self.path = None

    def _append(self, path: Path, text: str) -> None:
        if self.file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_cut = _is_cut(path)
            self.file = path.open("a", encoding="utf-8")
            if is_cut:  # the header of this run must start a line
                self.file.write("\n")
        self.file.write(text + "\n")
        self.file.flush()

    def mark(self, kind: str, **values: Any) -> None:
        """Write a record that is not about a step: "run" at the start, "off", or "end"."""
        self.write({"schema": SCHEMA, "kind": kind, **values})

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    def say_fault(self, record: dict[str, Any]) -> None:
        """Say a finding once, not at every step."""
        if record["fault"] not in self.said:
            self.said.add(record["fault"])
            self.say(message(record))

    def say_unread(self, record: dict[str, Any], causes: Sequence[Cause]) -> None:
        """Say once that something could not be checked."""
        for text in map(words.sentence, causes):
            if text not in self.said:
                self.said.add(text)
                self.say(f"truestep guard: step {record['step']}: {words.line(text, 600)}")

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk
                self.file.close()
            self.file = None


def _is_cut(path: Path) -> bool:
    """Return whether a killed run left an unfinished line at the end of the file."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def message(record: dict[str, Any]) -> str:
    """Return one line about a record."""
    start = f"truestep guard: step {record['step']}: {record['verdict']}"
    weights = " | ".join(", ".join(map(words.number, rank)) for rank in record["weights"])
    if record["verdict"] == "RIGHT":
        return f"{start}: every micro-batch counts once" + (f" (residual {words.small(record['residual'])})")
    if record["verdict"] == "FAULT":
        return f"{start}: {words.line(record['fault'], 600)}" + (f" [weights {weights}]" if weights else "")
    return f"{start}: {words.line('; '.join(record['notes']), 600)}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
