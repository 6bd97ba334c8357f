"""What is to be evaluated: settings → jobs (a benchmark under a template), each with its problems and its
limits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from truestep.evaluate import benchmarks, prompts
from truestep.evaluate.benchmarks import Benchmark
from truestep.evaluate.prompts import MOST_SHOTS, Template
from truestep.frozen import Frozen
from truestep.records import Problem
from truestep.settings import ModelSettings, settings_hash

PINNED: Literal["benchmark"] = "benchmark"
Positive = Annotated[int, Field(ge=1)]


class EvaluationSettings(Frozen):
    """One evaluation, as a recipe or the command line gives it. "benchmark" takes what the table has
    pinned."""

    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    model: ModelSettings
    engine: str = "torch"  # torch | vllm | the URL of an OpenAI-compatible endpoint
    benchmarks: tuple[str, ...] = Field(min_length=1)
    data: str = ""  # folder with ID.jsonl, .parquet or .csv; "" takes them from the hub
    prompts: tuple[str, ...] = (PINNED,)
    few_shot: int = Field(0, ge=0, le=MOST_SHOTS)
    limit: Positive | Literal["all"] = "all"
    limits: dict[str, Positive] = Field(default_factory=dict)  # by benchmark, instead of limit
    samples: Positive | Literal["benchmark"] = PINNED
    temperature: Annotated[float, Field(ge=0)] | Literal["benchmark"] = PINNED
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: Positive | Literal["benchmark"] = PINNED
    max_running: int = Field(64, ge=1)  # rows decoded, or requests sent, at once
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Positive | Literal["auto"] = "auto"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _known(self) -> Self:
        for id in self.benchmarks:
            benchmarks.find(id)
        prompts.chosen([p for p in self.prompts if p != PINNED])
        if self.engine not in ("torch", "vllm") and not self.engine.startswith(("http://", "https://")):
            raise ValueError(f'engine = "{self.engine}": write torch, vllm, or the URL of an endpoint')
        address = urlsplit(self.engine) if self.is_endpoint else None
        if address and (address.username or address.password or address.query):
            raise ValueError("engine: its URL holds a user name, a password or a query, and is written to files: "
                             "put a key into TRUESTEP_API_KEY, and give scheme, host, port and path alone")  # fmt: skip
        if stray := [id for id in self.limits if id not in self.benchmarks]:
            raise ValueError(
                f"limits.{stray[0]}: is not evaluated: add it to benchmarks, or remove the limit"
            )
        return self

    @property
    def is_endpoint(self) -> bool:
        return self.engine not in ("torch", "vllm")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark under one template."""

    benchmark: Benchmark
    template: Template
    problems: Sequence[Problem]
    samples: int
    temperature: float
    max_new_tokens: int
    content: str  # hash of the problems taken, as they are asked
    source: (
        str  # hash of all the benchmark's problems: a greater limit goes on with the samples of a smaller one
    )


def make_jobs(settings: EvaluationSettings, base_dir: Path) -> list[Job]:
    """Every benchmark loaded and checked, and every template of it.

    Raises UserError where a benchmark's rows are not the pinned ones, or the settings contradict it.
    """
    folder = _folder(settings.data, base_dir)
    jobs = []
    for id in dict.fromkeys(settings.benchmarks):
        benchmark = benchmarks.find(id)
        every = benchmarks.load(benchmark, folder)
        problems = benchmarks.take(every, settings.limits.get(id, settings.limit), id)
        names = [benchmark.prompt if name == PINNED else name for name in settings.prompts]
        temperature = benchmark.temperature if settings.temperature == PINNED else settings.temperature
        samples = benchmark.samples if settings.samples == PINNED else settings.samples
        if temperature == 0:
            samples = 1  # the same every time
        content, source = _hash(problems), _hash(every)
        for template in prompts.chosen(names):
            jobs.append(
                Job(
                    benchmark=benchmark,
                    template=template,
                    problems=problems,
                    samples=samples,
                    temperature=temperature,
                    max_new_tokens=(
                        benchmark.max_new_tokens
                        if settings.max_new_tokens == PINNED
                        else settings.max_new_tokens
                    ),
                    content=content,
                    source=source,
                )
            )
    return jobs


