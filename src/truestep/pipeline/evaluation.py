"""The evaluations during a run: dev scores within a stage, and test scores after each stage. Several ranks share
the samples of an evaluation; a sample depends only on the seed, the problem, its number and the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from truestep.evaluate.run import EvaluationPlan, Key, conclude, engine_answers, missing, record
from truestep.pipeline.models import Session, evaluation_identity, make_engine, stage_identity
from truestep.rollout.engine import Engine, SamplingParameters
from truestep.settings import SamplingSettings
from truestep.train.loop import Measure
from truestep.train.parallel import is_sharded
from truestep.train.policy import Policy
from truestep.train.weight_sync import publish


def sampling_parameters(settings: SamplingSettings, stop_ids: tuple[int, ...]) -> SamplingParameters:
    return SamplingParameters(stop_token_ids=stop_ids, **settings.model_dump(exclude={"max_running"}))


def dev_score(
    session: Session, index: int, policy: Policy, engine: Engine | None, folder: Path, path: str
) -> Measure | None:
    """Return a function that gives the score on the stage's dev set at a step, or None without a dev set.
    Samples stay in ``folder`` if interrupted. They come from ``engine`` or, if that is None, ``policy``, which
    starts from the model in ``path``. All ranks call the function, and it returns the same on all."""
    prepared = session.prepared
    dev, identity = prepared.settings.stages[index].dev, stage_identity(prepared, index)
    if not dev.data:
        return None
    limits = prepared.settings.evaluate.data_sampling.model_copy(update={"temperature": dev.temperature})
    sampling = sampling_parameters(limits, prepared.stop_ids)
    stage = prepared.settings.stages[index]
    shared = engine or make_engine(session, policy, path, limits.max_running, stage)

    def score(step: int) -> float:
        if engine is None and is_sharded(policy):  # otherwise the engine samples from the policy itself
            publish(policy, shared, step, session.ranks)
        results = _evaluate(
            session, lambda: shared, name=dev.data, sampling=sampling,
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
            session, engine, f"evaluate {checkpoint} on {name}", name=name,
            sampling=sampling_parameters(limits, session.prepared.stop_ids), pass_at=settings.pass_at,
            samples_per_problem=settings.data_samples, folder=session.folder / "evaluations" / checkpoint,
            identity=evaluation_identity(session.prepared, identity, name),
        )  # fmt: skip


def _evaluate(session: Session, engine: Callable[[], Engine], title: str = "", **more: Any) -> dict[str, Any]:
    """Evaluate on one data set, each rank its share. Progress (of rank 0's share) is shown only if there is a
    title."""
    prepared, ranks = session.prepared, session.ranks
    plan = EvaluationPlan(prompts=prepared.prompts[more["name"]], seed=prepared.settings.seed, **more)
    shown: dict[str, Any] = {"reporter": session.reporter if title else None, "title": title}
    answer = engine_answers(plan, engine, session.decode, session.check_stop)
    asked = ranks.exchange(missing(plan) if ranks.rank == 0 else None)[0]
    with ranks.apart():
        share = share_of([(name, number) for name, number in asked], ranks.rank, ranks.world_size)
        record(plan, share, answer=answer, judge=session.grader.judge, rank=ranks.rank, **shown)
    return dict(ranks.exchange(conclude(plan) if ranks.rank == 0 else None)[0])


def share_of(keys: Sequence[Key], rank: int, world_size: int) -> list[Key]:
    """Return a rank's share of the keys. Samples of a problem stay together, because they share its prefill,
    unless there are fewer problems than ranks."""
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in keys))}
    if len(places) < world_size:
        return list(keys[rank::world_size])
    return [key for key in keys if places[key[0]] % world_size == rank]
