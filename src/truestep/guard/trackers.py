"""Tells experiment trackers what the guard found. A tracker is used only if the training has imported it and has
an active run; nothing here imports one. TensorBoard has no active run that could be asked for."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

PREFIX = "truestep_guard"


def summary_of(records: list[dict[str, Any]], steps: int, failure: str) -> dict[str, Any]:
    """Return the state of a run as a few numbers and texts."""
    faulty = [r for r in records if r["verdict"] == "FAULT"]
    judged = any(r["verdict"] == "RIGHT" for r in records)
    found = {
        "verdict": "FAULT" if faulty else "RIGHT" if judged else "NOT OBSERVABLE",
        "steps": steps,
        "steps_watched": len(records),
        "faulty_steps": len(faulty),
        "seconds": sum(r["seconds"] for r in records),
    }
    if faulty:
        found |= {"first_faulty_step": faulty[0]["step"], "fault": faulty[0]["fault"]}
    if failure:
        found["off"] = failure
    return found


def tell(summary: dict[str, Any], *, is_finding: bool) -> None:
    """Write a summary to wandb's and trackio's active run. Errors of a tracker are ignored: the guard must not
    end the training."""
    with contextlib.suppress(Exception):
        _wandb(summary)
    with contextlib.suppress(Exception):
        _trackio(summary, is_finding)


def _wandb(summary: dict[str, Any]) -> None:
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        for key, value in summary.items():  # not logged, so that the training's step counter is not touched
            run.summary[f"{PREFIX}/{key}"] = value


def _trackio(summary: dict[str, Any], is_finding: bool) -> None:
    trackio = sys.modules.get("trackio")
    state = sys.modules.get("trackio.context_vars")
    if trackio is None or state is None or state.current_run.get() is None:
        return
    # trackio has no summary of a run, and a log entry would count as a step of the training.
    level = trackio.AlertLevel.ERROR if is_finding else trackio.AlertLevel.INFO
    text = ", ".join(f"{key} {value}" for key, value in summary.items() if key != "verdict")
    trackio.alert(title=f"truestep guard: {summary['verdict']}", text=text, level=level)
