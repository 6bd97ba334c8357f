"""Loads problems from files, folders, the hub or a program. All rows are checked before any is used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from truestep.data import gym, procedural
from truestep.data.files import local_files, sources_of
from truestep.data.row_schema import problem_of
from truestep.data.rows import Row, RowError, kind_of, read_rows, shortest
from truestep.errors import UserError
from truestep.records import Problem
from truestep.settings import DataSettings

T = TypeVar("T")
SHOWN_FAULTS = 10  # different faults that are shown; all bad rows are counted


class BadRows(UserError):
    """Error for rows that cannot be used. ``count`` is their number, and ``first`` has the first faults."""

    def __init__(
        self, count: int, first: Sequence[str], remedy: str = "; truestep data check lists them"
    ) -> None:
        more = f" (and {count - 1} more bad row{'s' if count > 2 else ''}{remedy})" if count > 1 else ""
        super().__init__(first[0] + more)
        self.count, self.first = count, list(first)


def load_problems(
    name: str, settings: DataSettings, *, seed: int, base_dir: Path, needs: Collection[str] = ("answer",)
) -> list[Problem]:
    """Return the problems of ``[data.NAME]``: at most ``limit``, without the first ``skip``.

    ``needs`` names what every row must have: "answer" (RL, evaluation), "solution" (SFT), or both; if it is
    empty, one of them is enough. Raises UserError that names file, row (1-based) and field, or setting."""
    return list(stream_problems(name, settings, seed=seed, base_dir=base_dir, needs=needs))


def each_row(problems: Iterable[Problem], work: Callable[[Problem], T]) -> Iterator[tuple[Problem, T]]:
    """Yield every problem with ``work`` of it. Raises BadRows at the end if it refuses some of them, or if some could
    not be read. A fault that does not begin with the row is one of all rows, and is raised at once."""
    first, num_bad = list[str](), 0
    try:
        for problem in problems:
            try:
                made = work(problem)
            except UserError as error:
                if not str(error).startswith(problem.row or problem.id):
                    raise
                num_bad += 1
                first += [str(error)] if len(first) < SHOWN_FAULTS else []
            else:
                yield problem, made
    except BadRows as error:
        num_bad, first = num_bad + error.count, [*error.first, *first][:SHOWN_FAULTS]
    if num_bad:
        raise BadRows(num_bad, first)


def stream_problems(
    name: str, settings: DataSettings, *, seed: int, base_dir: Path, needs: Collection[str] = ("answer",)
) -> Iterator[Problem]:
    """Yield what ``load_problems`` returns. A fault is raised at the end, when all rows have been checked."""
    first, *_ = sources_of(settings)
    scheme, _, rest = first.partition(":")
    if len(sources_of(settings)) == 1 and scheme in ("procedural", "reasoning_gym"):
        yield from _generated(name, scheme, rest, settings, seed, needs)
        return
    if len(sources_of(settings)) == 1 and scheme == "hub":
        label = f"hub:{rest}[{settings.split}]"
        rows = _hub_rows(name, rest, settings)
        problems = _validated([(label, rest.split("/")[-1], rows)], settings, needs)
    else:
        if settings.options:
            found = ", ".join(settings.options)
            raise UserError(f"data.{name}.options: a file has no options, got {found}; remove them")
        sources = local_files(name, settings, base_dir)
        files = [file for _, used, _ in sources for file in used]
        named = zip(files, _prefixes(sources[0][0], files), strict=True)
        problems = _validated([(str(f), prefix, read_rows(f)) for f, prefix in named], settings, needs)
        label = str(sources[0][0]) if len(sources) == 1 else f"the {len(files)} files of data.{name}"
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
    if settings.columns:
        raise UserError(f"{where}.columns: {scheme} tasks have no columns to name; remove it")
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


def _prefixes(path: Path, files: Sequence[Path]) -> list[str]:
    """Return what the default ids of each file's rows begin with: its stem if no other file has the same one,
    otherwise its whole name, or its path in the folder."""
    stems = [file.name[: len(file.name) - len(kind_of(file))] for file in files]
    for prefixes in (stems, [file.name for file in files]):
        if len(set(prefixes)) == len(files):
            return prefixes
    return [(file.relative_to(path) if file.is_relative_to(path) else file).as_posix() for file in files]


def _validated(
    sources: Iterable[tuple[str, str, Iterable[tuple[int, Row | RowError]]]],
    settings: DataSettings,
    needs: Collection[str],
) -> Iterator[Problem]:
    """Yield every good row of every (label, prefix of default ids, rows) as a problem. Raises BadRows at the
    end if there are bad rows. Ids are compared by 64-bit hashes."""
    used: dict[int, int] = {}  # hash of an id → its row: 2**20 × the row's number + the file's
    labels: list[str] = []
    first: list[str] = []
    seen: set[str] = set()
    num_bad = 0
    for label, prefix, rows in sources:
        labels.append(label)
        for number, row in rows:
            where = f"{label}:{number}"
            try:
                if isinstance(row, RowError):
                    raise row
                id = f"{prefix}-{number}"
                problem = problem_of(row, settings, id=id, where=where, needs=needs)
                place = (number << 20) + len(labels) - 1
                if (other := used.setdefault(hash(problem.id), place)) != place:
                    holder = f"{labels[other % 2**20]}:{other >> 20}"
                    raise RowError("id", f'expected a unique id, got "{problem.id}", which {holder} also has')
            except RowError as error:
                num_bad += 1
                if len(first) < SHOWN_FAULTS and str(error) not in seen:
                    seen.add(str(error))
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
    types = {
        name: str(getattr(f, "dtype", "")) for name, f in (getattr(table, "features", None) or {}).items()
    }
    for number, row in enumerate(table, start=1):
        yield number, {name: shortest(value, types.get(name, "")) for name, value in row.items()}
