"""Trackers: told only if the training has imported them and has an active run. With the real packages if they
are installed, otherwise with stand-ins that have the same parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import logs
import pytest

from truestep.guard import trackers


def test_nothing_is_imported() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import logs; logs.train(None, 'dropped')\n"
        "print([n for n in ('wandb', 'trackio', 'tensorboard', 'tensorboardX') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def stand_ins(
    monkeypatch: pytest.MonkeyPatch, run: Any, current: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary: dict[str, Any] = {}
    alerts: list[dict[str, Any]] = []
    wandb, trackio, state = ModuleType("wandb"), ModuleType("trackio"), ModuleType("trackio.context_vars")
    vars(wandb)["run"] = run and SimpleNamespace(summary=summary)
    vars(trackio).update(
        alert=lambda **a: alerts.append(a), AlertLevel=SimpleNamespace(ERROR="error", INFO="info")
    )
    vars(state)["current_run"] = SimpleNamespace(get=lambda: current)
    for name, module in {"wandb": wandb, "trackio": trackio, "trackio.context_vars": state}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return summary, alerts


def test_a_finding_and_the_end_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, alerts = stand_ins(monkeypatch, True, object())
    logs.train(None, "dropped")
    assert summary["truestep_guard/verdict"] == "FAULT"
    assert summary["truestep_guard/first_faulty_step"] == 1
    assert summary["truestep_guard/fault"] == "the intermediate micro-batches are dropped"
    assert (summary["truestep_guard/steps"], summary["truestep_guard/steps_watched"]) == (4, 3)
    # The same finding is told once, and the end once.
    assert [alert["level"] for alert in alerts] == ["error", "info"]


def test_a_right_run_tells_only_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, alerts = stand_ins(monkeypatch, True, object())
    logs.train(None)
    assert summary["truestep_guard/verdict"] == "RIGHT"
    assert "truestep_guard/fault" not in summary
    assert [alert["level"] for alert in alerts] == ["info"]


def test_without_an_active_run_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    summary, alerts = stand_ins(monkeypatch, None, None)
    logs.train(None, "dropped")
    assert (summary, alerts) == ({}, [])


def test_an_error_of_a_tracker_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    _, alerts = stand_ins(monkeypatch, True, object())

    class Broken:
        @property
        def summary(self) -> Any:
            raise RuntimeError("the server is gone")

    monkeypatch.setattr(sys.modules["wandb"], "run", Broken())
    watch = logs.train(None, "dropped")
    assert watch.failure == ""
    assert len(alerts) == 2  # the other tracker is still told


def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="guard")
    try:
        trackers.tell({"verdict": "FAULT", "steps": 4}, is_finding=True)
        assert run.summary["truestep_guard/verdict"] == "FAULT"
        assert run.step == 0
    finally:
        run.finish()


def test_trackio_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    from trackio import context_vars

    said: list[Any] = []
    monkeypatch.setattr(trackio, "alert", lambda title, text=None, level=None: said.append((title, level)))
    trackers.tell({"verdict": "FAULT"}, is_finding=True)
    assert said == []  # no active run
    token = context_vars.current_run.set(object())
    try:
        trackers.tell({"verdict": "FAULT"}, is_finding=True)
    finally:
        context_vars.current_run.reset(token)
    assert said == [("truestep guard: FAULT", trackio.AlertLevel.ERROR)]
