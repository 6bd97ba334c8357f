"""A run's own evaluations: dev scores inside a stage, test scores after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from truestep import signals
from truestep.data.chat import completion_text
from truestep.evaluate.run import EvaluationPlan, run_evaluation
from truestep.grade.score import Grader
from truestep.pipeline.identity import stage_identity
from truestep.pipeline.prepare import Prepared
from truestep.progress import Reporter
from truestep.rollout.engine import Engine, SamplingParameters
from truestep.settings import SamplingSettings


def sampling_parameters(settings: SamplingSettings, stop_ids: tuple[int, ...]) -> SamplingParameters:
    return SamplingParameters(
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        stop_token_ids=stop_ids,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )


def dev_score(
    prepared: Prepared, index: int, *, engine: Engine, grader: Grader, folder: Path
) -> Callable[[int], float]:
    """Step → score on the stage's dev set; the samples are kept in the stage's folder."""
    stage, identity = prepared.settings.stages[index], stage_identity(prepared, index)
    limits = prepared.settings.evaluate.sampling.model_copy(update={"temperature": stage.dev.temperature})

    def score(step: int) -> float:
        plan = EvaluationPlan(
            name=stage.dev.data,
            prompts=prepared.prompts[stage.dev.data],
            sampling=sampling_parameters(limits, prepared.stop_ids),
            samples_per_problem=stage.dev.samples_per_problem,
            seed=prepared.settings.seed,
            folder=folder / "dev" / f"step_{step:08d}",
            identity=f"{identity}/{step}",
        )
        results = run_evaluation(
            plan,
            engine=engine,
            grade=grader.score,
            decode=lambda ids: completion_text(prepared.tokenizer, ids),
        )
        engine.take_cost()  # evaluation is not training: no ledger counts it
        return float(results["estimate"]["score"])

    return score


def evaluate_model(
    prepared: Prepared,
    *,
    folder: Path,
    identity: Callable[[str], str],
    open_engine: Callable[[], Engine],
    grader: Grader,
    reporter: Reporter,
) -> None:
    """Evaluate one checkpoint on every test set; samples that exist already are kept. ``folder.name`` is the
    checkpoint's name, ``identity`` maps a data set to the hash of all that its samples depend on."""
    settings, engine = prepared.settings.evaluate, None
    for name in settings.data:
        plan = EvaluationPlan(
            name=name,
            prompts=prepared.prompts[name],
            sampling=sampling_parameters(settings.sampling, prepared.stop_ids),
            samples_per_problem=settings.samples_per_problem,
            seed=prepared.settings.seed,
            folder=folder,
            identity=identity(name),
            pass_at=settings.pass_at,
        )
        engine = engine or open_engine()
        reporter.begin(f"evaluate {folder.name} on {name}", len(plan.prompts) * plan.samples_per_problem)
        run_evaluation(
            plan,
            engine=engine,
            grade=grader.score,
            decode=lambda ids: completion_text(prepared.tokenizer, ids),
            progress=lambda done, total, counts: reporter.advance(done, running_score(counts)),
            check_stop=signals.check,
        )


def running_score(counts: Mapping[str, int]) -> str:
    done = sum(counts.values())
    return f"score {counts.get('correct', 0) / done:.3f}" if done else ""
