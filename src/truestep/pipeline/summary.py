"""What a run has done so far, as rows: for summary.json, the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from truestep import rundir
from truestep.evaluate.compare import compare
from truestep.pipeline.models import Session
from truestep.pipeline.stages import stage_folder


def stage_row(session: Session, done: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "kind", "method", "data", "steps", "flops_paper", "flops_full", "seconds", "tokens")
    return {
        **{k: done[k] for k in kept},
        "seed": session.prepared.settings.seed,
        "flops": done["flops_paper"],
    }


def stage_rows(session: Session, before: int | None = None) -> list[dict[str, Any]]:
    rows = []
    for index, stage in enumerate(session.prepared.settings.stages[:before]):
        path = stage_folder(session.folder, index, stage) / "done.json"
        if path.exists():
            rows.append(stage_row(session, rundir.read_json(path)))
    return rows


def score_rows(session: Session) -> list[dict[str, Any]]:
    settings = session.prepared.settings
    rows = []
    for checkpoint in ["base", *[s.name for s in settings.stages]]:
        for name in settings.evaluate.data:
            path = session.folder / "evaluations" / checkpoint / f"{name}.results.json"
            if path.exists():
                found = rundir.read_json(path)["estimate"]
                rows.append(
                    {
                        "checkpoint": checkpoint,
                        "data": name,
                        **found,
                        "metric": f"avg@{settings.evaluate.samples_per_problem}",
                        "value": found["score"],
                        "num_samples": found["n"],
                    }
                )
    return rows


def _comparisons(session: Session) -> list[dict[str, Any]]:
    """Each checkpoint against the one before it, paired by problem."""
    settings = session.prepared.settings
    names = ["base", *[s.name for s in settings.stages]]
    rows = []
    for before, after in pairwise(names):
        for data in settings.evaluate.data:
            paths = [
                session.folder / "evaluations" / name / f"{data}.results.json" for name in (before, after)
            ]
            if all(p.exists() for p in paths):
                samples = [
                    [
                        row
                        for row in rundir.read_jsonl(p.with_name(f"{data}.samples.jsonl"))
                        if "verdict" in row
                    ]
                    for p in paths
                ]
                rows.append({"from": before, "to": after, "data": data, **compare(*samples).to_json()})
    return rows


def summarize(session: Session, status: str) -> dict[str, Any]:
    settings = session.prepared.settings
    shapes = [rundir.read_json(p)["shape"] for p in sorted(session.folder.glob("stages/*/done.json"))]
    summary = {
        "name": settings.name,
        "seed": settings.seed,
        "status": status,
        "model": {"path": rundir.redact(settings.model.path), **(shapes[0] if shapes else {})},
        "stages": stage_rows(session),
        "scores": score_rows(session),
        "comparisons": _comparisons(session),
        "content": {"model": session.prepared.model_content, **session.prepared.content},
        "overlap": session.prepared.overlap or None,
        "notes": session.prepared.notes,
    }
    rundir.write_json(session.folder / "summary.json", summary)
    return summary
