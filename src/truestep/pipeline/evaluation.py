"""A run's own evaluations: dev scores inside a stage, test scores after each stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from truestep import signals
from truestep.evaluate.run import EvaluationPlan, engine_answers, run_evaluation
from truestep.pipeline.models import Session, make_engine
from truestep.pipeline.prepare import evaluation_identity, stage_identity
from truestep.rollout.engine import Engine, SamplingParameters
from truestep.settings import SamplingSettings
from truestep.train.loop import DevScore
from truestep.train.policy import Policy


def sampling_parameters(settings: SamplingSettings, stop_ids: tuple[int, ...]) -> SamplingParameters:
    return SamplingParameters(stop_token_ids=stop_ids, **settings.model_dump(exclude={"max_running"}))


def dev_score(
    session: Session, index: int, policy: Policy, engine: Engine | None, folder: Path
) -> DevScore | None:
    """Step → score on the stage's dev set, if it has one; samples are kept in the stage's ``folder``, also
    those of an interrupted score. ``engine`` samples if there is one, else one on ``policy``."""
    settings, identity = session.prepared.settings, stage_identity(session.prepared, index)
    dev = settings.stages[index].dev
    if not dev.data:
        return None
    limits = settings.evaluate.data_sampling.model_copy(update={"temperature": dev.temperature})
    shared = engine or make_engine(session, policy, "", limits.max_running)

    def score(step: int) -> float:
        place: dict[str, Any] = {"folder": folder / f"dev/step_{step:08d}", "identity": f"{identity}/{step}"}
        plan = {"name": dev.data, "samples_per_problem": dev.samples_per_problem, **place}
        results = _evaluate(session, lambda: shared, session.check_stop, limits, **plan)
        shared.take_cost()  # evaluation is not training: no ledger counts it
        return float(results["estimate"]["score"])

    return score


def evaluate_checkpoint(session: Session, checkpoint: str, path: str, identity: str) -> None:
    """Evaluate the model in ``path``, with the hash ``identity``, on every test set. Existing samples are
    kept; the model is loaded only if some are missing."""
    settings, folder = session.prepared.settings.evaluate, session.folder / "evaluations" / checkpoint
    engine = cache(lambda: make_engine(session, None, path, settings.data_sampling.max_running))
    plan: dict[str, Any] = {"samples_per_problem": settings.data_samples, "pass_at": settings.pass_at}
    for name in settings.data:
        place = {"folder": folder, "identity": evaluation_identity(session.prepared, identity, name)}
        title = f"evaluate {checkpoint} on {name}"
        _evaluate(session, engine, signals.check, settings.data_sampling, title, name=name, **place, **plan)


def _evaluate(
    session: Session,
    engine: Callable[[], Engine],
    check_stop: Callable[[], None],
    limits: SamplingSettings,
    title: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Progress is shown only under a title."""
    prepared, shown = session.prepared, {"reporter": session.reporter, "title": title} if title else {}
    sampling, seed = sampling_parameters(limits, prepared.stop_ids), prepared.settings.seed
    plan = EvaluationPlan(prompts=prepared.prompts[more["name"]], sampling=sampling, seed=seed, **more)
    answer = engine_answers(plan, engine, session.decode, check_stop)
    return run_evaluation(plan, answer=answer, judge=session.grader.judge, **shown)
