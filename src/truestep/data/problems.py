"""Loads problems from files, folders, the hub or a program. All rows are checked before any is used."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from truestep.data import gym, procedural
from truestep.data.row_schema import problem_of
from truestep.data.rows import SUFFIXES, Row, RowError, read_rows
from truestep.errors import UserError
from truestep.records import Problem
from truestep.settings import DataSettings

SHOWN_FAULTS = 10  # bad rows that are shown; all are counted
SCHEMES = ("procedural", "reasoning_gym", "hub")
# File names of splits. From a folder that has such files, only those of the split are read.
SPLIT_NAMES = ("train", "test", "dev", "val", "valid", "validation", "eval", "evaluation")


class BadRows(UserError):
    """Error for rows that cannot be used. ``count`` is their number, and ``first`` has the first faults."""

    def __init__(self, count: int, first: Sequence[str]) -> None:
        more = f" (and {count - 1} more bad row{'s' if count > 2 else ''})" if count > 1 else ""
        super().__init__(first[0] + more)
        self.count, self.first = count, list(first)


def load_problems(
    name: str, settings: DataSettings, *, seed: int, base_dir: Path, needs: Collection[str] = ("answer",)
) -> list[Problem]:
    """Return the problems of ``[data.NAME]``: at most ``limit``, without the first ``skip``.

    ``needs`` names what every row must have: "answer" (RL, evaluation), "solution" (SFT), or both; if it is
    empty, one of them is enough. Raises UserError that names file, row (1-based) and field, or setting."""
    return list(stream_problems(name, settings, seed=seed, base_dir=base_dir, needs=needs))


def stream_problems(
    name: str, settings: DataSettings, *, seed: int, base_dir: Path, needs: Collection[str] = ("answer",)
) -> Iterator[Problem]:
    """Yield what ``load_problems`` returns. A fault is raised at the end, when all rows have been checked."""
    scheme, _, rest = settings.source.partition(":")
    if scheme in ("procedural", "reasoning_gym"):
        yield from _generated(name, scheme, rest, settings, seed, needs)
        return
    if scheme == "hub":
        label = f"hub:{rest}[{settings.split}]"
        rows = _hub_rows(name, rest, settings)
        problems = _validated([(label, rows)], rest.split("/")[-1], settings, needs)
    else:
        if settings.options:
            found = ", ".join(settings.options)
            raise UserError(f"data.{name}.options: a file has no options, got {found}; remove them")
        path = find_source(name, settings.source, base_dir)
        files = _files(name, path, settings.split)
        problems = _validated([(str(file), read_rows(file)) for file in files], "", settings, needs)
        label = str(path)
    yield from _cut(name, label, problems, settings)


def _generated(
    name: str, scheme: str, task: str, settings: DataSettings, seed: int, needs: Collection[str]
) -> list[Problem]:
    """Return problems that a program generates. It could make any number, so ``limit`` must be set."""
    where = f"data.{name}"
    if settings.limit == "all":
        raise UserError(
            f"{where}.limit: {scheme} can make any number of problems; set limit = N, e.g. limit = 1000"
        )
    if settings.checker != "auto":
        raise UserError(
            f'{where}.checker: {scheme} tasks have their own checker; set checker = "auto" or remove it'
        )
    if scheme == "reasoning_gym" and "solution" in needs:
        raise UserError(f"{where}.source: reasoning_gym has no worked solutions for SFT; use procedural")
    make = procedural.make_problems if scheme == "procedural" else gym.make_problems
    seed = seed if settings.seed == "run" else settings.seed
    stop = settings.skip + settings.limit
    try:
        return make(task, settings.split, stop, settings.options, seed)[settings.skip :]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _validated(
    sources: Iterable[tuple[str, Iterable[tuple[int, Row | RowError]]]],
    stem: str,
    settings: DataSettings,
    needs: Collection[str],
) -> Iterator[Problem]:
    """Yield every good row of every (label, rows) pair as a problem. Raises BadRows at the end if there are
    bad rows. Ids are compared by 64-bit hashes."""
    used: dict[int, int] = {}  # hash of an id → its row: 2**20 × the row's number + the file's
    labels: list[str] = []
    first: list[str] = []
    num_bad = 0
    for label, rows in sources:
        prefix = stem or Path(label).stem
        labels.append(label)
        for number, row in rows:
            where = f"{label}:{number}"
            try:
                if isinstance(row, RowError):
                    raise row
                id = f"{prefix}-{number}"
                problem = problem_of(row, id=id, where=where, checker=settings.checker, needs=needs)
                place = (number << 20) + len(labels) - 1
                if (other := used.setdefault(hash(problem.id), place)) != place:
                    holder = f"{labels[other % 2**20]}:{other >> 20}"
                    raise RowError("id", f'expected a unique id, got "{problem.id}", which {holder} also has')
            except RowError as error:
                num_bad += 1
                if num_bad <= SHOWN_FAULTS:
                    first.append(f"{where}: {error}")
            else:
                yield problem
    if num_bad:
        raise BadRows(num_bad, first)


def _cut(name: str, label: str, problems: Iterable[Problem], settings: DataSettings) -> Iterator[Problem]:
    num = 0
    for num, problem in enumerate(problems, start=1):
        if settings.skip < num and (settings.limit == "all" or num <= settings.skip + settings.limit):
            yield problem
    if not num:
        raise UserError(f"{label}: expected at least one row, got none")
    available = num - settings.skip
    if available <= 0:
        rows = f"{num} rows of {label}"
        raise UserError(f"data.{name}.skip = {settings.skip} leaves none of the {rows}; set a smaller skip")
    if settings.limit != "all" and settings.limit > available:
        after = f" after skip = {settings.skip}" if settings.skip else ""
        raise UserError(
            f"data.{name}.limit = {settings.limit} is more than the {available} rows that {label} has{after}; "
            f'set limit = {available} or limit = "all"'
        )


def find_source(name: str, source: str, base_dir: Path) -> Path:
    """Return the path of a file or folder, looked up in the recipe's folder and then in the current one."""
    wanted = Path(source).expanduser()
    candidates = [wanted] if wanted.is_absolute() else [base_dir / wanted, wanted]
    for path in candidates:
        if path.exists():
            return path
    scheme, colon, _ = source.partition(":")
    if close := difflib.get_close_matches(scheme, SCHEMES, n=1) if colon else []:
        known = f'no such kind of source; did you mean "{close[0]}:..."?'
        raise UserError(f'data.{name}.source = "{source}": {known}')
    beside = [p for c in candidates if c.parent.is_dir() for p in c.parent.iterdir()]
    siblings = [str(p) for p in beside if p.is_dir() or p.suffix in SUFFIXES]
    near = [m for c in candidates for m in difflib.get_close_matches(str(c), siblings, n=1, cutoff=0.6)]
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise UserError(f"{candidates[0]}: no such file or folder (data.{name}.source){hint}")


