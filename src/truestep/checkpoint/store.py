"""Crash-safe checkpoints, which contain only safetensors and JSON. One rename commits each of them.

    step_00000012/              committed: every file is named in manifest.json with its size and SHA-256, and
                                every tensor with its shape and the first row of each rank's part
        GROUP.rank00000-of-00002.safetensors   manifest.json
    step_00000012.tmp-write/    being written: never read, removed by the next save or load
    step_00000012.tmp-discard/  being deleted: never read, removed by the next save or load
    step_00000012.aside/        old version while the same step is replaced: read if nothing newer exists
    latest                      the newest checkpoint's name, for people; no code reads it

A tensor that is the same on all ranks is saved once, by rank 0. All ranks share one file system. After each
phase, the ranks tell each other whether it succeeded, so that a full disk on one rank cannot make the others
hang."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truestep.checkpoint import folders
from truestep.checkpoint.folders import discard_folder, exclusive
from truestep.checkpoint.layout import Checkpoint, Claim, RowsOf, every_row, joined
from truestep.checkpoint.manifest import (
    FORMAT,
    GROUP,
    MANIFEST_LIMIT,
    STEP,
    Corrupt,
    list_checkpoints,
    step_of,
)  # fmt: skip
from truestep.checkpoint.manifest import digest as _digest
from truestep.checkpoint.reader import DTYPES, file_name, read_checkpoint
from truestep.errors import OutOfSpace, UserError
from truestep.rundir import NO_SPACE, fsync_folder, write_atomic

Gather = Callable[[Any], list[Any]]  # returns the JSON values of all ranks, in their order (a collective)
_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_LEFTOVER = re.compile(STEP.pattern + r"\.tmp-(write|discard)|\.latest\..*")
_PATIENCE = 30.0  # seconds; a reader may hold the lock while it removes leftovers


def only_own(value: Any) -> list[Any]:
    """Gather the values of all ranks if there is one process."""
    return [value]


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    keep: int,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = only_own,
) -> Path:
    """Write and commit a checkpoint, then delete older ones, so that ``keep`` remain with it.

    Every rank calls this with the same step, group names and tensor names. A rank writes its rows of split
    tensors; rank 0 also writes the state and the tensors that are the same everywhere.

    Raises OutOfSpace if the disk is full, UserError if another process is saving here, RuntimeError if
    another rank failed, and ValueError for values that cannot be stored."""
    state, own = _checked(checkpoint, keep, rank, world_size), _own(checkpoint, rank)
    final = folder / f"step_{checkpoint.step:08d}"
    temporary = final.with_name(f"{final.name}.tmp-write")
    told: list[Any] = []  # what each rank's last phase has returned

    def prepare() -> int:
        if rank == 0:
            stack.enter_context(exclusive(folder, _PATIENCE))
            remove_leftovers(folder)
            temporary.mkdir()
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # frees the space after a failure
        return sum(t.nbytes for group in own.values() for t in group.values())

    def write() -> dict[str, Any]:
        folders.require_space(folder, sum(told))
        named = {file_name(group, rank, world_size): tensors for group, tensors in own.items()}
        files = {name: _write_file(temporary / name, _safetensors(t)) for name, t in named.items()}
        return {"files": files, "claims": _claims(checkpoint)}

    def commit() -> None:
        if rank == 0:
            body: dict[str, Any] = {"format": FORMAT, "step": checkpoint.step, "world_size": world_size}
            body["files"] = {name: entry for part in told for name, entry in part["files"].items()}
            body["tensors"] = joined(_entries(checkpoint), [part["claims"] for part in told])
            body["state"] = state
            document = json.dumps({"sha256": _digest(body), **body}, indent=1)
            if len(document) > MANIFEST_LIMIT:
                raise ValueError(f"{final}: manifest.json has {len(document)} bytes, more than is read again")
            _write_file(temporary / "manifest.json", [document.encode()])
            fsync_folder(temporary)
            folders.replace_folder(temporary, final)
            write_atomic(folder / "latest", final.name + "\n")
            _delete_older(folder, checkpoint.step, keep)

    failure: Exception | None = None
    with contextlib.ExitStack() as stack:  # rank 0 keeps the lock until all ranks have written
        for phase in (prepare, write, commit):
            done: Any = None
            try:
                done = phase()
            except (OSError, RuntimeError, ValueError, UserError) as error:
                failure = error
            answers = gather([failure is None, done])
            if failure is None and (failed := [i for i, (is_done, _) in enumerate(answers) if not is_done]):
                failure = RuntimeError(f"{final} was not saved: rank {failed[0]} failed to write its part")
            if failure is not None:
                break
            told = [answer for _, answer in answers]
    if isinstance(failure, OSError) and failure.errno in NO_SPACE:
        raise OutOfSpace(f"{folder}: no space for a checkpoint of step {checkpoint.step} ({failure.strerror}); the "
                         "previous one is intact; free disk space and resume") from failure  # fmt: skip
    if failure is not None:
        raise failure
    return final


def _own(checkpoint: Checkpoint, rank: int) -> dict[str, dict[str, Tensor]]:
    """Return what this rank writes, by group. Rank 0 writes a file for every group."""
    found: dict[str, dict[str, Tensor]] = {}
    for group, tensors in checkpoint.tensors.items():
        shares = checkpoint.shares.get(group, {})
        own = {name: t for name, t in tensors.items() if (t.shape[0] if name in shares else rank == 0)}
        if rank == 0 or own:
            found[group] = own
    return found


def _entries(checkpoint: Checkpoint) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the manifest's entry of every tensor, as if no tensor were split."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, tensors in checkpoint.tensors.items():
        shapes = {name: t.shape for name, t in tensors.items()}
        shapes |= {name: torch.Size(s.shape) for name, s in checkpoint.shares.get(group, {}).items()}
        found[group] = {
            n: {"dtype": _DTYPES[tensors[n].dtype], "shape": [*shapes[n]]} for n in sorted(tensors)
        }
    return found


def _claims(checkpoint: Checkpoint) -> dict[str, dict[str, Claim]]:
    """Return the first row and the number of rows of every split tensor that this rank has."""
    return {
        group: {name: (s.start, checkpoint.tensors[group][name].shape[0]) for name, s in shares.items()}
        for group, shares in checkpoint.shares.items()
    }


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
        whole = tensors[name].detach().cpu().contiguous()
        # A contiguous tensor with at most one element, such as a short part, may have any stride.
        flat = whole.as_strided((whole.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data


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
    folder: Path,
    *,
    rank: int = 0,
    gather: Gather = only_own,
    rows_of: RowsOf = every_row,
    warn: Callable[[str], None],
) -> Checkpoint | None:
    """Load the newest intact checkpoint to the CPU. Returns None if the folder has no checkpoint.

    Every rank reads the rows that ``rows_of`` returns, and verifies the files that contain them. If any of
    these files is damaged, all ranks load an older checkpoint.

    Raises UserError on all ranks if no checkpoint is intact, or if one has a different format."""
    if rank == 0 and folder.is_dir():
        # A concurrent writer or a read-only disk is not an error.
        with contextlib.suppress(UserError, OSError), exclusive(folder, patience=0) as locked:
            if locked:
                remove_leftovers(folder)
    names = gather([path.name for path in list_checkpoints(folder)])[0]
    for path in (folder / name for name in reversed(names)):
        loaded, fault, refusal = None, "", ""
        try:
            loaded = read_checkpoint(path, rows_of)
        except (Corrupt, OSError) as error:
            fault = str(error)
        except UserError as error:
            refusal = str(error)
        answers = gather([fault, refusal])
        if refusals := [text for _, text in answers if text]:
            raise UserError(refusals[0])
        if not (faults := [text for text, _ in answers if text]):
            return loaded
        warn(f"{path} is damaged and was skipped: {faults[0]}")
    if names:
        remedy = "restore one from a backup, or delete the folder to begin the stage again"
        raise UserError(f"{folder}: none of its {len(names)} checkpoints is intact; {remedy}")
    return None
