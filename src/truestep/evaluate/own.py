"""The user's own benchmarks: a file or a folder of files in place of a pinned benchmark's id.

    my.jsonl    a/folder    NAME=my.jsonl

A file has rows with a question and an answer, with or without choices: in the layouts of published benchmarks, or in any
that training reads. Its name is NAME or the file's, and its content is identified by a hash, as that of the
pinned ones is. Held by: tests/evaluate/test_own_benchmark.py
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from truestep.data.describe import describe
from truestep.data.layouts import column_of, read
from truestep.data.problems import load_problems
from truestep.data.rows import READ, Row, RowError, kind_of, read_rows
from truestep.errors import UserError, count, did_you_mean
from truestep.evaluate.benchmarks import BY_ID, Benchmark, problem_of
from truestep.evaluate.choice_columns import gathered
from truestep.evaluate.choice_rows import Numbered, lettered
from truestep.evaluate.sources import Item, content_hash, items_of
from truestep.records import Problem
from truestep.settings import DataSettings, parse

# Columns of rows with choices, or in two parts (sources.item_of); other rows are problems as for training.
_OF_ITEMS = {"choices", "options", "Correct Answer", "Body"}
_READ_OF_ITEMS = {
    *_OF_ITEMS, *(f"Incorrect Answer {n}" for n in (1, 2, 3)), "Question", "Answer", "question", "problem", "answer",
    "answerKey", "id", "Record ID", "question_id",
}  # fmt: skip
# Columns that items_of reads before the named one.
_SAME = {"problem": ("question", "Body"), "answer": ("answerKey",), "choices": ("options",)}
COLUMN = "--column OURS=THEIRS, such as --column problem=prompt_text --column answer=label"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def is_own(entry: str) -> bool:
    """Return whether an entry of evaluate.benchmarks names a file or a folder, not a pinned benchmark."""
    return entry not in BY_ID and (
        "=" in entry or "/" in entry or "\\" in entry or Path(entry).suffix != "" or Path(entry).is_dir()
    )


def load_own(
    entry: str,
    base_dir: Path,
    checker: str,
    columns: Mapping[str, str] | None = None,
    entries: Sequence[str] = (),
) -> list[tuple[Benchmark, list[Problem]]]:
    """Return the benchmarks of an entry, with all their problems. ``checker`` is one of settings.CHECKERS, or "auto":
    a row's own, "exact" for choices and otherwise "math". ``columns`` are names of columns by ours; of several files
    (those of all ``entries``), each is read with the ones that it has. A path is relative to ``base_dir`` or the
    current folder.

    Raises UserError that names file, row and field."""
    files, named = _files(entry, base_dir), columns or {}
    together = [path for one in entries or (entry,) for path, _ in _files(one, base_dir)]
    own = _own_columns(together, named) if named and len(together) > 1 else {}
    return [_load(path, name, checker, own.get(path, named)) for path, name in files]


def _own_columns(files: Sequence[Path], columns: Mapping[str, str]) -> dict[Path, dict[str, str]]:
    """Return the named columns that each file has. Raises UserError if none has one of them."""
    has = {
        path: {key for _, row in read_rows(path) if isinstance(row, dict) for key in row} for path in files
    }
    found = {
        path: {ours: of for ours, of in columns.items() if {of, of.partition(".")[0]} & keys}
        for path, keys in has.items()
    }
    for ours in (name for name in columns if not any(name in of for of in found.values())):
        hint = did_you_mean(columns[ours], sorted(set().union(*has.values())))
        fault = f'none of the {len(files)} files has the column that columns.{ours} = "{columns[ours]}" names'
        raise UserError(f"benchmarks: {fault}{hint or '; correct or remove it'}")
    return found


def _files(entry: str, base_dir: Path) -> list[tuple[Path, str]]:
    """Return the files of an entry, each with its benchmark's name. Raises UserError."""
    name, _, place = entry.rpartition("=")
    path = _found(Path(place).expanduser(), base_dir)
    if name and not _NAME.fullmatch(name):
        raise UserError(f'benchmarks: "{name}" is not a name; use only letters, digits, ".", "_" and "-"')
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if kind_of(f))
        if not files:
            raise UserError(f"benchmarks: the folder {path} has no {', '.join(READ)} file")
        return [(f, f"{name}-{_stem(f)}" if name else _stem(f)) for f in files]
    if not kind_of(path):
        raise UserError(f"benchmarks: {path}: expected a file with the ending {', '.join(READ)}")
    return [(path, name or _stem(path))]


def _stem(path: Path) -> str:
    return path.name.removesuffix(kind_of(path))


def _found(place: Path, base_dir: Path) -> Path:
    for path in (base_dir / place, place):
        if path.exists():
            return path
    near = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    hint = did_you_mean(place.name, near)
    raise UserError(
        f"benchmarks: no such file or folder: {place}{hint}; truestep eval list shows the pinned benchmarks"
    )