def _files(name: str, path: Path, split: str) -> list[Path]:
    """Return the files of a source. If a folder has files named after splits, return those of ``split``."""
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            found = path.suffix or "no extension"
            raise UserError(f"{path}: expected a .jsonl or .parquet file, got {found}; convert it")
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise UserError(
            f"{path}: expected .jsonl or .parquet files in this folder (data.{name}.source), got none"
        )
    named = {file: file.stem.split("-")[0] for file in files}
    chosen = [file for file in files if split in (named[file], file.stem)]
    present = sorted({s for s in named.values() if s in SPLIT_NAMES})
    if not chosen and present:
        known = ", ".join(present)
        raise UserError(f'{path}: no file for split "{split}" (data.{name}.split); this folder has {known}')
    return chosen or files


def _hub_rows(name: str, repository: str, settings: DataSettings) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a Hugging Face hub data set, from its local cache if HF_HUB_OFFLINE=1 is set."""
    where = f'data.{name}.source = "hub:{repository}"'
    for key in settings.options:
        if key != "config":
            raise UserError(f"data.{name}.options.{key}: a hub source has only the option config (a subset)")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f'{where} needs the datasets package; run pip install "truestep[hub]"') from None
    try:
        config, split = settings.options.get("config"), settings.split
        table: Any = datasets.load_dataset(repository, config, split=split, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} cannot be loaded: {reason}") from None
    for number, row in enumerate(table, start=1):
        yield number, dict(row)
