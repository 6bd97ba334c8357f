"""A finished cell as one small file, with scores by problem, FLOPs, curves, hashes and provenance. The tables
need nothing else. If the files are committed, a study can be continued later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from truestep.errors import UserError
from truestep.evaluate.files import read_samples
from truestep.records import Stop, Verdict
from truestep.rundir import read_json
from truestep.settings import OUTSIDE_RESULTS, Settings, settings_hash
from truestep.train.logs import read_log

SCHEMA = 1
DYNAMICS = ("reward", "completions/mean_length", "entropy", "grad_norm", "loss", "dev/score", "flops_paper")
MOST_POINTS = 50
EVALUATED = ("data", "samples_per_problem", "pass_at", "sampling", "before")  # a study uses only data sets


def cell_name(arm: str, seed: int) -> str:
    """Return a cell's name, for files and messages. It is never parsed, because arm and seed are fields."""
    return f"{arm}-s{seed}"


def cell_key(settings: Settings, base: str) -> str:
    """Hash all that a cell's scores depend on, without paths and names. ``base`` identifies the inputs."""
    stages = tuple(stage.model_copy(update=OUTSIDE_RESULTS) for stage in settings.stages)
    own = settings.model_copy(update={"name": "cell", "stages": stages, "trackers": (), "group": ""})
    payload = own.model_dump(mode="json", exclude={"vllm"})  # how servers run, not what they sample
    evaluate = {**payload["evaluate"], "sampling": settings.evaluate.data_sampling.model_dump(mode="json")}
    payload["evaluate"] = {key: evaluate[key] for key in EVALUATED}
    return settings_hash(payload, base)


def compact(run: Path, *, arm: str, seed: int, key: str) -> dict[str, Any]:
    """Return a finished run directory as a cell."""
    summary = read_json(run / "summary.json")
    if summary["status"] != "done":
        raise UserError(f"{run} is not finished (its summary says {summary['status']}); run the study again")
    checkpoint = summary["stages"][-1]["name"] if summary["stages"] else "base"
    spent = {kind: sum(float(s[f"flops_{kind}"]) for s in summary["stages"]) for kind in ("paper", "full")}
    folders = sorted((run / "stages").glob("[0-9]*-*")) if summary["stages"] else []
    return {
        "schema": SCHEMA, "arm": arm, "seed": seed, "key": key, "checkpoint": checkpoint,
        "benchmarks": {
            path.name.removesuffix(".samples.jsonl"): _scores(read_samples(path))
            for path in sorted((run / "evaluations" / checkpoint).glob("*.samples.jsonl"))
        },
        "path": _path(summary), "flops": spent, "stages": [_stage(s) for s in summary["stages"]],
        "best": {p.name.partition("-")[2]: read_json(p / "done.json")["best"] for p in folders},
        "dynamics": {p.name.partition("-")[2]: dynamics(read_log(p, "metrics.jsonl")) for p in folders},
        **{k: summary[k] for k in ("content", "overlap", "notes")},
        **({"warnings": warned} if (warned := summary.get("warnings")) else {}),
        "seconds": {s["name"]: round(float(s["seconds"]), 1) for s in summary["stages"]},
        "provenance": {k: v for k, v in read_json(run / "provenance.json").items() if k != "command"},
    }  # fmt: skip


def _stage(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "kind", "method", "data", "steps", "flops_paper", "flops_full")
    tokens = {k: v for k, v in entry["tokens"].items() if k.endswith("tokens")}
    return {**{k: entry[k] for k in kept}, "tokens": tokens}


def _path(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the score of every checkpoint of the run, and the FLOPs spent up to it."""
    total = {"flops_paper": 0.0, "flops_full": 0.0}
    spent = {"base": total}
    for stage in summary["stages"]:
        spent[stage["name"]] = total = {kind: total[kind] + stage[kind] for kind in total}
    kept = ("checkpoint", "data", "score")
    return [{k: s[k] for k in kept} | spent[s["checkpoint"]] for s in summary["scores"]]


def _scores(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the correct and unscored samples of each problem, in the order of the data."""
    order = list(dict.fromkeys(row["problem_id"] for row in samples))
    correct, unscored = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
    for row in samples:
        correct[row["problem_id"]] += row["verdict"] == Verdict.CORRECT
        unscored[row["problem_id"]] += row["verdict"] == Verdict.UNSCORED
    if not order or len(samples) % len(order):
        raise UserError("an evaluation has problems with different numbers of samples; run the cell again")
    return {
        "problems": settings_hash(*order), "num_problems": len(order), "samples": len(samples) // len(order),
        "correct": " ".join(map(str, correct.values())),
        "unscored": {problem: n for problem, n in unscored.items() if n},
        "truncated": float(np.mean([row.get("stop") == Stop.LENGTH for row in samples])),
        "mean_tokens": float(np.mean([row.get("num_tokens", 0) for row in samples])),
    }  # fmt: skip


def dynamics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Return a few curves of a stage, each of at most ``MOST_POINTS`` points [step, mean since the last]."""
    found: dict[str, list[list[float]]] = {}
    for name in DYNAMICS:
        logged = [(row["step"], v) for row in metrics for k, v in row.items() if k.partition("/")[2] == name]
        points = [(s, v) for s, v in logged if math.isfinite(v)]
        width = max(1, math.ceil(len(points) / MOST_POINTS))
        cuts = [points[i : i + width] for i in range(0, len(points), width)]
        if cuts:
            found[name] = [[cut[-1][0], float(f"{np.mean([v for _, v in cut]):.6g}")] for cut in cuts]
    return found


def counts(cell: Mapping[str, Any], benchmark: str) -> np.ndarray:
    return np.array([int(n) for n in cell["benchmarks"][benchmark]["correct"].split()], dtype=float)


def score(cell: Mapping[str, Any], benchmark: str) -> float:
    return float(counts(cell, benchmark).mean() / cell["benchmarks"][benchmark]["samples"])
