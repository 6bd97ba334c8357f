"""Crash-safe checkpoints, which contain only safetensors and JSON. One rename commits each of them.

    step_00000012/              committed: every file is named in manifest.json with its size and SHA-256
        GROUP.rank00000-of-00002.safetensors   manifest.json
    step_00000012.tmp-write/    being written: never read, removed by the next save or load
    step_00000012.tmp-discard/  being deleted: never read, removed by the next save or load
    step_00000012.aside/        old version while the same step is replaced: read if nothing newer exists
    latest                      the newest checkpoint's name, for people; no code reads it

All ranks share one file system. Every rank reaches every barrier, even after an error, so that a full disk on
one rank cannot make the others hang."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from truestep.checkpoint import folders
from truestep.checkpoint.folders import discard_folder, exclusive
from truestep.checkpoint.manifest import (
    FORMAT,
    GROUP,
    MANIFEST_LIMIT,
    SHARD,
    STEP,
    Corrupt,
    File,
    list_checkpoints,
    read_manifest,
    regular_file,
    step_of,
)  # fmt: skip
from truestep.checkpoint.manifest import digest as _digest
from truestep.errors import OutOfSpace, UserError
from truestep.rundir import NO_SPACE, fsync_folder, write_atomic

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_LEFTOVER = re.compile(STEP.pattern + r"\.tmp-(write|discard)|\.latest\..*")
_PATIENCE = 30.0  # seconds; a reader may hold the lock while it removes leftovers


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The whole state of a stage between two optimizer steps, as named groups of tensors and JSON values."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    keep: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write and commit a checkpoint, then delete older ones, so that ``keep`` remain with it.

    Every rank calls this with its own tensors and the same step, state (rank 0's is used) and group names.

    Raises OutOfSpace if the disk is full, UserError if another process is saving here, RuntimeError if
    another rank failed, and ValueError for values that cannot be stored."""
    state = _checked(checkpoint, keep, rank, world_size)
    final = folder / f"step_{checkpoint.step:08d}"
    temporary = final.with_name(f"{final.name}.tmp-write")
    part: dict[str, dict[str, Any]] = {}

    def prepare() -> None:
        if rank == 0:
            stack.enter_context(exclusive(folder, _PATIENCE))
            remove_leftovers(folder)
            temporary.mkdir()
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # frees the space after a failure

    def write() -> None:
        num_bytes = sum(t.nbytes for group in checkpoint.tensors.values() for t in group.values())
        folders.require_space(folder, world_size * num_bytes)
        for group, tensors in checkpoint.tensors.items():
            name = f"{group}.rank{rank:05d}-of-{world_size:05d}.safetensors"
            part[name] = _write_file(temporary / name, _safetensors(tensors))
        _write_file(temporary / f"part{rank}.json", [json.dumps(part).encode()])

    def commit() -> None:
        if rank == 0:
            body: dict[str, Any] = {"format": FORMAT, "step": checkpoint.step, "world_size": world_size}
            body |= {"files": _gather_parts(temporary, world_size), "state": state}
            document = json.dumps({"sha256": _digest(body), **body}, indent=1)
            _write_file(temporary / "manifest.json", [document.encode()])
            fsync_folder(temporary)
            folders.replace_folder(temporary, final)
            write_atomic(folder / "latest", final.name + "\n")
            _delete_older(folder, checkpoint.step, keep)

    failure: Exception | None = None
    with contextlib.ExitStack() as stack:  # rank 0 keeps the lock until the last barrier is passed
        for phase in (prepare, write, commit):
            try:
                if failure is None:
                    phase()
            except (OSError, RuntimeError, UserError) as error:
                failure = error
            barrier()
        if failure is None and not _holds(final, part):
            failure = RuntimeError(f"{final} was not saved: another rank failed to write its part")
    if isinstance(failure, OSError) and failure.errno in NO_SPACE:
        raise OutOfSpace(f"{folder}: no space for a checkpoint of step {checkpoint.step} ({failure.strerror}); the "
                         "previous one is intact; free disk space and resume") from failure  # fmt: skip
    if failure is not None:
        raise failure
    return final


