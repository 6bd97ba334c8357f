"""A stage's specification: settings and a model folder → everything that the loop needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from truestep import signals
from truestep.flops import Ledger
from truestep.objective.methods import Method
from truestep.objective.methods.row import DemonstrationBuffer
from truestep.objective.schedule import learning_rate
from truestep.pipeline.evaluation import dev_score, evaluate_checkpoint, sampling_parameters
from truestep.pipeline.identity import stage_identity
from truestep.pipeline.models import Session, make_engine, make_policy, open_model
from truestep.pipeline.prepare import hinted_prompt, num_sequences, num_steps
from truestep.pipeline.rejection import rejection_samples
from truestep.records import Demonstration, Score
from truestep.rewards.scorer import RewardScorer
from truestep.rollout.engine import Engine
from truestep.rollout.engine_torch import TorchEngine
from truestep.rollout.sample import Sampler
from truestep.settings import RejectionSettings, RlSettings, SftSettings, StageSettings
from truestep.train.loop import StageSpec
from truestep.train.optim import MasterOptimizer
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.source import DemonstrationSource, RolloutSource
from truestep.train.update import Updater


def make_stage(
    session: Session, index: int, path: str, ledger: Ledger, steps_before: int, stack: ExitStack
) -> StageSpec:
    """Assemble stage ``index``, which starts from the model in ``path``. ``stack`` ends the workers of its
    rewards."""
    prepared, ranks = session.prepared, session.ranks
    stage, method = prepared.settings.stages[index], prepared.methods[prepared.settings.stages[index].name]
    folder = stage_folder(session.folder, index, stage)
    policy = make_policy(session, path)
    sampling = getattr(stage, "sampling", None)
    scorer = Scorer(
        policy=policy,
        reference=make_policy(session, path).requires_grad_(False) if method.needs_reference else None,
        temperature=stage.sampling.temperature if isinstance(stage, RlSettings) else 1.0,
        tokens_per_microbatch=stage.tokens_per_microbatch,
        ranks=ranks,
        check_stop=_check_stop(session),
    )
    engine: Engine | None = None
    if isinstance(stage, RlSettings):
        engine = make_engine(session, policy, path, stage.sampling.max_running)
        base, grade = prepared.base_dir, session.grader.score_many
        rewards = RewardScorer(stage.reward_entries, grade=grade, base=base, folder=folder / "rewards")
        score = stack.enter_context(rewards).score
        source: DemonstrationSource | RolloutSource = _rollout_source(session, stage, engine, scorer, score)
        steps = stage.steps
    elif isinstance(stage, RejectionSettings):
        kept, cost = rejection_samples(session, stage, policy, folder, path)
        ledger = ledger + cost
        source, steps = _demonstrations(session, stage, kept)
    elif isinstance(stage, SftSettings):
        source, steps = _demonstrations(session, stage, prepared.demonstrations[stage.data])
    else:
        raise TypeError(f"unknown stage {type(stage).__name__}")
    o = stage.optimizer
    updater = Updater(
        policy=policy,
        scorer=scorer,
        method=method,
        optimizers=optimizers_of(policy, stage, method),
        learning_rate=learning_rate(
            peak=o.lr,
            kind=o.schedule,
            total_steps=steps * source.updates_per_step,
            warmup_fraction=o.warmup_fraction,
            min_ratio=o.min_lr_ratio,
        ),
        updates_per_step=source.updates_per_step,
        faults=stage.faults,
        max_length=sampling.max_new_tokens if sampling else prepared.context_length,
    )
    return StageSpec(
        name=stage.name,
        folder=folder,
        settings=stage,
        identity=stage_identity(prepared, index),
        policy=policy,
        source=source,
        updater=updater,
        num_steps=steps,
        engine=engine,
        dev_score=_dev_score(session, index, policy, engine, folder),
        ranks=ranks,
        ledger=ledger,
        on_step=_on_step(session, stage.name, steps_before),
        warn=session.reporter.say,
    )


def _check_stop(session: Session) -> Callable[[], None]:
    """With several ranks none may leave in the middle of a step."""
    return signals.check if session.ranks.world_size == 1 else lambda: None


def optimizers_of(policy: Policy, stage: StageSettings, method: Method) -> dict[str, MasterOptimizer]:
    """The stage's optimizer, and the separate one of a method with a buffer."""
    main = MasterOptimizer(policy, stage.optimizer)
    buffer = method.part(DemonstrationBuffer)
    if buffer is None:
        return {"optimizer": main}
    own = stage.optimizer.model_copy(update={"lr": buffer.lr, "max_grad_norm": buffer.max_grad_norm})
    return {"optimizer": main, "buffer-optimizer": MasterOptimizer(policy, own, beside=main)}


