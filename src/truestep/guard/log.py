"""The records of a guarded run: lines for people, JSON Lines for programs."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

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
        row: dict[str, Any] = {"schema": SCHEMA, "step": step, "verdict": judged.verdict.value}
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
        row["causes"] = [asdict(c) for c in judged.causes]
        return {**row, "gradient": source, "seconds": round(seconds, 6)}

    def write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    def say_fault(self, record: dict[str, Any]) -> None:
        """Say a finding once, not at every step."""
        if record["fault"] not in self.said:
            self.said.add(record["fault"])
            self.say(message(record))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


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
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