def _checked(checkpoint: Checkpoint, keep: int, rank: int, world_size: int) -> dict[str, Any]:
    """Return the state as it will be read from JSON. Raises ValueError for values that cannot be stored."""
    if checkpoint.step < 0 or keep < 1 or not 0 <= rank < world_size:
        raise ValueError(f"step {checkpoint.step}, keep {keep}, rank {rank} of {world_size}: out of range")
    for group, tensors in checkpoint.tensors.items():
        if not GROUP.fullmatch(group):
            raise ValueError(
                f"{group!r} cannot name a group of tensors; use only letters, digits, '.', '_', '-'"
            )
        for name, t in tensors.items():
            is_plain = t.dtype in _DTYPES and t.layout == torch.strided and not t.is_meta
            if not is_plain or name == "__metadata__":
                raise ValueError(f"{group}: {name!r} ({t.dtype}, {t.layout}, {t.device}) cannot be stored")
    text = json.dumps(dict(checkpoint.state), indent=1, allow_nan=False)
    if len(text) > MANIFEST_LIMIT // 4:
        raise ValueError(f"the state has {len(text)} characters; put large values into a tensor group")
    return json.loads(text)


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in pieces, without a second copy of the model. Tensors may be tied or
    strided."""
    # The widest tensors come first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, stop = {}, 0
    for name in order:
        start, stop = stop, stop + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and fsync a new file. Return size and SHA-256 of the pieces, not of what the disk returns."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            view = memoryview(piece)
            digest.update(view)
            size += len(view)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _gather_parts(temporary: Path, world_size: int) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for rank in range(world_size):
        part = temporary / f"part{rank}.json"
        if not part.exists():
            raise RuntimeError(f"{temporary}: rank {rank} failed to write its part, so nothing was committed")
        files |= json.loads(part.read_bytes())
        os.unlink(part)
    return files


def _holds(final: Path, part: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the committed checkpoint contains the part that this rank wrote."""
    try:
        files = read_manifest(final).files
    except (Corrupt, OSError):
        return False
    return all(name in files and files[name].model_dump() == entry for name, entry in part.items())


def _delete_older(folder: Path, step: int, keep: int) -> None:
    """Delete all but ``keep`` − 1 older checkpoints. Checkpoints of later steps, which a load skipped as
    damaged, are neither counted nor deleted."""
    older = [path for path in list_checkpoints(folder) if step_of(path) < step]
    for path in older[: max(0, len(older) - (keep - 1))]:
        discard_folder(path)


def latest_step(folder: Path) -> int:
    """Return the step that a stage with this ``checkpoints`` folder resumes from (0 if it has none)."""
    return step_of(found[-1]) if (found := list_checkpoints(folder)) else 0


def remove_leftovers(folder: Path) -> None:
    """Remove the files of killed writers. Requires the folder's lock, because the files of a live writer look
    the same."""
    for path in [p for p in folder.iterdir() if _LEFTOVER.fullmatch(p.name)] if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)


def load_latest(
    folder: Path, *, rank: int = 0, world_size: int = 1, warn: Callable[[str], None]
) -> Checkpoint | None:
    """Load the newest intact checkpoint to the CPU. Returns None if the folder has no checkpoint.

    Every rank verifies the files of all ranks, so that all choose the same checkpoint without communication.
    If a single process saved the checkpoint, every rank reads all of it.

    Raises UserError if none of them is intact, or if one has a different world size or format."""
    if rank == 0 and folder.is_dir():
        # A concurrent writer or a read-only disk is not an error.
        with contextlib.suppress(UserError, OSError), exclusive(folder, patience=0) as locked:
            if locked:
                remove_leftovers(folder)
    candidates = list_checkpoints(folder)
    for path in reversed(candidates):
        try:
            return _load(path, rank, world_size)
        except (Corrupt, OSError) as error:
            warn(f"{path} is damaged and was skipped: {error}")
    if candidates:
        remedy = "restore one from a backup, or delete the folder to begin the stage again"
        raise UserError(f"{folder}: none of its {len(candidates)} checkpoints is intact; {remedy}")
    return None


def _load(path: Path, rank: int, world_size: int) -> Checkpoint:
    manifest = read_manifest(path)
    if (saved := manifest.world_size) not in (1, world_size):
        remedy = f"launch {saved} processes, or export the model and start from the export"
        fault = f"{path} was saved by {saved} processes and cannot be split for {world_size}"
        raise UserError(f"{fault}; {remedy}")
    for name, entry in manifest.files.items():
        _verify(path / name, entry)
    tensors = {}
    for name in manifest.files:
        match = SHARD.fullmatch(name)
        assert match, name
        if int(match[3]) != saved or int(match[2]) >= saved:
            raise Corrupt(f"{name} does not belong to a checkpoint of {saved} processes")
        if int(match[2]) == (rank if saved > 1 else 0):
            try:
                loaded = safetensors.torch.load_file(path / name)
            except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
                raise Corrupt(f"{name} is not a valid safetensors file: {error}") from None
            # Copies, because the loaded tensors are the mapped file, and the file may be deleted.
            tensors[match[1]] = {key: tensor.clone() for key, tensor in loaded.items()}
    return Checkpoint(step=manifest.step, tensors=tensors, state=manifest.state)


def _verify(path: Path, entry: File) -> None:
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise Corrupt(f"{path.name} has {size} bytes, but {entry.bytes} were written")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise Corrupt(f"{path.name} is not what was written (SHA-256 differs)")
