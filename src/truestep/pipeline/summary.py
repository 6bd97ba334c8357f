"""What a run has done so far, as rows: for summary.json, the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep import rundir
from truestep.pipeline.evaluation import comparisons, score_rows
from truestep.pipeline.models import Session
from truestep.pipeline.stages import stage_folder


def stage_row(session: Session, done: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "kind", "method", "data", "steps", "flops_paper", "flops_full", "seconds", "tokens")
    row = {key: done[key] for key in kept}
    return row | {"seed": session.prepared.settings.seed, "flops": done["flops_paper"]}


def stage_rows(session: Session, before: int | None = None) -> list[dict[str, Any]]:
    stages = session.prepared.settings.stages[:before]
    paths = [stage_folder(session.folder, index, stage) / "done.json" for index, stage in enumerate(stages)]
    return [stage_row(session, rundir.read_json(path)) for path in paths if path.exists()]


def evaluated(session: Session) -> tuple[Path, list[str], tuple[str, ...]]:
    """The folder of the evaluations, their checkpoints and their data sets."""
    settings = session.prepared.settings
    names = ["base", *(s.name for s in settings.stages)]
    return session.folder / "evaluations", names, settings.evaluate.data


def summarize(session: Session, status: str) -> dict[str, Any]:
    settings = session.prepared.settings
    shapes = [rundir.read_json(p)["shape"] for p in sorted(session.folder.glob("stages/*/done.json"))]
    summary = {
        "name": settings.name,
        "seed": settings.seed,
        "status": status,
        "model": {"path": rundir.redact(settings.model.path), **(shapes[0] if shapes else {})},
        "stages": stage_rows(session),
        "scores": score_rows(*evaluated(session)),
        "comparisons": comparisons(*evaluated(session)),
        "content": {"model": session.prepared.model_content, **session.prepared.content},
        "code": {name: code for name, code in session.prepared.code.items() if code},
        "overlap": session.prepared.overlap or None,
        "notes": session.prepared.notes,
    }
    rundir.write_json(session.folder / "summary.json", summary)
    return summary
