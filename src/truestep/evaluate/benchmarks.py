"""The pinned benchmarks, with the source, number of rows, content hash and scoring of each. The table is
benchmarks.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from truestep.data.files import files_of
from truestep.data.overlap import overlap_report
from truestep.data.problems import load_problems
from truestep.errors import UserError, did_you_mean
from truestep.evaluate.sources import LETTERS, Item, NotThere, content_hash, file_items, hub_items
from truestep.records import Message, Problem
from truestep.rundir import cache_folder, read_json, write_json
from truestep.seeding import permutation
from truestep.settings import DataSettings

UNKNOWN = "unknown"
SUFFIXES = (".jsonl", ".parquet", ".csv")
SHUFFLE_SEED = 0  # for the order of choices, and for the order in which a limit takes problems


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A pinned benchmark. ``average`` names the average in the paper that includes this benchmark. If
    ``private`` is True, the questions, answers and completions are never written to a file."""

    id: str
    title: str
    num_rows: int
    content: str
    hub: str  # repository, config, split
    kind: Literal["math", "choice"] = "math"
    scorer: str = "math"
    prompt: str = "paper"
    samples: int = 1
    temperature: float = 0.6
    max_new_tokens: int = 8192
    average: Literal["", "ID", "OOD"] = ""
    private: bool = False
    mind: str = ""
    published: Mapping[str, str] = field(default_factory=dict)


def _table() -> tuple[Benchmark, ...]:
    rows = tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8"))["benchmark"]
    sources = ("SFT", "SFT→RL", "LUFFY (reported)", "Prefix-RFT (reported)")
    published = [dict(zip(sources, row.pop("published", ()), strict=False)) for row in rows]
    return tuple(Benchmark(**row, published=scores) for row, scores in zip(rows, published, strict=True))


TABLE = _table()
BY_ID = {b.id: b for b in TABLE}


def find(id: str) -> Benchmark:
    """Return the benchmark with that id. Raises a UserError that suggests the nearest id."""
    if id not in BY_ID:
        own = f"for a file or folder of your own, pass its path, such as ./{id}.jsonl"
        known = ", ".join(BY_ID)
        raise UserError(f'benchmarks: "{id}" is not one of {known}{did_you_mean(id, list(BY_ID))}; {own}')
    return BY_ID[id]


def load(benchmark: Benchmark, folder: Path | None, *, bare: bool = False) -> list[Problem]:
    """Return all problems of a benchmark, after checking the number and content of its rows. With
    ``bare``, a problem is only its question, without the options. Raises UserError if the rows differ from
    the pinned ones."""
    if folder is not None:
        items, where = file_items(path := _file(benchmark, folder)), str(path)
    elif benchmark.hub:
        items, where = hub_items(benchmark.id, *benchmark.hub.split(":")), f"hub:{benchmark.hub}"
    else:
        raise NotThere(f"{benchmark.id} has no hub source; pass --data FOLDER with {benchmark.id}.jsonl")
    if len(items) != benchmark.num_rows:
        expected = f"{where}: expected the {benchmark.num_rows} rows of {benchmark.id}, got {len(items)}"
        raise UserError(f"{expected}; provide the whole file (--limit can select a part of it)")
    empty = [n for n, item in enumerate(items, start=1) if not item.choices]
    if benchmark.kind == "choice" and empty:
        raise UserError(f"{where}:{empty[0]}: choices: expected a list of choices, got none; correct the row")
    found, expected = content_hash(items), benchmark.content
    pinned = "the pinned ones; provide the original file"
    if expected == UNKNOWN:
        expected = _first_seen(benchmark.id, found)
        pinned = (
            f"those first loaded here; if the new ones are correct, remove {benchmark.id} from {_record()}"
        )
    if found != expected:
        raise UserError(
            f"{where}: the rows hash to {found[:16]}…, but {benchmark.id} has {expected[:16]}…, so "
            f"the questions or answers differ from {pinned}"
        )
    if bare:
        items = [replace(item, choices=()) for item in items]
    return [problem_of(benchmark, item, f"{where}:{n}") for n, item in enumerate(items, start=1)]


def _file(benchmark: Benchmark, folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass --data with the folder for {benchmark.id}.jsonl")
    names = [f"{sub}{benchmark.id}{suffix}" for suffix in SUFFIXES for sub in ("", "benchmarks/")]
    found = [path for name in names if (path := folder / name).is_file()]
    if not found:
        raise NotThere(f"{folder} has no {benchmark.id}.jsonl, .parquet or .csv; put the file there")
    return found[0]


def _first_seen(id: str, found: str) -> str:
    """Return the recorded hash of a benchmark with unknown content; if there is none, record ``found``."""
    path = _record()
    try:
        seen: dict[str, Any] = read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); correct or remove it") from None
    if id not in seen:
        write_json(path, {**seen, id: found})
    return str(seen.get(id, found))


def _record() -> Path:
    return cache_folder() / "benchmarks.json"


def problem_of(benchmark: Benchmark, item: Item, where: str) -> Problem:
    """Return the problem as the model sees it. The options are shuffled and lettered again, and the gold
    answer is the new letter."""
    text, answer, meta = item.question, item.answer, {}
    if item.choices:
        name = f"options/{benchmark.id}/{item.id}"
        order = permutation(SHUFFLE_SEED, 0, len(item.choices), item=name).tolist()
        lines = [f"{LETTERS[n]}) {item.choices[position]}" for n, position in enumerate(order)]
        text, answer = "\n".join([f"{text}\n", *lines]), LETTERS[order.index(int(answer))]
        meta = {"num_choices": len(order), "option_order": order}
    return Problem(
        id=item.id, messages=(Message(role="user", content=text),), answer=answer, checker=benchmark.scorer,
        row=where, meta=meta,
    )  # fmt: skip


def take(problems: Sequence[Problem], limit: int | Literal["all"], name: str) -> list[Problem]:
    """Return the first ``limit`` problems in a fixed random order, so that a larger limit includes all
    problems of a smaller one. The returned problems are in the order of the file."""
    if limit == "all" or limit >= len(problems):
        return list(problems)
    order = permutation(SHUFFLE_SEED, 0, len(problems), item=f"limit/{name}")
    return [problems[i] for i in sorted(order[:limit].tolist())]


def contamination(source: str, ids: Sequence[str], data: str) -> dict[str, Any]:
    """Return the overlap of a training set with each benchmark. Only the bare questions are compared, because
    options would hide matches. Without ``ids``, every benchmark in the folder ``data`` is compared, and the
    others are listed as missing. ``notes`` name the files that were read. Examples are only ids, so private
    benchmarks stay private."""
    folder = Path(data) if data else None
    tested, missing = {}, []
    for id in ids or BY_ID:
        try:
            tested[id] = load(find(id), folder, bare=True)
        except NotThere:
            if ids:
                raise
            missing.append(id)
    settings = DataSettings(source=source)
    trained = load_problems("train", settings, seed=0, base_dir=Path(), needs=())
    notes = [said] if (said := files_of("train", settings, Path())[2]) else []
    return {**overlap_report({source: trained}, tested), "missing": missing, "notes": notes}
