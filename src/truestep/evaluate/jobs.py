"""The jobs of an evaluation, made from the settings. A job is a benchmark with a template and problems."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from truestep.errors import ALIASES, UserError, did_you_mean
from truestep.evaluate import benchmarks, prompts
from truestep.evaluate.own import is_own, load_own
from truestep.records import Problem
from truestep.settings import SamplingSettings, Settings, parse, settings_hash

# Short keys in `truestep eval` recipes (and in --set), and the keys that they stand for.
SHORT = {
    "benchmarks": "evaluate.benchmarks", "checker": "evaluate.benchmark_checker", "scorers": "evaluate.scorers",
    "columns": "evaluate.benchmark_columns", "prompts": "evaluate.prompts", "few_shot": "evaluate.few_shot",
    "limit": "evaluate.limit", "limits": "evaluate.limits", "engine": "evaluate.engine",
    "samples": "evaluate.samples_per_problem", "temperature": "evaluate.sampling.temperature",
    "top_p": "evaluate.sampling.top_p", "max_new_tokens": "evaluate.sampling.max_new_tokens",
    "max_running": "evaluate.sampling.max_running", "dtype": "compute.dtype", "threads": "compute.threads",
}  # fmt: skip
# Tables of a training recipe, which an evaluation of benchmarks does not use. ``data`` can also be a folder.
_OF_TRAINING = ("data", "stages", "chat", "trackers", "declared")
_OTHER = ("name", "model", "seed", "evaluate", "compute")
# What a sample depends on; samples made with different values must not be mixed.
FIXED = (
    "model", "chat.special_tokens", "seed", "compute.dtype", "evaluate.engine", "evaluate.few_shot",
    "evaluate.sampling.temperature", "evaluate.sampling.top_p", "evaluate.sampling.top_k", "evaluate.sampling.max_new_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark with one template. ``content`` is a hash of the problems used. ``source`` is a hash of
    all problems in the benchmark. It identifies samples, so that a larger limit keeps existing ones."""

    benchmark: benchmarks.Benchmark
    template: prompts.Template
    problems: Sequence[Problem]
    samples: int
    sampling: SamplingSettings
    content: str
    source: str

    @property
    def title(self) -> str:
        return f"{self.benchmark.id} · {self.template.id}"


def evaluation_settings(raw: Mapping[str, Any], where: str) -> Settings:
    """Return the settings of ``truestep eval``, from a recipe that may use the keys in ``SHORT``. Raises
    UserError if no benchmark is named, or if a benchmark, template or setting is unknown."""
    known = [*SHORT, "data", *_OTHER]
    for key in raw:
        if key not in known and key not in _OF_TRAINING and key not in Settings.model_fields:
            meant = [name for alias in ALIASES.get(key, ()) if (name := alias.rpartition(".")[2]) in SHORT]
            hint = f'; did you mean "{meant[0]}"?' if meant else did_you_mean(key, known)
            expected = f"; expected one of {', '.join(known)}"
            raise UserError(f"{where}: {key}: unknown key{hint or expected}")
    table: dict[str, Any] = {"name": "eval-" + _stem(raw), "data": {}, "stages": []}
    for key, value in raw.items():
        if key == "data" and isinstance(value, str):
            _put(table, "evaluate.folder", value)
        elif key == "chat" and isinstance(value, Mapping):
            _put(table, "chat.special_tokens", value.get("special_tokens", []))
        elif key in _OF_TRAINING:
            continue  # benchmarks have their own problems and templates
        elif isinstance(value, Mapping) and key not in ("limits", "columns"):
            for inner, entry in value.items():
                if key != "evaluate" or inner not in ("data", "pass_at", "before"):
                    _put(table, f"{key}.{inner}", entry)
        else:
            _put(table, SHORT.get(key, key), value)
    if not table.get("evaluate", {}).get("benchmarks"):
        raise UserError(
            f"{where}: no benchmarks are given; pass --benchmarks (truestep eval list shows them) or a file of your own"
        )
    for key in ("benchmarks", "prompts"):
        if isinstance(words := table["evaluate"].get(key), str):
            table["evaluate"][key] = [word.strip() for word in words.split(",") if word.strip()]
    scorers = table["evaluate"].get("scorers", [])
    if isinstance(scorers, str | list | tuple):
        listed = [scorers] if isinstance(scorers, str) else scorers
        table["evaluate"]["scorers"] = [{"function": s} if isinstance(s, str) else s for s in listed]
    settings = parse(Settings, table, where=where)
    for id in settings.evaluate.benchmarks:
        if not is_own(id):
            benchmarks.find(id)
    if settings.evaluate.benchmark_columns and not any(map(is_own, settings.evaluate.benchmarks)):
        raise UserError(
            f"{where}: columns are named, but no benchmark is a file of your own; remove --column"
        )
    prompts.chosen([p for p in settings.evaluate.prompts if p != "benchmark" and not prompts.is_file(p)])
    if settings.compute.dtype == "float64":
        raise UserError(
            f"{where}: compute.dtype: an evaluation runs only in float32 or bfloat16; set one of them"
        )
    return settings


