"""All jobs of an evaluation, one after the other, each resumable; then what they say together."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truestep import rundir
from truestep.evaluate.benchmarks import SHUFFLE_SEED, TABLE
from truestep.evaluate.compare import compare
from truestep.evaluate.estimate import Row
from truestep.evaluate.interval import mean_interval
from truestep.evaluate.model_adapters import Asker, Asking
from truestep.evaluate.plan import EvaluationSettings, Job, job_identity, remarks
from truestep.evaluate.run import EvaluationPlan, Grade, check_kept, run_samples
from truestep.progress import Reporter
from truestep.records import Verdict
from truestep.rollout.engine import SamplingParameters

REFRESH_SECONDS = 1.0  # how often the running interval is computed anew
FEW_EXTRACTED = 0.9  # below this share of samples with an answer, the score says little about the model


@dataclass(frozen=True, kw_only=True)
class Graders:
    """The verdict that counts (lenient about form) and the strict one beside it."""

    lenient: Grade
    strict: Grade


def make_plans(
    settings: EvaluationSettings, ready: Sequence[tuple[Job, Asking]], folder: Path, model_content: str
) -> list[EvaluationPlan]:
    """One plan for each job. Raises UserError where what the folder holds of one would be lost."""
    plans = [
        _plan(settings, j, asking, folder, job_identity(settings, j, model_content)) for j, asking in ready
    ]
    for plan in plans:
        check_kept(plan)
    return plans


def run_suite(
    settings: EvaluationSettings,
    ready: Sequence[tuple[Job, Asking]],
    plans: Sequence[EvaluationPlan],
    *,
    asker: Asker,
    graders: Graders,
    folder: Path,
    reporter: Reporter,
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Evaluate what is not yet evaluated of the jobs that ``asker`` has made ready; write and return the
    summary."""
    notes = remarks(settings, [job for job, _ in ready]) + [
        note for _, asking in ready for note in asking.notes
    ]
    for note in notes:
        reporter.say(note)
    scores: list[dict[str, Any]] = []
    rundir.write_json(folder / "summary.json", _summary(settings, scores, notes, folder, "running"))
    for number, ((job, _), plan) in enumerate(zip(ready, plans, strict=True), start=1):
        what = f"[{number}/{len(ready)}] {job.benchmark.id} · {job.template.id}"
        reporter.begin(what, len(plan.sample_keys()))
        running = _Running(reporter)
        results = run_samples(
            plan,
            answer=lambda keys, plan=plan, job=job: asker.answer(plan, job.template, keys, check_stop),  # type: ignore[misc]
            grade=graders.lenient,
            grade_strictly=graders.strict,
            progress=running.progress,
            on_row=running.add,
        )
        scores.append(_score(job, results))
        if scores[-1]["extracted_rate"] < FEW_EXTRACTED:
            notes.append(
                f"{job.benchmark.id} · {job.template.id}: an answer was found in {scores[-1]['extracted_rate']:.0%} of "
                "the samples only: the score measures the format as much as the model"
            )
        rundir.write_json(folder / "summary.json", _summary(settings, scores, notes, folder, "running"))
    summary = _summary(settings, scores, notes, folder, "done")
    rundir.write_json(folder / "summary.json", summary)
    return summary


def _plan(
    settings: EvaluationSettings, job: Job, asking: Asking, folder: Path, identity: str
) -> EvaluationPlan:
    b, t = job.benchmark, job.template
    return EvaluationPlan(
        name=b.id,
        prompts=asking.prompts,
        sampling=SamplingParameters(
            temperature=job.temperature,
            max_new_tokens=asking.max_new_tokens,
            stop_token_ids=asking.stop_token_ids,
            stop_sequences=asking.stop_sequences,
            top_p=settings.top_p,
        ),
        samples_per_problem=job.samples,
        seed=settings.seed,
        folder=folder / "evaluations" / t.id,
        identity=f"{identity}/{asking.max_new_tokens}",
        pass_at=tuple(range(1, job.samples + 1)),
        private=b.private,
        opening=asking.opening,
        facts={
            "benchmark": {k: v for k, v in asdict(b).items() if k != "published"},
            "published": dict(b.published),
            "prompt": {"id": t.id, "fingerprint": asking.fingerprint, "few_shot": settings.few_shot},
            "shuffle_seed": SHUFFLE_SEED,
            "content": job.content,
            "engine": "endpoint" if settings.is_endpoint else settings.engine,
        },
    )


