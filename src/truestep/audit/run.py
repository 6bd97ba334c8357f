"""A subject in a configuration → a finding. A subject that cannot run is a finding too, with the reason."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from truestep.audit import cases
from truestep.audit.judge import Finding, Verdict, judge
from truestep.audit.launch import Job, SubjectFailed
from truestep.audit.launch import run as run_job
from truestep.audit.observe import ObservationError
from truestep.audit.registry import Configuration, Subject

# A large SGD step reads its gradient back more exactly; AdamW's step is its learning rate, whatever the
# gradient.
LEARNING_RATE = {"sgd": 0.5, "adamw": 1e-2}


def audit_one(
    subject: Subject, configuration: Configuration, python: Path, *, seed: int = 0, timeout: float = 120.0
) -> Finding:
    """One subject in one configuration, all of its cases."""
    began = time.monotonic()
    optimizer = str(configuration.options.get("optimizer", "sgd"))
    accumulation = int(configuration.options.get("accumulation", 4))
    job = Job(
        script=subject.script,
        python=python,
        cases=[
            cases.build(name, world_size=configuration.world_size, accumulation=accumulation, seed=seed)
            for name in configuration.only
        ],
        options=configuration.options,
        learning_rate=LEARNING_RATE[optimizer],
        world_size=configuration.world_size,
        timeout=timeout,
    )
    shown = configuration.to_json()
    try:
        runs = run_job(job)
        finding = judge(
            subject.name,
            shown,
            runs,
            documented=configuration.documented,
            without=dict(configuration.without),
        )
    except SubjectFailed as error:
        finding = Finding(
            subject=subject.name, configuration=shown, verdict=Verdict.NOT_RUN, reason=str(error)
        )
    except ObservationError as error:
        finding = Finding(
            subject=subject.name, configuration=shown, verdict=Verdict.NOT_OBSERVABLE, reason=str(error)
        )
    return replace(finding, seconds={**finding.seconds, "total": time.monotonic() - began})
