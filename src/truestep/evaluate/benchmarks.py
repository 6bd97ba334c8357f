"""The pinned benchmarks, with the source, number of rows, content hash and scoring of each.

A hash covers the content of the rows (``sources.content_hash``). "unknown" means that this table does not
have the hash. Then the hash is recorded at the first load, and later loads must match it. Published scores
are in points and come from the paper (Table 1, Qwen2.5-Math-7B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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


def _figures(sft: str, rl: str, luffy: str, prefix: str) -> dict[str, str]:
    return {"SFT": sft, "SFT→RL": rl, "LUFFY (reported)": luffy, "Prefix-RFT (reported)": prefix}


_AIME24 = Benchmark(
    id="aime24", title="AIME 2024", num_rows=30, samples=32, average="ID",
    content="f808535a799b12041091c3c32386bf34db6f00ec0d0b8db3850242587c343ce4",
    hub="HuggingFaceH4/aime_2024::train", published=_figures("33.6±1.4", "40.4±0.3", "29.4", "31.8"),
)  # fmt: skip
_GSM8K = Benchmark(
    id="gsm8k", title="GSM8K test", num_rows=1319, prompt="qwen",
    content="840e254a49f8e3956eb37315d3f8eb38738636ba502f7fba9a858b172f39be04", hub="openai/gsm8k:main:test",
)  # fmt: skip
_MMLU_PRO = Benchmark(
    id="mmlu_pro", title="MMLU-Pro", num_rows=12032, content=UNKNOWN, hub="TIGER-Lab/MMLU-Pro::test",
    kind="choice", scorer="exact", average="OOD", published=_figures("50.2±0.3", "55.1±0.6", "53.0", "52.1"),
)  # fmt: skip

TABLE: tuple[Benchmark, ...] = (
    _AIME24,
    replace(
        _AIME24, id="aime25", title="AIME 2025", hub="math-ai/aime25::test",
        content="f0862c189a6391b726b2fe2ddd14f182d9d0fda87b927542d30263d3f24dc2b8",
        published=_figures("28.2±0.7", "29.8±0.7", "23.1", "26.4"),
    ),
    replace(
        _AIME24, id="amc22_23", title="AMC 12 2022 and 2023", num_rows=83,
        hub="AI-MO/aimo-validation-amc::train",
        content="e532865b8d0cb90e870cb611e437717a0f028e12161468f9aa9a4ed47e08be2b",
        published=_figures("65.4±0.9", "73.2±1.2", "65.6", "68.2"),
    ),
    replace(
        _AIME24, id="math500", title="MATH-500", num_rows=500, samples=1, hub="HuggingFaceH4/MATH-500::test",
        content="51b16a7fa25a6494436a60c09de15ba4b86b2e848bbd653aa422eb6a9f7b6cb2",
        published=_figures("90.0±0.9", "92.0±0.2", "87.6", "88.4"),
    ),
    replace(
        _AIME24, id="minerva", title="Minerva Math", num_rows=272, samples=1, hub="math-ai/minervamath::test",
        content="ba5b401ab6206a62dc478ad9cd09440a98063fa15c1b21903af987d60ee26c57",
        published=_figures("40.6±0.6", "43.9±0.6", "37.5", "40.3"),
    ),
    replace(
        _AIME24, id="olympiadbench", title="OlympiadBench, English maths, text only", num_rows=675, samples=1,
        content="e0bc53c1c38309682a30262be33ea6b2cbedbef9a11030e2c5acd41bbedfb5f9",
        hub="Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", mind="others use only 674 of these 675 problems",
        published=_figures("55.7±0.6", "62.8±0.6", "57.2", "55.7"),
    ),
    replace(
        _MMLU_PRO, id="arc_challenge", title="ARC-Challenge test", num_rows=1172,
        content="3d4d14f0096be167538c4163dbf27dfad9370285dfdf4634f160c8fc96bac75e",
        hub="allenai/ai2_arc:ARC-Challenge:test", mind="22 gold answers are digits; 7 items have 3 or 5 choices",
        published=_figures("82.5±0.6", "84.0±0.6", "80.5", "84.0"),
    ),
    replace(
        _MMLU_PRO, id="gpqa_diamond", title="GPQA-Diamond", num_rows=198,
        hub="Idavidrein/gpqa:gpqa_diamond:train", private=True,
        mind="its authors ask that its text not be published, so samples have only ids and verdicts",
        published=_figures("24.6±2.9", "40.6±1.8", "39.9", "39.1"),
    ),
    _MMLU_PRO,
    replace(
        _MMLU_PRO, id="mmlu_pro_700", title="MMLU-Pro, 50 of each of 14 categories", num_rows=700, hub="",
        average="", content="e9e8e7b28cc9ad2f5e30b50422413586986b47705baaf0eba2481fbcaf3ed22d", published={},
        mind="a fixed subset of mmlu_pro; scores are not comparable with those for all of mmlu_pro",
    ),
    _GSM8K,
    replace(
        _GSM8K, id="svamp", title="SVAMP", num_rows=1000, hub="ChilleD/SVAMP::test+train",
        content="63a8b9afe66dda79372d2490d86dda23d1a43e4461e787b7e2e9c26bf280e127",
    ),
    replace(
        _GSM8K, id="asdiv", title="ASDiv", num_rows=2215, hub="",
        content="6d3047c4dcff33b2d4a41d457ef0864043cdac7f627668fe99caae2c2c2b23f3",
        mind="131 gold answers are not plain numbers; 240 problems are also in MAWPS",
    ),
    replace(
        _GSM8K, id="mawps", title="MAWPS", num_rows=2065, hub="",
        content="89b61a245b9ca464ff8aa6f3493f2dfcf1d4e528ea5a4a3d870461f5b28833db",
        mind="200 of its problems are repeated; 240 are also in ASDiv",
    ),
)  # fmt: skip
BY_ID = {b.id: b for b in TABLE}


def find(id: str) -> Benchmark:
    """Return the benchmark with that id. Raises a UserError that suggests the nearest id."""
    if id not in BY_ID:
        raise UserError(f'benchmarks: "{id}" is not one of {", ".join(BY_ID)}{did_you_mean(id, list(BY_ID))}')
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
    others are listed as missing. Examples are only ids, so private benchmarks stay private."""
    folder = Path(data) if data else None
    tested, missing = {}, []
    for id in ids or BY_ID:
        try:
            tested[id] = load(find(id), folder, bare=True)
        except NotThere:
            if ids:
                raise
            missing.append(id)
    trained = load_problems("train", DataSettings(source=source), seed=0, base_dir=Path(), needs=())
    return {**overlap_report({source: trained}, tested), "missing": missing}
