"""The log files of a stage, verified when they are read again.

A checkpoint and done.json record the size and hash of each file as it was at that moment. A resume checks that
much of the file and cuts off the rest, whose steps are done again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from truestep.checkpoint.manifest import newest_state
from truestep.errors import UserError
from truestep.rundir import jsonl, read_json, read_jsonl

NAMES = ("metrics.jsonl", "rollouts.jsonl", "timings.jsonl")
Record = Mapping[str, Mapping[str, Any]]  # file name → its bytes and sha256
_PIECE = 1 << 20


class StageLogs:
    """Appends to a stage's log files, and keeps the hash of what they contain."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests = {name: hashlib.sha256() for name in NAMES}
        self._sizes = dict.fromkeys(NAMES, 0)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        data = jsonl(rows).encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("ab") as file:
            file.write(data)
        self._digests[name].update(data)
        self._sizes[name] += len(data)

    def seal(self) -> dict[str, dict[str, Any]]:
        """Flush the files to the disk and return their record."""
        for path in (self._folder / name for name in NAMES):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return {n: {"bytes": self._sizes[n], "sha256": self._digests[n].hexdigest()} for n in NAMES}

    def restore(self, record: Record) -> None:
        """Continue from a record ({} for empty files). Raises UserError if a file does not begin with it."""
        for name in NAMES:
            path, size = self._folder / name, int(record[name]["bytes"]) if record else 0
            self._digests[name] = verify_beginning(path, record[name]) if record else hashlib.sha256()
            self._sizes[name] = size
            if path.exists():
                os.truncate(path, size)


def verify_beginning(path: Path, entry: Mapping[str, Any]) -> Any:
    """Return the running hash of the beginning that ``entry`` records. Raises UserError if it differs."""
    digest, left = hashlib.sha256(), int(entry["bytes"])
    if path.exists():
        with path.open("rb") as file:
            while left and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
    if left or digest.hexdigest() != entry["sha256"]:
        fault = f"its first {entry['bytes']} bytes are not what was written"
        remedy = f"restore the file, or delete {path.parent} to train the stage again"
        raise UserError(f"{path} is damaged or incomplete: {fault}; {remedy}")
    return digest


def read_log(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a stage's log, which is checked against done.json or the newest checkpoint. Raises
    UserError if it is damaged."""
    done = folder / "done.json"
    if done.exists():
        record = read_json(done).get("files", {})
    else:
        record = (newest_state(folder / "checkpoints") or {}).get("logs", {})
    if name in record:
        verify_beginning(folder / name, record[name])
    return read_jsonl(folder / name)
