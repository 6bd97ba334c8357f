"""The user's own benchmarks: a file or a folder of files in place of a pinned benchmark's id.

    my.jsonl    a/folder    NAME=my.jsonl

A file has rows with a question and an answer, with or without choices: in the layouts of published benchmarks, or in any
that training reads. Its name is NAME or the file's, and its content is identified by a hash, as that of the
pinned ones is. Held by: tests/evaluate/test_own_benchmark.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from truestep.data.problems import load_problems
from truestep.data.rows import READ, kind_of, read_rows
from truestep.errors import UserError
from truestep.evaluate.benchmarks import BY_ID, Benchmark, problem_of
from truestep.evaluate.sources import Item, content_hash, items_of
from truestep.records import Problem
from truestep.settings import DataSettings

# Columns of rows with choices, or in two parts (sources.item_of); other rows are problems as for training.
_OF_ITEMS = {"choices", "options", "Correct Answer", "Body"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def is_own(entry: str) -> bool:
    """Return whether an entry of evaluate.benchmarks names a file or a folder, not a pinned benchmark."""
    return entry not in BY_ID and (
        "=" in entry or "/" in entry or "\\" in entry or Path(entry).suffix != "" or Path(entry).is_dir()
    )


def load_own(entry: str, base_dir: Path, checker: str) -> list[tuple[Benchmark, list[Problem]]]:
    """Return the benchmarks of an entry, with all their problems. ``checker`` is one of settings.CHECKERS, or "auto":
    a row's own, "exact" for choices and otherwise "math". A path is relative to ``base_dir`` or the current folder.

    Raises UserError that names file, row and field."""
    name, _, place = entry.rpartition("=")
    path = _found(Path(place).expanduser(), base_dir)
    if name and not _NAME.fullmatch(name):
        raise UserError(f'benchmarks: "{name}" is not a name; use only letters, digits, ".", "_" and "-"')
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if kind_of(f))
        if not files:
            raise UserError(f"benchmarks: the folder {path} has no {', '.join(READ)} file")
        return [_load(f, f"{name}-{_stem(f)}" if name else _stem(f), checker) for f in files]
    if not kind_of(path):
        raise UserError(f"benchmarks: {path}: expected a file with the ending {', '.join(READ)}")
    return [_load(path, name or _stem(path), checker)]


def _stem(path: Path) -> str:
    return path.name.removesuffix(kind_of(path))


def _found(place: Path, base_dir: Path) -> Path:
    for path in (base_dir / place, place):
        if path.exists():
            return path
    raise UserError(
        f"benchmarks: no such file or folder: {place}; truestep eval list shows the pinned benchmarks"
    )


def _load(path: Path, name: str, checker: str) -> tuple[Benchmark, list[Problem]]:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-") or "own"
    if name in BY_ID:
        raise UserError(
            f"benchmarks: {path} has the name of a pinned benchmark; give it another: my-{name}={path}"
        )
    rows = list(read_rows(path))
    items: Sequence[Item] = ()
    if any(isinstance(row, dict) and _OF_ITEMS & row.keys() for _, row in rows):
        items = items_of(str(path), name, rows)
        is_choice = all(item.choices for item in items)
        if not is_choice and (mixed := [n for n, item in enumerate(items, start=1) if item.choices]):
            raise UserError(
                f"{path}:{mixed[0]}: choices: some rows have choices and some have none; use two files"
            )
        scorer = ("exact" if is_choice else "math") if checker == "auto" else checker
        own = _benchmark(name, items, "choice" if is_choice else "math", scorer)
        problems = [
            replace(problem_of(own, item, f"{path}:{number}"), columns=row)
            for item, (number, row) in zip(items, rows, strict=True)
            if isinstance(row, dict)
        ]
    else:
        settings = DataSettings.model_validate({"source": str(path), "checker": checker})
        problems = load_problems(name, settings, seed=0, base_dir=Path())
        items = [Item(id=p.id, question=p.messages[-1].content, answer=p.answer) for p in problems]
        own = _benchmark(name, items, "math", ",".join(sorted({p.checker for p in problems})))
    return own, problems


def _benchmark(name: str, items: Sequence[Item], kind: str, scorer: str) -> Benchmark:
    return Benchmark(
        id=name, title=name, num_rows=len(items), content=content_hash(items), hub="",
        kind="choice" if kind == "choice" else "math", scorer=scorer, prompt="question",
    )  # fmt: skip
