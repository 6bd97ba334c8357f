"""Runs all jobs of an evaluation one after the other, and summarizes them. Each job can be resumed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from truestep import rundir
from truestep.evaluate.benchmarks import SHUFFLE_SEED, TABLE
from truestep.evaluate.compare import compare
from truestep.evaluate.files import read_samples, samples_of, score_row
from truestep.evaluate.jobs import Job, engine_kind, job_identity, remarks
from truestep.evaluate.model_adapters import ModelAdapter, ReadyJob
from truestep.evaluate.run import EvaluationPlan, Judge, check_kept, run_evaluation
from truestep.progress import Reporter
from truestep.rollout.engine import SamplingParameters
from truestep.settings import Settings

FEW_EXTRACTED = 0.9  # if fewer samples than this share have an answer, the score says little about the model

Score = Mapping[str, Any]


def make_plans(
    settings: Settings, jobs: Sequence[Job], adapter: ModelAdapter, folder: Path, content: str, code: str = ""
) -> tuple[list[tuple[Job, EvaluationPlan]], list[str]]:
    """Return one plan for each job, and notes for the user. Raises UserError if samples in the folder would
    be lost. ``content`` is a hash of the model, and ``code`` one of the scorers' files."""
    ready = [(job, adapter.ready(job, settings.evaluate.few_shot)) for job in jobs]
    plans = [
        (j, _plan(settings, j, made, folder, job_identity(settings, j, content, code))) for j, made in ready
    ]
    for _, plan in plans:
        check_kept(plan)
    return plans, remarks(settings, jobs) + [note for _, made in ready for note in made.notes]


def run_suite(
    settings: Settings, plans: Sequence[tuple[Job, EvaluationPlan]], notes: list[str], *,
    adapter: ModelAdapter, judge: Judge, folder: Path, reporter: Reporter, check_stop: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """Evaluate all jobs that are not yet finished, then write and return the summary."""
    for note in notes:
        reporter.say(note)
    scores: list[dict[str, Any]] = []

    def summarize(status: str) -> dict[str, Any]:
        summary = {
            "schema_version": 1, "kind": "evaluation", "name": folder.name, "status": status,
            "model": rundir.redact(settings.model.path), "engine": rundir.redact(settings.evaluate.engine),
            "seeds": {"sampling": settings.seed, "options and limits": SHUFFLE_SEED},
            "scores": scores, "spread": spread(scores, folder), "averages": averages(scores), "notes": notes,
        }  # fmt: skip
        rundir.write_json(folder / "summary.json", summary)
        return summary

    summarize("running")
    for number, (job, plan) in enumerate(plans, start=1):
        answer = adapter.answers(plan, job.template, check_stop)
        title = f"[{number}/{len(plans)}] {job.title}"
        results = run_evaluation(plan, answer=answer, judge=judge, reporter=reporter, title=title)
        scores.append(score_row(plan.name, results, prompt=job.template.id))
        if (rate := scores[-1]["extracted_rate"]) < FEW_EXTRACTED:
            few = f"an answer was found in only {rate:.0%} of the samples"
            notes.append(f"{job.title}: {few}, so the score measures the format as much as the model")
        for text in unscored(job.title, results.get("rewards") or {}):
            notes.append(text)
            if text.startswith("warning"):
                reporter.say(text)
        summarize("running")
    return summarize("done")


def unscored(title: str, rewards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note for each scorer that did not score all samples, which is a warning if it scored none. The verdicts
    do not depend on scorers."""
    notes = []
    for name, found in rewards.items():
        if first := found.get("first_missing"):
            num = found["scored"] + found["missing"]
            told = f"{title}: the scorer {name} scored {found['scored']} of {num} samples; the first without it: {first}"
            remedy = "; correct the scorer, and evaluate again with a different --out"
            notes.append(told if found["scored"] else f"warning: {told}{remedy}")
    return notes


def _plan(settings: Settings, job: Job, ready: ReadyJob, folder: Path, identity: str) -> EvaluationPlan:
    b, t = job.benchmark, job.template
    return EvaluationPlan(
        name=b.id, prompts=ready.prompts,
        sampling=SamplingParameters(
            temperature=job.sampling.temperature, max_new_tokens=ready.max_new_tokens,
            stop_token_ids=ready.stop_token_ids, stop_sequences=ready.stop_sequences,
            top_p=job.sampling.top_p, top_k=job.sampling.top_k,
        ),
        samples_per_problem=job.samples, seed=settings.seed, folder=folder / "evaluations" / t.id,
        identity=f"{identity}/{ready.max_new_tokens}", pass_at=tuple(range(1, job.samples + 1)),
        private=b.private, opening=ready.opening,
        facts={
            "benchmark": {k: v for k, v in asdict(b).items() if k != "published"},
            "published": dict(b.published), "whole": len(job.problems) == b.num_rows,
            "prompt": {"id": t.id, "fingerprint": ready.fingerprint, "few_shot": settings.evaluate.few_shot},
            "shuffle_seed": SHUFFLE_SEED, "content": job.content, "engine": engine_kind(settings),
        },
    )  # fmt: skip


def spread(scores: Sequence[Score], folder: Path) -> list[dict[str, Any]]:
    """Return the range of scores of each benchmark that was evaluated with several templates. Each template
    is also compared with the first one, paired by problem."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        groups[score["data"]].append(score)
    found = []
    for benchmark, (first, *others) in groups.items():
        if not others:
            continue
        values = [float(s["score"]) for s in (first, *others)]
        rows = {s["prompt"]: read_samples(samples_of(folder, s)) for s in (first, *others)}
        pairs = [(first["prompt"], s["prompt"]) for s in others]
        against = [{"from": a, "to": b, **compare(rows[a], rows[b]).to_json()} for a, b in pairs]
        found.append({
            "benchmark": benchmark, "num_prompts": len(values), "mean": float(np.mean(values)),
            "lowest": min(values), "highest": max(values), "range": max(values) - min(values),
            "stdev": float(np.std(values, ddof=1)), "against_first": against,
        })  # fmt: skip
    return found


def averages(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the paper's averages (plain means), for each template with which all benchmarks of an average
    were fully evaluated. The distances to the ends of the interval are those of the benchmarks, added in
    quadrature.
    Source: Zou and Donner 2008 (doi:10.1002/sim.3095)"""
    found = []
    for name in ("ID", "OOD"):
        members = {b.id for b in TABLE if b.average == name}
        for prompt in dict.fromkeys(s["prompt"] for s in scores):
            own = [s for s in scores if s["prompt"] == prompt and s["data"] in members and s["whole"]]
            if {s["data"] for s in own} != members:
                continue
            mean = float(np.mean([s["score"] for s in own]))
            below, above = (math.hypot(*(s[e] - s["score"] for s in own)) / len(own) for e in ("low", "high"))
            ends = {"low": mean - below, "high": mean + above}
            found.append({"average": name, "prompt": prompt, "score": mean, **ends})
    return found
