"""Audits a step function in this process, for tests, without a child process.

The cases, recorder and judge are the same as in every audit. This module needs torch, and the pytest plugin
imports it only when a test uses it.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from truestep.audit.environments.launch import LEARNING_RATE
from truestep.audit.measure import cases, recorder
from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.measure.observations import Observation, ObservationError, load
from truestep.audit.measure.verdict import check_objective, judge
from truestep.audit.subjects import FOLDER, OWN

_LOADED: dict[str, ModuleType] = {"recorder": recorder}


def subject_module(name: str) -> Any:
    """Import a module from subjects/. Its modules are scripts that import each other by their bare names.

    Neither the folder nor the bare names stay importable, because a caller may have its own ``harness``, and
    a subject must not hide the framework that it is named after.
    """
    if name not in _LOADED:
        ours = {"recorder", *(path.stem for path in FOLDER.glob("*.py"))}
        hidden = {other: sys.modules.pop(other) for other in ours if other in sys.modules}
        sys.modules.update(_LOADED)
        sys.path.insert(0, str(FOLDER))
        try:
            importlib.import_module(name)
            _LOADED.update({other: sys.modules[other] for other in ours if other in sys.modules})
        finally:
            sys.path.remove(str(FOLDER))
            for other in ours:
                sys.modules.pop(other, None)
            sys.modules.update(hidden)
    return _LOADED[name]


def audit_function(
    step: Callable[..., Any],
    *,
    arch: str = "plain",
    names: Sequence[str] = OWN,
    accumulation: int = 4,
    seed: int = 0,
    objective: str = "token_mean",
    resume: Sequence[Callable[..., Any]] = (),
) -> Finding:
    """Judge ``step(model, optimizer, microbatches)`` on one process. subjects/user_loop.py has its contract.

    ``objective`` is what the step should compute (``verdict.OBJECTIVES``). The caller's random numbers continue
    as if nothing had been audited. ``resume`` has the functions ``save`` and ``load`` of (folder, model, optimizer),
    with which the step is also stopped and continued. If no case can be run, the error of the step is raised.
    """
    check_objective(objective)
    names = [*names, *(["resumed"] if resume else [])]
    harness, user_loop = subject_module("harness"), subject_module("user_loop")
    subject, configuration = getattr(step, "__qualname__", "step"), {"arch": arch, "processes": 1}
    runs: dict[str, Observation] = {}
    errors: list[BaseException] = []
    loop = None
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="truestep-audit-") as folder:
        for name in names:
            case = cases.build(name, world_size=1, accumulation=accumulation, seed=seed)
            place = Path(folder) / name
            place.mkdir()
            raw = {"options": {"arch": arch}, "learning_rate": LEARNING_RATE["sgd"]}
            spec = harness.Spec(place, case.to_json(), raw)
            loop = loop or user_loop.Loop(step, spec, resume)
            with harness.Attempt() as attempt:
                loop.run(spec)
            if attempt.error is not None:
                errors.append(attempt.error)
                runs[name] = Observation(asked=case, not_run=harness.why_not(attempt.error))
                continue
            try:
                runs[name] = load(place, case, learning_rate=LEARNING_RATE["sgd"])
            except ObservationError as error:
                reasons, verdict = (error.cause,), Verdict.NOT_OBSERVABLE
                return Finding(subject=subject, configuration=configuration, verdict=verdict, reasons=reasons)
    if errors and len(errors) == len(runs):
        raise errors[0]
    return judge(subject, configuration, runs, objective=objective)
