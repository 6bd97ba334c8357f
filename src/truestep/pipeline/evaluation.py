"""A run's own evaluations: dev scores inside a stage, test scores after each stage, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from truestep import signals
from truestep.data.chat import completion_text
from truestep.evaluate.compare import compare
from truestep.evaluate.files import read_samples, results_file, samples_file, score_row
from truestep.evaluate.run import EvaluationPlan, engine_answers, run_evaluation
from truestep.grade.score import Grader
from truestep.pipeline.identity import stage_identity
from truestep.pipeline.prepare import Prepared
from truestep.progress import Reporter
from truestep.rollout.engine import Engine, SamplingParameters
from truestep.rundir import read_json
from truestep.settings import SamplingSettings

DevScore = Callable[[int], float]


def sampling_parameters(settings: SamplingSettings, stop_ids: tuple[int, ...]) -> SamplingParameters:
    return SamplingParameters(
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        stop_token_ids=stop_ids,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )


def dev_score(
    prepared: Prepared,
    index: int,
    engine: Engine,
    grader: Grader,
    folder: Path,
    check_stop: Callable[[], None],
) -> DevScore:
    """Step → score on the stage's dev set; the samples are kept in the stage's folder, also those of a score
    that ``check_stop`` has interrupted."""
    dev, identity = prepared.settings.stages[index].dev, stage_identity(prepared, index)
    limits = prepared.settings.evaluate.data_sampling.model_copy(update={"temperature": dev.temperature})

    def score(step: int) -> float:
        plan = EvaluationPlan(
            name=dev.data,
            prompts=prepared.prompts[dev.data],
            sampling=sampling_parameters(limits, prepared.stop_ids),
            samples_per_problem=dev.samples_per_problem,
            seed=prepared.settings.seed,
            folder=folder / "dev" / f"step_{step:08d}",
            identity=f"{identity}/{step}",
        )
        decode = partial(completion_text, prepared.tokenizer)
        answer = engine_answers(plan, lambda: engine, decode, check_stop)
        results = run_evaluation(plan, answer=answer, judge=grader.judge)
        engine.take_cost()  # evaluation is not training: no ledger counts it
        return float(results["estimate"]["score"])

    return score


def evaluate_checkpoint(
    prepared: Prepared,
    *,
    folder: Path,
    identity: Callable[[str], str],
    open_engine: Callable[[], Engine],
    grader: Grader,
    reporter: Reporter,
) -> None:
    """Evaluate one checkpoint on every test set; existing samples are kept, and the model is loaded only if
    some are missing. ``folder.name`` is the checkpoint's name, ``identity`` maps a data set to the hash of
    all that its samples depend on."""
    settings, engine = prepared.settings.evaluate, cache(open_engine)
    for name in settings.data:
        plan = EvaluationPlan(
            name=name,
            prompts=prepared.prompts[name],
            sampling=sampling_parameters(settings.data_sampling, prepared.stop_ids),
            samples_per_problem=settings.data_samples,
            seed=prepared.settings.seed,
            folder=folder,
            identity=identity(name),
            pass_at=settings.pass_at,
        )
        decode = partial(completion_text, prepared.tokenizer)
        answer = engine_answers(plan, engine, decode, signals.check)
        title = f"evaluate {folder.name} on {name}"
        run_evaluation(plan, answer=answer, judge=grader.judge, reporter=reporter, title=title)


def score_rows(evaluations: Path, checkpoints: Sequence[str], data: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the summary: every checkpoint on every data set that has results."""
    paths = [(c, d, results_file(evaluations / c, d)) for c in checkpoints for d in data]
    return [score_row(d, read_json(path), checkpoint=c) for c, d, path in paths if path.exists()]


def comparisons(evaluations: Path, checkpoints: Sequence[str], data: Sequence[str]) -> list[dict[str, Any]]:
    """Each checkpoint against the one before it, paired by problem."""
    rows = []
    for before, after in pairwise(checkpoints):
        for name in data:
            if all(results_file(evaluations / c, name).exists() for c in (before, after)):
                a, b = (read_samples(samples_file(evaluations / c, name)) for c in (before, after))
                rows.append({"from": before, "to": after, "data": name, **compare(a, b).to_json()})
    return rows
