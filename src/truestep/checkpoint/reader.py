"""Reads a checkpoint: verifies the files that contain the wanted rows, and only those, and puts the rows
together. The number of ranks that saved it does not matter."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from truestep.checkpoint.layout import Checkpoint, Entry, Rows, RowsOf
from truestep.checkpoint.manifest import (
    GROUP,
    SHARD,
    WITHOUT_LAYOUT,
    Corrupt,
    File,
    Manifest,
    read_manifest,
    regular_file,
)
from truestep.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def file_name(group: str, rank: int, world_size: int) -> str:
    return f"{group}.rank{rank:05d}-of-{world_size:05d}.safetensors"


def read_checkpoint(path: Path, rows_of: RowsOf) -> Checkpoint:
    """Return the checkpoint with the wanted rows of every tensor, on the CPU.

    Raises Corrupt if a file with wanted rows is not what was written, and UserError if several processes saved
    the checkpoint in the format that did not record which rows each of them had."""
    manifest = read_manifest(path)
    if manifest.tensors is not None:
        layout: Mapping[str, Mapping[str, Entry]] = manifest.tensors
    elif manifest.world_size == 1:
        layout = _layout_of_files(path, manifest)
    else:
        saved = manifest.world_size
        fault = (
            f"{path} was saved by {saved} processes of an older version of truestep (format {WITHOUT_LAYOUT})"
        )
        remedy = f"finish the stage with that version and {saved} processes, and continue from its export"
        raise UserError(f"{fault}, which did not record how the tensors are split; {remedy}")
    tensors = {group: _read_group(path, manifest, group, layout[group], rows_of) for group in layout}
    return Checkpoint(step=manifest.step, tensors=tensors, state=manifest.state)


def _read_group(
    path: Path, manifest: Manifest, group: str, entries: Mapping[str, Entry], rows_of: RowsOf
) -> dict[str, Tensor]:
    if not GROUP.fullmatch(group):
        raise Corrupt(f"{group!r} cannot name a group of tensors")
    rows = {name: rows_of(group, name, tuple(entry.shape)) for name, entry in entries.items()}
    # Rank 0's file has everything that is not split, even if that is nothing.
    ranks = {0} if not all(entry.starts for entry in entries.values()) or not entries else set()
    ranks |= {rank for name, entry in entries.items() for rank, _, _ in entry.pieces(rows[name])}
    names = {rank: file_name(group, rank, manifest.world_size) for rank in sorted(ranks)}
    for name in names.values():
        if name not in manifest.files:
            raise Corrupt(f"manifest.json does not list {name}")
        _verify(path / name, manifest.files[name])
    with contextlib.ExitStack() as stack:
        files = {rank: _open(path / name, stack) for rank, name in names.items()}
        return {name: _read(files, names, name, entry, rows[name]) for name, entry in entries.items()}


def _read(files: Mapping[int, Any], names: Mapping[int, str], name: str, entry: Entry, rows: Rows) -> Tensor:
    """Return the rows of one tensor, which no longer depend on the files."""
    found = []
    for rank, num_rows, (first, stop) in entry.pieces(rows):
        try:
            view = files[rank].get_slice(name)
            got = [view.get_dtype(), *view.get_shape()]
            expected = [entry.dtype, *([num_rows, *entry.shape[1:]] if entry.shape else [])]
            if got != expected:
                raise ValueError(f"{name!r} is {got}, but manifest.json has {expected}")
            found.append(view[first:stop] if entry.shape else files[rank].get_tensor(name))
        except (SafetensorError, KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise Corrupt(
                f"{names[rank]} is not a valid safetensors file of this checkpoint: {error}"
            ) from None
    if not found:
        if entry.dtype not in DTYPES:
            raise Corrupt(f"manifest.json: {name!r} has the unknown dtype {entry.dtype!r}")
        return torch.empty((rows[1] - rows[0], *entry.shape[1:]), dtype=DTYPES[entry.dtype])
    # Copies, because the loaded tensors are the mapped file, and the file may be deleted.
    return torch.cat(found) if len(found) > 1 else found[0].clone()


def _layout_of_files(path: Path, manifest: Manifest) -> dict[str, dict[str, Entry]]:
    """Return the entries of a checkpoint that one process saved without a layout, from its files' headers."""
    layout: dict[str, dict[str, Entry]] = {}
    for name, entry in manifest.files.items():
        _verify(path / name, entry)
        match = SHARD.fullmatch(name)
        assert match, name
        with contextlib.ExitStack() as stack:
            file = _open(path / name, stack)
            views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            layout[match[1]] = {
                k: Entry(dtype=view.get_dtype(), shape=view.get_shape()) for k, view in views.items()
            }
    return layout


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise Corrupt(f"{path.name} is not a valid safetensors file: {error}") from None


def _verify(path: Path, entry: File) -> None:
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise Corrupt(f"{path.name} has {size} bytes, but {entry.bytes} were written")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise Corrupt(f"{path.name} is not what was written (SHA-256 differs)")