def _folder(data: str, base_dir: Path) -> Path | None:
    if not data:
        return None
    wanted = Path(data).expanduser()
    candidates = [wanted] if wanted.is_absolute() else [base_dir / wanted, wanted]
    return next((p for p in candidates if p.is_dir()), candidates[0])


def _hash(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for p in problems:
        digest.update(f"{p.id}\x1f{p.messages[-1].content}\x1f{p.answer}\x1c".encode())
    return digest.hexdigest()[:16]


def job_identity(settings: EvaluationSettings, job: Job, model_content: str) -> str:
    """The hash of all that a sample of this job depends on; how many problems and samples are asked for is no
    part."""
    t = job.template
    asked = (t.system, t.choice_system, t.math, t.choice, t.suffix, str(t.chat), *t.stop)
    sampling = (job.temperature, settings.top_p, job.max_new_tokens, settings.seed, settings.few_shot)
    engine = "endpoint" if settings.is_endpoint else settings.engine
    own = (settings.dtype, engine, job.benchmark.id, job.benchmark.scorer, job.source, model_content)
    return settings_hash(settings.model, *asked, *map(str, sampling), *own)


def changed(old: EvaluationSettings, new: EvaluationSettings) -> list[str]:
    """The settings that a sample depends on and that differ: samples of both must not be mixed."""
    fixed = ("model", "engine", "few_shot", "temperature", "top_p", "max_new_tokens", "dtype", "seed")
    return [name for name in fixed if getattr(old, name) != getattr(new, name)]


def remarks(settings: EvaluationSettings, jobs: Sequence[Job]) -> list[str]:
    """What the settings ask for and do not get."""
    wanted = 1 if settings.samples == PINNED else settings.samples
    greedy = dict.fromkeys(job.benchmark.id for job in jobs if job.samples < wanted)
    return [f"{id}: at temperature 0 every sample is the same: 1 is taken, not {wanted}" for id in greedy]


def budget(
    jobs: Sequence[Job], limits: Sequence[int], prompt_tokens: Sequence[int], shape: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the jobs will ask for at most: tokens, and where the model's figures are known memory and
    arithmetic.

    ``limits`` are the tokens that each job's completions may have, ``prompt_tokens`` sums its prompts once;
    ``shape`` has num_parameters, bytes_per_parameter, cache_bytes (of one token of one row) and max_running.
    """
    rows: list[dict[str, Any]] = []
    for job, limit, tokens in zip(jobs, limits, prompt_tokens, strict=True):
        num = len(job.problems) * job.samples
        rows.append(
            {
                "benchmark": job.benchmark.id,
                "prompt": job.template.id,
                "problems": len(job.problems),
                "samples": num,
                "prompt_tokens": tokens,
                "generated_tokens_at_most": num * limit,
            }
        )
    total: dict[str, Any] = {
        key: sum(row[key] for row in rows) for key in ("samples", "prompt_tokens", "generated_tokens_at_most")
    }
    if shape:
        total["flops_at_most"] = (
            2 * shape["num_parameters"] * (total["prompt_tokens"] + total["generated_tokens_at_most"])
        )
        longest = max(
            limit + t / max(1, len(job.problems))
            for job, limit, t in zip(jobs, limits, prompt_tokens, strict=True)
        )
        most = min(shape["max_running"], max(row["samples"] for row in rows))
        total["memory_bytes_at_most"] = round(
            shape["num_parameters"] * shape["bytes_per_parameter"] + shape["cache_bytes"] * longest * most
        )
    return {"jobs": rows, "total": total}


def default_name(settings: EvaluationSettings) -> str:
    """A name for the run directory: the model's, and a hash of the settings that change a sample."""
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(settings.model.path).name).strip(
        ".-"
    )
    return f"{settings.name or 'eval-' + (stem or 'model')}-{settings_hash(settings)[:8]}"