class _Running:
    """The score so far with its interval, computed at most once a second, and with the last sample."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.problems: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.text, self.at = "", 0.0

    def add(self, row: Row) -> None:
        counts = self.problems[row["problem_id"]]
        counts[0] += row["verdict"] == Verdict.CORRECT
        counts[1] += 1

    def progress(self, done: int, total: int, counts: Mapping[str, int]) -> None:
        del counts  # by verdict; the interval needs them by problem
        now = time.monotonic()
        if self.problems and (done == total or now - self.at >= REFRESH_SECONDS):
            self.at = now
            right, samples = np.array(list(self.problems.values()), dtype=float).T
            found = mean_interval(right / samples, num_trials=float(samples.sum()))
            self.text = f"score {100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        self.reporter.advance(done, self.text)


# ----------------------------------------------------------------------------------------------- what it says


def _score(job: Job, results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": job.benchmark.id,
        "title": job.benchmark.title,
        "prompt": job.template.id,
        "metric": f"avg@{job.samples}",
        "whole": len(job.problems) == job.benchmark.num_rows,
        "private": job.benchmark.private,
        "published": dict(job.benchmark.published),
        **results["estimate"],
    }


def _summary(
    settings: EvaluationSettings,
    scores: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    folder: Path,
    status: str,
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "evaluation",
        "name": folder.name,
        "status": status,
        "model": rundir.redact(settings.model.path),
        "engine": rundir.redact(settings.engine),
        "seeds": {"sampling": settings.seed, "options and limits": SHUFFLE_SEED},
        "scores": list(scores),
        "spread": spread(scores, folder),
        "averages": averages(scores),
        "notes": list(notes),
    }


def spread(scores: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """For each benchmark asked under several templates: the range of its scores, and each template against
    the first, paired by problem."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for score in scores:
        groups[score["benchmark"]].append(score)
    found = []
    for benchmark, group in groups.items():
        if len(group) < 2:
            continue
        values = [float(s["score"]) for s in group]
        rows = [_rows(folder, s) for s in group]
        found.append(
            {
                "benchmark": benchmark,
                "num_prompts": len(group),
                "mean": float(np.mean(values)),
                "lowest": min(values),
                "highest": max(values),
                "range": max(values) - min(values),
                "stdev": float(np.std(values, ddof=1)),
                "against_first": [
                    {"from": group[0]["prompt"], "to": s["prompt"], **compare(rows[0], other).to_json()}
                    for s, other in zip(group[1:], rows[1:], strict=True)
                ],
            }
        )
    return found


def _rows(folder: Path, score: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = folder / "evaluations" / score["prompt"] / f"{score['benchmark']}.samples.jsonl"
    return [row for row in rundir.read_jsonl(path) if "verdict" in row]


def averages(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paper's plain means, for each template under which every whole benchmark of one has been evaluated.
    The interval's ends lie as far off as the benchmarks' own ends do, added in quadrature.

    Source: Zou and Donner 2008 (doi:10.1002/sim.3095)
    """
    found = []
    for name in ("ID", "OOD"):
        members = {b.id for b in TABLE if b.average == name}
        for prompt in dict.fromkeys(s["prompt"] for s in scores):
            own = [s for s in scores if s["prompt"] == prompt and s["benchmark"] in members and s["whole"]]
            if {s["benchmark"] for s in own} == members:
                mean = float(np.mean([s["score"] for s in own]))
                below, above = (
                    math.hypot(*(s[end] - s["score"] for s in own)) / len(own) for end in ("low", "high")
                )
                found.append(
                    {
                        "average": name,
                        "prompt": prompt,
                        "score": mean,
                        "low": mean - below,
                        "high": mean + above,
                    }
                )
    return found