def _on_step(session: Session, name: str, before: int) -> Callable[[int, Mapping[str, float], float], None]:
    """Report progress, and log to the trackers, which count steps over the whole run."""

    def on_step(step: int, metrics: Mapping[str, float], seconds: float) -> None:
        session.reporter.advance(step, step_note(metrics))
        row = {f"{name}/{key}": value for key, value in metrics.items()} | {f"{name}/seconds": seconds}
        for log in session.trackers:
            log(before + step, row)

    return on_step


def stage_folder(run: Path, index: int, stage: StageSettings) -> Path:
    return run / "stages" / f"{index + 1:02d}-{stage.name}"


def step_note(metrics: Mapping[str, float]) -> str:
    """The few figures to show while it runs."""
    labels = {"mixed_groups": "mixed", "dev/score": "dev"}
    shown = [key for key in ("reward", "loss", "mixed_groups", "dev/score", "entropy") if key in metrics]
    return "  ".join(f"{labels.get(key, key)} {metrics[key]:.3f}" for key in shown)


def _demonstrations(
    session: Session, stage: SftSettings | RejectionSettings, kept: Sequence[Demonstration]
) -> tuple[DemonstrationSource, int]:
    source = DemonstrationSource(
        kept,
        sequences_per_step=stage.sequences_per_step,
        num_sequences=num_sequences(stage, len(kept)),
        seed=session.prepared.settings.seed,
        ranks=session.ranks,
        updates_per_step=session.prepared.methods[stage.name].updates_per_step,
    )
    return source, num_steps(stage, len(kept))


def _rollout_source(
    session: Session, stage: RlSettings, engine: Engine, scorer: Scorer, score: Callable[..., list[Score]]
) -> RolloutSource:
    prepared = session.prepared
    method = prepared.methods[stage.name]
    assert method.plan is not None  # checked when the run was prepared
    traces = prepared.demonstrations[stage.data] if method.needs_demonstrations else ()
    sampler = Sampler(
        engine=engine,
        plan=method.plan,
        sampling=sampling_parameters(stage.sampling, prepared.stop_ids),
        samples_per_prompt=stage.samples_per_prompt,
        decode=session.decode,
        score=score,
        seed=prepared.settings.seed,
        solved_at=stage.solved_at,
        check_stop=_check_stop(session),
        demonstrations={d.problem_id: d.token_ids[d.num_prompt_tokens :] for d in traces},
        hinted=lambda prompt, fraction: hinted_prompt(prepared, prompt, fraction),
    )
    return RolloutSource(
        prepared.stage_prompts[stage.name],
        sampler=sampler,
        scorer=scorer,
        method=method,
        prompts_per_step=stage.prompts_per_step,
        updates_per_step=stage.updates_per_rollout,
        decode_prompt=session.decode_prompt,
    )


def _dev_score(
    session: Session, index: int, policy: Policy, engine: Engine | None, folder: Path
) -> Callable[[int], float] | None:
    prepared = session.prepared
    if not prepared.settings.stages[index].dev.data:
        return None
    shared = engine or make_engine(session, policy, "", prepared.settings.evaluate.data_sampling.max_running)
    return dev_score(prepared, index, shared, session.grader, folder, _check_stop(session))


def evaluate(session: Session, checkpoint: str, path: str, identity: Callable[[str], str]) -> None:
    """Evaluate the model in ``path`` on every test set."""

    def open_engine() -> TorchEngine:
        policy = Policy(open_model(session, path))
        running = session.prepared.settings.evaluate.data_sampling.max_running
        return TorchEngine(policy.model, max_running=running, packs=policy.packs and policy.plain_head)

    evaluate_checkpoint(
        session.prepared,
        folder=session.folder / "evaluations" / checkpoint,
        identity=identity,
        open_engine=open_engine,
        grader=session.grader,
        reporter=session.reporter,
    )
