"""Finds the files of a data source. In a folder, the names of files and subfolders say which split they are."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from truestep.data.rows import SUFFIXES, kind_of
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
_DATA_SUFFIXES = (
    *SUFFIXES,
    ".ndjson",
    ".json",
    ".csv",
    ".tsv",
    ".arrow",
    ".gz",
    ".zst",
    ".xz",
    ".bz2",
    ".zip",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w-]*")
_SHOWN = 10  # files that are named; the others are counted
_EXPECTED = "a .jsonl, .json, .csv, .tsv or .parquet file (all but parquet also with .gz)"


def sources_of(settings: DataSettings) -> tuple[str, ...]:
    """Return the paths, patterns or schemes of a data set, of which most have one."""
    return (settings.source,) if isinstance(settings.source, str) else settings.source


def is_local(source: str) -> bool:
    """Return whether a source is read from files in a folder of this machine."""
    return source.partition(":")[0] not in SCHEMES


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
    siblings = [str(p) for p in beside if p.is_dir() or kind_of(p)]
    near = [m for c in candidates for m in difflib.get_close_matches(str(c), siblings, n=1, cutoff=0.6)]
    if not near and colon == "" and _HUB_ID.fullmatch(source):
        near = [f"hub:{source}"]
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise UserError(f"{candidates[0]}: no such file or folder (data.{name}.source){hint}")


def _matches(name: str, pattern: str, base_dir: Path) -> list[Path]:
    """Return the files that match a pattern such as data/part-*.jsonl, sorted, from the recipe's folder or, if it
    has none, from the current one."""
    wanted = Path(pattern).expanduser()
    for pattern_path in [wanted] if wanted.is_absolute() else [base_dir / wanted, wanted]:
        found = [Path(p) for p in sorted(glob.glob(str(pattern_path), recursive=True)) if Path(p).is_file()]
        if found:
            if other := next((p for p in found if not kind_of(p)), None):
                raise UserError(
                    f"{other} matches data.{name}.source, but is not {_EXPECTED}; change the pattern"
                )
            return found
    raise UserError(f'data.{name}.source = "{pattern}": no file matches; correct the pattern')


def absolute_source(data: DataSettings, base_dir: Path) -> str | tuple[str, ...]:
    """Return the source with absolute paths and patterns of files that exist; others are returned as they are."""

    def absolute(source: str) -> str:
        if (path := existing(source, base_dir)) is not None:
            return str(path.absolute())
        places = [
            p
            for p in _candidates(source, base_dir)
            if is_local(source) and any(sign in source for sign in "*?[")
        ]
        return next((str(p.absolute()) for p in places if glob.glob(str(p), recursive=True)), source)

    return absolute(data.source) if isinstance(data.source, str) else tuple(map(absolute, data.source))


def local_files(
    name: str, settings: DataSettings, base_dir: Path
) -> list[tuple[Path, list[Path], list[Path]]]:
    """Return for every source its path, the files that are read, and the data files of its folder that are not.
    Raises UserError if there are none, or if two sources have the same file."""
    found: list[tuple[Path, list[Path], list[Path]]] = []
    for source in sources_of(settings):
        if len(sources_of(settings)) > 1 and not is_local(source):
            remedy = "make it a data set, and give the stage several: data = [{ name = ... }, ...]"
            raise UserError(f'data.{name}.source: a list can have only files, got "{source}"; {remedy}')
        is_pattern = any(sign in source for sign in "*?[") and not (base_dir / source).exists()
        if is_pattern and not Path(source).exists():
            found.append((Path(source), _matches(name, source, base_dir), []))
        else:
            path = find_source(name, source, base_dir)
            found.append((path, *source_files(name, path, settings.split)))
    files = [file.resolve() for _, used, _ in found for file in used]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise UserError(f"data.{name}.source: {twice} is read twice; remove one of the two")
    return found


def source_files(name: str, path: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a source, and the data files of its folder that are not read.

    From a folder whose files or subfolders are named after splits, only those of ``split`` are read. If no name
    says a split, all files are training data. JSON arrays, CSV and compressed files are read from a folder only
    if it has no .jsonl or .parquet files. Raises UserError if a folder has no file of the split, or if a name
    says both train and another split."""
    if not path.is_dir():
        if not kind_of(path):
            raise UserError(f"{path}: expected {_EXPECTED}, got {path.suffix or 'no extension'}; convert it")
        return [path], []
    near = sorted(p for pattern in ("*", "*/*") for p in path.glob(pattern) if p.is_file())
    in_split = {path, *(sub for sub in path.iterdir() if sub.name.lower() in SPLIT_NAMES)}
    readable = [p for p in near if p.parent in in_split and kind_of(p)]
    files = [p for p in readable if kind_of(p) in SUFFIXES] or readable
    others = [p for p in near if p.suffix.lower() in _DATA_SUFFIXES]
    if not files:
        has = f"; it has {_listed(path, others)}" if others else ""
        raise UserError(f"{path}: expected {_EXPECTED} in this folder (data.{name}.source), got none{has}")
    said, split = {file: _splits(path, file) for file in files}, SPLIT_NAMES.get(split.lower(), split)
    chosen = [f for f in files if split in said[f] or split == _stem(f)]
    present = sorted({s for splits in said.values() for s in splits})
    for file in chosen:
        if "train" in said[file] and len(said[file]) > 1 and split != _stem(file):
            both = " and ".join(sorted(said[file]))
            remedy = f"rename it, or set data.{name}.source to a file"
            raise UserError(f"{file}: the name says {both}, so its split is not known; {remedy}")
    if not chosen and (present or split != "train"):
        known = f"this folder has {', '.join(present)}" if present else "no name of a file says a split"
        raise UserError(f'{path}: no file for split "{split}" (data.{name}.split); {known}')
    chosen = chosen or files
    return chosen, [p for p in others if p not in chosen]


def _stem(file: Path) -> str:
    """Return the name of a file without its suffix and the number of a shard."""
    return _SHARD.sub("", file.name[: len(file.name) - len(kind_of(file))])


def files_of(name: str, settings: DataSettings, base_dir: Path) -> tuple[list[str], list[str], str]:
    """Return the files that ``[data.NAME]`` reads, the data files beside them that it does not read, and a
    sentence about both ("" if the source is a single file)."""
    if not is_local(sources_of(settings)[0]):
        return [], [], ""
    sources, said = local_files(name, settings, base_dir), []
    for path, used, left in sources:
        if not path.is_dir():
            said += [f"{path}: read {_listed(path.parent, used)}"] if len(used) > 1 else []
        elif len(used) > 1 or left:
            named = any(_splits(path, file) for file in used)
            why = f'split "{settings.split}"' if named else "no name says a split, so all"
            rest = f"; not read: {_listed(path, left)}" if left else ""
            said.append(f"{path} ({why}): read {_listed(path, used)}{rest}")
    used_files = [str(file) for _, used, _ in sources for file in used]
    return used_files, [str(file) for _, _, left in sources for file in left], "; ".join(said)


def _splits(path: Path, file: Path) -> set[str]:
    """Return the splits that the name of a file in a folder says, with the name of its subfolder."""
    words = _WORD.findall(file.relative_to(path).with_suffix("").as_posix())
    return {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}


def _listed(path: Path, files: Sequence[Path]) -> str:
    names = [file.relative_to(path).as_posix() if file.is_relative_to(path) else str(file) for file in files]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
