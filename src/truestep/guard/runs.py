"""Reads the log of guarded runs. The file is untrusted: every field that is used is checked.

A resumed run appends to the same file, so a log has one run for each header. A killed run leaves an unfinished
line, either at the end of the file or before the header of the next run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truestep.errors import UserError

NUMERALS = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")
SCHEMA = 1  # same as in log.py, which needs torch
VERDICTS = ("RIGHT", "FAULT", "NOT OBSERVABLE")
KINDS = ("run", "step", "off", "end")
NAME = "truestep_guard.jsonl"  # that TruestepGuard writes into the output folder
TEXT, TEXTS, COUNT, NUMBER, FLAG, TABLE, PAIRS = (
    "text", "list of texts", "count", "number", "boolean", "list of lists of numbers", "table of texts",
)  # fmt: skip
# kind → field → (type, it must be there)
FIELDS: dict[str, dict[str, tuple[str, bool]]] = {
    "run": {
        "time": (TEXT, False), "truestep": (TEXT, False), "torch": (TEXT, False), "packages": (PAIRS, False),
        "model": (TEXT, False), "parameters": (COUNT, False), "tensors": (COUNT, False), "linear": (COUNT, False),
        "watched": (TEXTS, False), "gradient": (TEXT, False), "ranks": (COUNT, False), "every": (COUNT, False),
        "unseen": (TEXTS, False),
    },
    "step": {
        "step": (COUNT, True), "verdict": (TEXT, True), "codes": (TEXTS, True), "fault": (TEXT, True),
        "notes": (TEXTS, True), "weights": (TABLE, True), "tokens": (TABLE, True), "token_weights": (TABLE, True),
        "residual": (NUMBER, True), "scale": (NUMBER, True), "dtype": (TEXT, True), "gradient": (TEXT, True),
        "seconds": (NUMBER, True),
    },
    "off": {"step": (COUNT, True), "why": (TEXT, True)},
    "end": {"steps": (COUNT, True), "finished": (FLAG, True)},
}  # fmt: skip
Record = dict[str, Any]


@dataclass
class Run:
    """One run in a log. ``steps`` are the records of the watched steps."""

    header: Record | None = None
    steps: list[Record] = field(default_factory=list)
    off: Record | None = None
    end: Record | None = None
    cut: int = 0  # the number of its unfinished last line; 0 if there is none

    @property
    def verdict(self) -> str:
        """FAULT if any watched step is faulty; RIGHT only if at least one was judged."""
        found = {one["verdict"] for one in self.steps}
        return next((v for v in ("FAULT", "RIGHT") if v in found), "NOT OBSERVABLE")

    @property
    def first_fault(self) -> Record | None:
        return next((one for one in self.steps if one["verdict"] == "FAULT"), None)

    @property
    def seconds(self) -> float:
        return math.fsum(one["seconds"] or 0.0 for one in self.steps)

    def notes(self) -> list[tuple[str, int, int]]:
        """Return (note, first step, number of steps) of what was noted at the steps. Notes that differ only in
        their numbers, such as a clip's factor, are one note, with the numbers of its first step."""
        found: dict[str, tuple[str, int, int]] = {}
        for one in self.steps:
            for text in one["notes"]:
                key = NUMERALS.sub("0", text)
                said, first, count = found.get(key, (text, one["step"], 0))
                found[key] = (said, first, count + 1)
        return list(found.values())

    def state(self) -> str:
        """Return how the run ended, as a sentence; "" if it ended as it should."""
        if self.off is not None:
            return f"the guard was off after step {self.off['step']}: {self.off['why']}"
        if self.end is None:
            return "the log has no end: the run is not finished or was killed"
        return "" if self.end["finished"] else f"the run ended with an error after step {self.end['steps']}"


def read(path: Path) -> list[Run]:
    """Return the runs in a log, or in the log of an output folder. Raises UserError with file, line and field."""
    if path.is_dir():
        path = path / NAME
    if not path.exists():
        raise UserError(f"{path} does not exist; pass the log file of a guard")
    if not path.is_file():
        raise UserError(f"{path} is not a file; pass the log file of a guard")
    runs: list[Run] = []
    cut = 0
    for number, record in _records(path):
        if record is None:
            cut = number
            continue
        kind = record.get("kind")
        if cut and kind != "run":
            raise UserError(f"{path}:{cut}: the line is not a record of a guard; remove it")
        _check(record, f"{path}:{number}")
        if kind == "run" or not runs:
            if cut and runs:
                runs[-1].cut = cut
            runs.append(Run())
        cut = 0
        run = runs[-1]
        if kind == "run":
            run.header = record
        elif kind == "step":
            run.steps.append(record)
        elif kind == "off":
            run.off = run.off or record
        else:
            run.end = record
    if not runs:
        raise UserError(f"{path} has no record of a guard; pass the log file of a guard")
    if cut:
        runs[-1].cut = cut
    return runs


def _records(path: Path) -> Iterator[tuple[int, Record | None]]:
    """Yield (line number, record) of each line that is not empty; None for a line that cannot be read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode(), parse_constant=_no_constant)
            except (ValueError, RecursionError):
                # A kill cuts a line, but never ends it: a whole line that cannot be read is damaged.
                if line.endswith(b"\n") and not line.startswith(b'{"schema"'):
                    raise UserError(
                        f"{path}:{number}: the line is not JSON; pass the log file of a guard"
                    ) from None
                record = None
            if record is not None and not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object; pass the log file of a guard")
            yield number, record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check(record: Record, where: str) -> None:
    schema, kind = record.get("schema"), record.get("kind")
    if schema != SCHEMA:
        raise UserError(
            f"{where}: schema: expected {SCHEMA}, got {_shown(schema)}; use the truestep that wrote the log"
        )
    if kind not in KINDS:
        raise UserError(
            f"{where}: kind: expected one of {', '.join(KINDS)}, got {_shown(kind)}; remove the line"
        )
    for name, (wanted, is_needed) in FIELDS[str(kind)].items():
        if name not in record:
            if is_needed:
                raise UserError(f"{where}: {name}: the field is missing; remove the line")
            continue
        if not _fits(record[name], wanted):
            raise UserError(
                f"{where}: {name}: expected a {wanted}, got {_shown(record[name])}; remove the line"
            )
    if kind == "step" and record["verdict"] not in VERDICTS:
        raise UserError(
            f"{where}: verdict: expected one of {', '.join(VERDICTS)}, got {_shown(record['verdict'])}; remove the line"
        )


def _fits(value: Any, wanted: str) -> bool:
    if wanted == TEXT:
        return isinstance(value, str)
    if wanted == FLAG:
        return isinstance(value, bool)
    if wanted == COUNT:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    if wanted == NUMBER:  # null is written for a number that is not finite
        return value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        )
    if wanted == PAIRS:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if not isinstance(value, list):
        return False
    if wanted == TEXTS:
        return all(isinstance(v, str) for v in value)
    return all(isinstance(row, list) and all(_fits(v, NUMBER) for v in row) for row in value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