def _load(path: Path, name: str, checker: str, columns: Mapping[str, str]) -> tuple[Benchmark, list[Problem]]:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-") or "own"
    if name in BY_ID:
        raise UserError(
            f"benchmarks: {path} has the name of a pinned benchmark; give it another: my-{name}={path}"
        )
    rows = list(read_rows(path))
    items: Sequence[Item] = ()
    table = {"source": str(path), "checker": checker, "columns": dict(columns)}
    settings = parse(DataSettings, table, where="benchmarks")
    renamed, places = [(n, _renamed(row, columns)) for n, row in rows], list[str]()
    if not _has_items(renamed):
        renamed, places = gathered(renamed, columns)
    if "choices" in columns or _has_items(renamed):
        numbered, note = lettered(renamed)
        notes = [f"{', '.join(places)} are read as the choices"] if places else []
        with _hinted(rows, columns):
            items = items_of(str(path), name, numbered)
        used = {*_READ_OF_ITEMS, *places, *_heads(columns)}
        given = [row for _, row in rows if isinstance(row, dict)]
        unused = Counter(key for row in given for key in row if row[key] is not None and key not in used)
        is_choice = all(item.choices for item in items)
        if not is_choice and (mixed := [n for n, item in enumerate(items, start=1) if item.choices]):
            raise UserError(
                f"{path}:{mixed[0]}: choices: some rows have choices and some have none; use two files"
            )
        scorer = ("exact" if is_choice else "math") if checker == "auto" else checker
        own = _benchmark(name, items, "choice" if is_choice else "math", scorer)
        own = replace(own, mind="; ".join([*notes, *filter(None, [note]), *_not_used(unused)]))
        problems = [
            replace(problem_of(own, item, f"{path}:{number}"), columns=row)
            for item, (number, row) in zip(items, rows, strict=True)
            if isinstance(row, dict)
        ]
    else:
        with _hinted(rows, columns):
            problems = load_problems(name, settings, seed=0, base_dir=Path())
        items = [Item(id=p.id, question=p.question, answer=p.answer) for p in problems]
        own = _benchmark(name, items, "math", ",".join(sorted({p.checker for p in problems})))
        unused = Counter(describe(problems, {"answer"})["unused_columns"])
        own = replace(own, mind="; ".join(_not_used(unused)))
    return own, problems


def _has_items(rows: Sequence[Numbered]) -> bool:
    return any(isinstance(row, dict) and _OF_ITEMS & row.keys() for _, row in rows)


def _heads(columns: Mapping[str, str]) -> set[str]:
    return {*columns.values(), *(name.partition(".")[0] for name in columns.values())}


def _not_used(columns: Mapping[str, int]) -> list[str]:
    """Return a sentence about columns that are not read, by the number of rows that have them; [] without any."""
    names = [f"{name} ({count(num, 'row')})" for name, num in list(columns.items())[:10]]
    more = f" and {len(columns) - 10} more" if len(columns) > 10 else ""
    return [f"not used (only your own scorers get them): {', '.join(names)}{more}"] if names else []


def _renamed(row: Row | RowError, columns: Mapping[str, str]) -> Row | RowError:
    """Return a row with the named columns under our names, and without other columns of the same meaning."""
    if isinstance(row, RowError):
        return row
    try:
        named = {ours: column_of(row, theirs, ours)[0] for ours, theirs in columns.items()}
    except RowError as error:
        return error
    replaced = {other for ours in columns for other in _SAME.get(ours, ())}
    return {k: v for k, v in row.items() if k not in {*columns.values(), *replaced}} | named


@contextmanager
def _hinted(rows: Sequence[tuple[int, Row | RowError]], columns: Mapping[str, str]) -> Iterator[None]:
    """Add to an error about rows with unknown columns how to name them."""
    try:
        yield
    except UserError as error:
        hint = f"; for your own benchmark, pass {COLUMN}" if not columns and _is_unknown(rows) else ""
        raise UserError(*(f"{fault}{hint}" for fault in error.faults)) from None


def _is_unknown(rows: Sequence[tuple[int, Row | RowError]]) -> bool:
    """Return whether the first row has no question or no answer under any known name."""
    row = next((row for _, row in rows if isinstance(row, dict)), {})
    try:
        read_row = read(row, {}).row
    except RowError:
        return True
    return (
        not {"problem", "prompt", "messages"} & read_row.keys()
        or not {"answer", "solution"} & read_row.keys()
    )


def _benchmark(name: str, items: Sequence[Item], kind: str, scorer: str) -> Benchmark:
    return Benchmark(
        id=name, title=name, num_rows=len(items), content=content_hash(items), hub="",
        kind="choice" if kind == "choice" else "math", scorer=scorer, prompt="question",
    )  # fmt: skip