def check_overrides(overrides: Sequence[str], flag: str = "--set") -> None:
    """Raise UserError for an override of a setting that an evaluation of benchmarks does not use."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key != "data" and key.partition(".")[0] in _OF_TRAINING:
            columns = "; name the columns of your own benchmarks with --column OURS=THEIRS"
            hint = columns if key.startswith("data.") else ""
            raise UserError(
                f"{flag} {key}: an evaluation of benchmarks does not use this setting; remove it{hint}"
            )


def _stem(raw: Mapping[str, Any]) -> str:
    path = Path(str((raw.get("model") or {}).get("path", "")))
    if path.match("*/stages/*/export"):  # the model of a run has the run's name
        path = path.parents[2]
    name = path.name
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-") or "model"


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    if isinstance(value, Mapping) and isinstance(table.get(leaf), dict):
        table[leaf] |= value
    else:
        table[leaf] = value


def make_jobs(settings: Settings, base_dir: Path) -> list[Job]:
    """Load each benchmark and pair it with every template. Raises UserError if the rows are not as pinned."""
    evaluate = settings.evaluate
    folder = Path(evaluate.folder).expanduser() if evaluate.folder else None
    if folder and (base_dir / folder).is_dir():  # in the recipe's folder, otherwise in the current one
        folder = base_dir / folder
    jobs = []
    for id, benchmark, every in _loaded(settings, folder, base_dir):
        limit = evaluate.limits.get(id, evaluate.limit)
        problems = benchmarks.take(every, limit, benchmark.id)
        names = [benchmark.prompt if name == "benchmark" else name for name in evaluate.prompts]
        sampling = evaluate.sampling.resolved(benchmark.temperature, benchmark.max_new_tokens)
        wanted = evaluate.samples_per_problem
        samples = benchmark.samples if wanted == "benchmark" else wanted
        shared: dict[str, Any] = {
            "benchmark": benchmark, "problems": problems, "sampling": sampling, "content": _hash(problems),
            "samples": samples if sampling.temperature else 1,  # all greedy samples of a problem are the same
            "source": _hash(every),
        }  # fmt: skip
        jobs += [Job(template=template, **shared) for template in prompts.chosen(names, base_dir)]
    return jobs


def _loaded(
    settings: Settings, folder: Path | None, base_dir: Path
) -> Iterator[tuple[str, benchmarks.Benchmark, list[Problem]]]:
    """Yield every entry of evaluate.benchmarks with its benchmarks and all their problems."""
    seen: dict[str, str] = {}
    for id in dict.fromkeys(settings.evaluate.benchmarks):
        if not is_own(id):
            benchmark = benchmarks.find(id)
            found = [(benchmark, benchmarks.load(benchmark, folder))]
        else:
            evaluate = settings.evaluate
            own = [entry for entry in evaluate.benchmarks if is_own(entry)]
            found = load_own(id, base_dir, evaluate.benchmark_checker, evaluate.benchmark_columns, own)
        for benchmark, every in found:
            if (other := seen.setdefault(benchmark.id, id)) != id:
                raise UserError(
                    f"benchmarks: {other} and {id} are both called {benchmark.id}; name one of them: NAME={id}"
                )
            yield id, benchmark, every


def _hash(problems: Sequence[Problem]) -> str:
    text = "".join(f"{p.id}\x1f{p.question}\x1f{p.answer}\x1c" for p in problems)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def engine_kind(settings: Settings) -> str:
    """Return torch, vllm or endpoint, without an endpoint's address, which does not affect samples."""
    return "endpoint" if settings.evaluate.is_endpoint else settings.evaluate.engine


def job_identity(settings: Settings, job: Job, model_content: str, scorers: str = "") -> str:
    """Return a hash of everything that a sample of this job depends on, with its scores. The number of samples is not
    included. ``scorers`` is a hash of the scorers' files."""
    t, s = job.template, job.sampling
    asked = (
        t.system,
        t.choice_system,
        t.math,
        t.choice,
        t.suffix,
        str(t.chat),
        *t.stop,
        *(text for pair in t.worked for text in pair),
    )
    sampling = (s.temperature, s.top_p, s.top_k, s.max_new_tokens, settings.seed, settings.evaluate.few_shot)
    own = (settings.compute.dtype, engine_kind(settings), job.benchmark.id, job.benchmark.scorer, job.source)
    scored: list[Any] = [*settings.evaluate.scorers, scorers] if settings.evaluate.scorers else []
    kept = settings.chat.special_tokens  # those of an export are part of its content
    return settings_hash(settings.model, *asked, *map(str, sampling), *own, model_content, *scored, *kept)


def changed(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """Return the key, old value and new value of each setting in FIXED that differs."""
    pairs = ((key, attrgetter(key)(old), attrgetter(key)(new)) for key in FIXED)
    return [(key, a, b) for key, a, b in pairs if a != b]


def remarks(settings: Settings, jobs: Sequence[Job]) -> list[str]:
    """Return notes for the user about settings that are not followed, and about how own benchmarks are read."""
    wanted = settings.evaluate.samples_per_problem
    greedy = dict.fromkeys(j.benchmark.id for j in jobs if wanted != "benchmark" and j.samples < wanted)
    same = "at temperature 0 all samples are the same"
    read = {j.benchmark.id: j.benchmark.mind for j in jobs if j.benchmark.id not in benchmarks.BY_ID}
    return [
        *(f"{id}: {note}" for id, note in read.items() if note),
        *(f"{id}: 1 sample per problem instead of {wanted}, because {same}" for id in greedy),
    ]
