"""Finds the files of a data source. In a folder, the names of files and subfolders say which split they are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from truestep.data.rows import SUFFIXES
from truestep.errors import UserError
from truestep.settings import DataSettings

SCHEMES = ("procedural", "reasoning_gym", "hub")
# Words in the names of files that say a split, as in gsm8k_train.jsonl, Test.parquet or train/part-1.jsonl.
SPLIT_NAMES = {
    "training": "train", "testing": "test",
    **{n: n for n in ("train", "test", "dev", "val", "valid", "validation", "eval", "evaluation", "holdout", "heldout")},
}  # fmt: skip
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SHARD = re.compile(r"-\d+(?:-of-\d+)?$")
# Suffixes of files that may contain data. Such a file in a folder is named if it is not read.
_DATA_SUFFIXES = (*SUFFIXES, ".json", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w-]*")
_SHOWN = 10  # files that are named; the others are counted


def existing(source: str, base_dir: Path) -> Path | None:
    """Return the path of a file or folder if it exists in the recipe's folder or else in the current one."""
    return next((path for path in _candidates(source, base_dir) if path.exists()), None)


def _candidates(source: str, base_dir: Path) -> list[Path]:
    wanted = Path(source).expanduser()
    return [wanted] if wanted.is_absolute() else [base_dir / wanted, wanted]


def find_source(name: str, source: str, base_dir: Path) -> Path:
    """Return the path that ``existing`` finds. Raises UserError if there is none."""
    if (path := existing(source, base_dir)) is not None:
        return path
    candidates = _candidates(source, base_dir)
    scheme, colon, _ = source.partition(":")
    if close := difflib.get_close_matches(scheme, SCHEMES, n=1) if colon else []:
        known = f'no such kind of source; did you mean "{close[0]}:..."?'
        raise UserError(f'data.{name}.source = "{source}": {known}')
    beside = [p for c in candidates if c.parent.is_dir() for p in c.parent.iterdir()]
    siblings = [str(p) for p in beside if p.is_dir() or p.suffix in SUFFIXES]
    near = [m for c in candidates for m in difflib.get_close_matches(str(c), siblings, n=1, cutoff=0.6)]
    if not near and colon == "" and _HUB_ID.fullmatch(source):
        near = [f"hub:{source}"]
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise UserError(f"{candidates[0]}: no such file or folder (data.{name}.source){hint}")


def source_files(name: str, path: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a source, and the data files of its folder that are not read.

    From a folder whose files or subfolders are named after splits, only those of ``split`` are read. If no name
    says a split, all files are training data. Raises UserError if a folder has no file of the split, or if a
    name says both train and another split."""
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            found = path.suffix or "no extension"
            raise UserError(f"{path}: expected a .jsonl or .parquet file, got {found}; convert it")
        return [path], []
    near = sorted(p for pattern in ("*", "*/*") for p in path.glob(pattern) if p.is_file())
    in_split = {path, *(sub for sub in path.iterdir() if sub.name.lower() in SPLIT_NAMES)}
    files = [p for p in near if p.suffix in SUFFIXES and p.parent in in_split]
    others = [p for p in near if p.suffix.lower() in _DATA_SUFFIXES]
    if not files:
        has = f"; it has {_listed(path, others)}" if others else ""
        expected = f"expected .jsonl or .parquet files in this folder (data.{name}.source), got none"
        raise UserError(f"{path}: {expected}{has}")
    said, split = {file: _splits(path, file) for file in files}, SPLIT_NAMES.get(split.lower(), split)
    chosen = [f for f in files if split in said[f] or split == _SHARD.sub("", f.stem)]
    present = sorted({s for splits in said.values() for s in splits})
    for file in chosen:
        if "train" in said[file] and len(said[file]) > 1 and split != _SHARD.sub("", file.stem):
            both = " and ".join(sorted(said[file]))
            remedy = f"rename it, or set data.{name}.source to a file"
            raise UserError(f"{file}: the name says {both}, so its split is not known; {remedy}")
    if not chosen and (present or split != "train"):
        known = f"this folder has {', '.join(present)}" if present else "no name of a file says a split"
        raise UserError(f'{path}: no file for split "{split}" (data.{name}.split); {known}')
    chosen = chosen or files
    return chosen, [p for p in others if p not in chosen]


def files_of(name: str, settings: DataSettings, base_dir: Path) -> tuple[list[str], list[str], str]:
    """Return the files that ``[data.NAME]`` reads, the data files beside them that it does not read, and a
    sentence about both ("" if the source is not a folder with several files)."""
    if settings.source.partition(":")[0] in SCHEMES:
        return [], [], ""
    path = find_source(name, settings.source, base_dir)
    used, left = source_files(name, path, settings.split)
    said = ""
    if len(used) > 1 or left:
        named = any(_splits(path, file) for file in used)
        why = f'split "{settings.split}"' if named else "no name says a split, so all"
        said = f"{path} ({why}): read {_listed(path, used)}"
        said += f"; not read: {_listed(path, left)}" if left else ""
    return [str(file) for file in used], [str(file) for file in left], said


def _splits(path: Path, file: Path) -> set[str]:
    """Return the splits that the name of a file in a folder says, with the name of its subfolder."""
    words = _WORD.findall(file.relative_to(path).with_suffix("").as_posix())
    return {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}


def _listed(path: Path, files: Sequence[Path]) -> str:
    names = [file.relative_to(path).as_posix() for file in files]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
