"""The evaluations during a run: dev scores within a stage, and test scores after each stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from truestep import signals
from truestep.evaluate.run import EvaluationPlan, engine_answers, run_evaluation
from truestep.pipeline.models import Session, evaluation_identity, make_engine, stage_identity
from truestep.rollout.engine import Engine, SamplingParameters
from truestep.settings import SamplingSettings
from truestep.train.loop import DevScore
from truestep.train.policy import Policy


def sampling_parameters(settings: SamplingSettings, stop_ids: tuple[int, ...]) -> SamplingParameters:
    return SamplingParameters(stop_token_ids=stop_ids, **settings.model_dump(exclude={"max_running"}))


def dev_score(
    session: Session, index: int, policy: Policy, engine: Engine | None, folder: Path
) -> DevScore | None:
    """Return a function that gives the score on the stage's dev set at a step, or None without a dev set.
    Samples stay in ``folder`` if interrupted. They come from ``engine`` or, if that is None, ``policy``."""
    prepared = session.prepared
    dev, identity = prepared.settings.stages[index].dev, stage_identity(prepared, index)
    if not dev.data:
        return None
    limits = prepared.settings.evaluate.data_sampling.model_copy(update={"temperature": dev.temperature})
    sampling = sampling_parameters(limits, prepared.stop_ids)
    shared = engine or make_engine(session, policy, "", limits.max_running)

    def score(step: int) -> float:
        results = _evaluate(
            session, lambda: shared, session.check_stop, name=dev.data, sampling=sampling,
            samples_per_problem=dev.samples_per_problem, folder=folder / f"dev/step_{step:08d}",
            identity=f"{identity}/{step}",
        )  # fmt: skip
        shared.take_cost()  # evaluation is not training, so its cost is not counted
        return float(results["estimate"]["score"])

    return score


def evaluate_checkpoint(session: Session, checkpoint: str, path: str, identity: str) -> None:
    """Evaluate the model in ``path``, which has the hash ``identity``, on every test set. Existing samples
    are kept; the model is loaded only if samples are missing."""
    settings, limits = session.prepared.settings.evaluate, session.prepared.settings.evaluate.data_sampling
    engine = cache(lambda: make_engine(session, None, path, limits.max_running))
    for name in settings.data:
        _evaluate(
            session, engine, signals.check, f"evaluate {checkpoint} on {name}", name=name,
            sampling=sampling_parameters(limits, session.prepared.stop_ids), pass_at=settings.pass_at,
            samples_per_problem=settings.data_samples, folder=session.folder / "evaluations" / checkpoint,
            identity=evaluation_identity(session.prepared, identity, name),
        )  # fmt: skip


def _evaluate(
    session: Session, engine: Callable[[], Engine], stop: Callable[[], None], title: str = "", **more: Any
) -> dict[str, Any]:
    """Evaluate on one data set. Progress is shown only if there is a title."""
    prepared, reporter = session.prepared, session.reporter if title else None
    plan = EvaluationPlan(prompts=prepared.prompts[more["name"]], seed=prepared.settings.seed, **more)
    answer = engine_answers(plan, engine, session.decode, stop)
    return run_evaluation(plan, answer=answer, judge=session.grader.judge, reporter=reporter, title=title)
