"""The manifest of a checkpoint, which names its files with their hashes. Reading it needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from truestep.checkpoint.layout import Entry
from truestep.errors import UserError

GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SHARD = re.compile(rf"({GROUP.pattern})\.rank(\d{{5}})-of-(\d{{5}})\.safetensors")
STEP = re.compile(r"step_(\d{8,15})(\.aside)?")
FORMAT = 2  # version of manifest.json
WITHOUT_LAYOUT = 1  # the version before, which recorded neither shapes nor rows
MANIFEST_LIMIT = 64 << 20  # bytes; limits the memory that reading a damaged file takes


class Corrupt(Exception):
    """Raised if a checkpoint cannot be used. The message says why."""


class File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    bytes: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    # A matching name has no slash and starts with a letter or digit, so it cannot point outside its folder.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: int
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    files: dict[Annotated[str, StringConstraints(pattern=f"^{SHARD.pattern}$")], File]
    state: dict[str, Any]
    tensors: dict[str, dict[str, Entry]] | None = None  # by group and name; None only in the older format

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in self.files:
            match = SHARD.fullmatch(name)
            if match is None or int(match[3]) != self.world_size or int(match[2]) >= self.world_size:
                raise ValueError(f"{name} does not belong to a checkpoint of {self.world_size} processes")
        if (self.tensors is None) != (self.format == WITHOUT_LAYOUT):
            raise ValueError("the shapes of the tensors are missing")
        entries = [entry for group in (self.tensors or {}).values() for entry in group.values()]
        if any(len(entry.starts) not in (0, self.world_size) for entry in entries):
            raise ValueError(f"a tensor does not have a part for each of {self.world_size} processes")
        return self


def digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def newest_state(folder: Path) -> Mapping[str, Any] | None:
    """Return the state of the newest checkpoint whose manifest is intact, without its tensors."""
    for path in reversed(list_checkpoints(folder)):
        with contextlib.suppress(Corrupt, OSError):
            return read_manifest(path).state
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all folders that have the name of a committed checkpoint, oldest step first."""
    found = [p for p in folder.iterdir() if STEP.fullmatch(p.name)] if folder.is_dir() else []
    real = [p for p in found if p.is_dir() and not p.is_symlink()]
    return sorted(real, key=lambda p: (step_of(p), not p.suffix))


def step_of(path: Path) -> int:
    match = STEP.fullmatch(path.name)
    assert match, path
    return int(match[1])


@contextlib.contextmanager
def regular_file(path: Path) -> Iterator[Any]:
    """Open a regular file for reading. Links are not followed, and a pipe does not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Corrupt(f"{path.name} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Corrupt(f"{path.name} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_manifest(path: Path) -> Manifest:
    with regular_file(path / "manifest.json") as file:
        raw = file.read(MANIFEST_LIMIT + 1)
    try:
        body = json.loads(raw) if len(raw) <= MANIFEST_LIMIT else None
        if not isinstance(body, dict) or body.pop("sha256", "") != digest(body):
            raise Corrupt("manifest.json is not what was written (SHA-256 differs)")
        if body.get("format") not in (FORMAT, WITHOUT_LAYOUT):
            fault = f"{path} was written by a different version of truestep (format {body.get('format')!r})"
            raise UserError(f"{fault}; use that version")
        manifest = Manifest.model_validate(body)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise Corrupt(f"manifest.json cannot be read: {fault}") from None
    if manifest.step != step_of(path):
        raise Corrupt(f"manifest.json is that of step {manifest.step}")
    return manifest
