"""Makes a stage's specification for the training loop, from the settings and a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from truestep.flops import Ledger
from truestep.objective.methods import Method
from truestep.objective.methods.row import DemonstrationBuffer, Replay
from truestep.objective.schedule import learning_rate
from truestep.pipeline import shown
from truestep.pipeline.evaluation import dev_score, sampling_parameters
from truestep.pipeline.history import stage_folder
from truestep.pipeline.models import Session, earlier_identities, make_engine, make_policy, stage_identity
from truestep.pipeline.prompts import hinted_prompt
from truestep.pipeline.rejection import rejection_samples
from truestep.pipeline.sizes import num_sequences, num_steps
from truestep.pipeline.vllm import open_vllm
from truestep.records import Score
from truestep.rewards.scorer import RewardScorer
from truestep.rollout.engine import Engine
from truestep.rollout.sample import Sampler
from truestep.rundir import read_jsonl
from truestep.settings import RejectionSettings, RlSettings, SftSettings, StageSettings
from truestep.train.ahead import Comparison
from truestep.train.engine_test import GapTest
from truestep.train.loop import StageSpec
from truestep.train.optim import MasterOptimizer
from truestep.train.order import Order
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.source import DemonstrationSource, RolloutSource
from truestep.train.update import Updater
from truestep.train.validation import ValidationLoss
from truestep.train.watch import Watch


def make_stage(
    session: Session, index: int, path: str, ledger: Ledger, steps_before: int, stack: ExitStack
) -> StageSpec:
    """Make stage ``index``, which starts from the model in ``path``. Closing ``stack`` ends its workers."""
    prepared, ranks = session.prepared, session.ranks
    stage, method = prepared.settings.stages[index], prepared.methods[prepared.settings.stages[index].name]
    folder = stage_folder(session.folder, index, stage)
    policy = make_policy(session, path, stage)
    sampling = getattr(stage, "sampling", None)
    scorer = Scorer(
        policy=policy,
        reference=_reference(session, stage, policy, path) if method.needs_reference else None,
        temperature=stage.sampling.temperature if isinstance(stage, RlSettings) else 1.0,
        tokens_per_microbatch=stage.tokens_per_microbatch, ranks=ranks,
    )  # fmt: skip
    engine: Engine | None = None
    source: DemonstrationSource | RolloutSource
    if isinstance(stage, RlSettings):
        is_vllm, running = stage.engine == "vllm", stage.sampling.max_running
        if is_vllm:
            engine = open_vllm(session, stage, policy, stack)
        else:
            engine = make_engine(session, policy, path, running, stage)
        base, grade = prepared.base_dir, session.grader.score_many
        rewards = RewardScorer(stage.reward_entries, grade=grade, base=base, folder=folder / "rewards")
        score = stack.enter_context(rewards).score
        source = _rollout_source(session, stage, engine, scorer, score)
        steps = stage.steps
    else:
        assert isinstance(stage, SftSettings | RejectionSettings)
        if isinstance(stage, RejectionSettings):
            sampled, cost = rejection_samples(session, stage, policy, folder, path)
            kept, ledger = [sampled], ledger + cost
        else:
            kept = [prepared.demonstrations[name] for name in stage.data_names]
        nums = [len(of_set) for of_set in kept]
        source = DemonstrationSource(
            _order(stage, kept), sequences_per_step=stage.sequences_per_step, num_sequences=num_sequences(stage, nums),
            seed=prepared.settings.seed, ranks=ranks, updates_per_step=method.updates_per_step,
        )  # fmt: skip
        steps = num_steps(stage, nums)
    o, updates = stage.optimizer, source.updates_per_step
    rate = learning_rate(
        peak=o.lr, kind=o.schedule, total_steps=steps * updates, warmup_fraction=o.warmup_fraction,
        min_ratio=o.min_lr_ratio, decay_fraction=o.decay_fraction,
    )  # fmt: skip
    gaps = GapTest(getattr(torch, prepared.settings.compute.dtype)) if engine is not None else None
    updater = Updater(
        policy=policy, scorer=scorer, method=method, 
        optimizers=optimizers_of(policy, stage, method, offload=prepared.settings.compute.offload == "optimizer"),
        learning_rate=rate, updates_per_step=updates, faults=stage.faults,
        max_length=sampling.max_new_tokens if sampling else prepared.context_length,
        observe=Comparison(source, gaps) if isinstance(source, RolloutSource) and source.is_ahead else gaps,
    )  # fmt: skip
    return StageSpec(
        name=stage.name, folder=folder, settings=stage, identity=stage_identity(prepared, index),
        earlier=earlier_identities(prepared, index),
        policy=policy, source=source, updater=updater, num_steps=steps, engine=engine, gaps=gaps,
        ranks=ranks,
        dev_score=dev_score(session, index, policy, engine, folder, path),
        validation_loss=_validation_loss(session, stage, policy), ledger=ledger,
        on_step=_on_step(session, stage, steps_before, folder, watch_of(session, index, policy, folder, steps)),
        warn=session.reporter.say, stop_reason=partial(strict_reason, session),
    )  # fmt: skip


def _reference(session: Session, stage: StageSettings, policy: Policy, path: str) -> Policy:
    """Return the policy that the stage starts from. If only adapters are trained, it has the same weights."""
    if stage.lora.rank and not stage.lora.train_also:
        return policy
    return make_policy(session, path)


def _validation_loss(session: Session, stage: StageSettings, policy: Policy) -> ValidationLoss | None:
    if not stage.validation.data:
        return None
    return ValidationLoss(
        policy=policy, demonstrations=session.prepared.demonstrations[stage.validation.data],
        tokens_per_microbatch=stage.tokens_per_microbatch, ranks=session.ranks,
    )  # fmt: skip


def optimizers_of(
    policy: Policy, stage: StageSettings, method: Method, *, offload: bool = False
) -> dict[str, MasterOptimizer]:
    """Return the stage's optimizer, and a second one for a method with a buffer."""
    main = MasterOptimizer(policy, stage.optimizer, offload=offload)
    buffer = method.part(DemonstrationBuffer)
    if buffer is None:
        return {"optimizer": main}
    own = stage.optimizer.model_copy(update={"lr": buffer.lr, "max_grad_norm": buffer.max_grad_norm})
    return {"optimizer": main, "buffer-optimizer": MasterOptimizer(policy, own, beside=main)}


See = Callable[[int, Mapping[str, float]], None]


def watch_of(session: Session, index: int, policy: Policy, folder: Path, num_steps: int) -> See:
    """Return a function that sees the metrics of each step, and says when the stage is worthless. A resumed
    stage is judged with the steps before."""
    stage = session.prepared.settings.stages[index]
    method = session.prepared.methods[stage.name]
    text = policy.model.config.get_text_config()
    watch = Watch(
        stage=stage.name, kind=stage.kind, num_steps=num_steps, vocabulary=text.vocab_size,
        is_own=not method.needs_demonstrations and method.part(Replay) is None,
        is_steady=method.plan is None or method.plan.most_shown == 0,
    )  # fmt: skip

    def see(step: int, metrics: Mapping[str, float]) -> None:
        if session.ranks.rank != 0:
            return
        logged = read_jsonl(folder / "metrics.jsonl") if step > 1 and not watch.num_seen else []
        for row in logged:
            if row["step"] < step:
                own = {key.removeprefix(f"{stage.name}/"): value for key, value in row.items()}
                session.warned.extend(watch.see(row["step"], own))
        new = watch.see(step, metrics)
        session.warned.extend(new)
        for warning in new:
            session.reporter.say(f"warning: {stage.name}, step {step}: {warning['text']}")

    return see


def strict_reason(session: Session) -> str:
    """Return why a strict run must stop, the same on all ranks, or "" (a collective if the run is strict)."""
    if not session.is_strict:
        return ""
    said = "; ".join(f"{w['stage']}: {w['text']}" for w in session.warned if "until" not in w)
    told = str(session.ranks.exchange(said)[0])
    return told and f"{told} (stopped by --strict; --resume without --strict continues)"


def _on_step(
    session: Session, stage: StageSettings, before: int, folder: Path, see: See
) -> Callable[[int, Mapping[str, float], float], None]:
    """Return a function that reports progress and logs to trackers, with steps counted over the whole run."""
    caught_up = False

    def on_step(step: int, metrics: Mapping[str, float], seconds: float) -> None:
        session.reporter.advance(step, shown.row(stage.kind, stage.watched_data, metrics, seconds))
        see(step, metrics)
        row = {f"{stage.name}/{key}": value for key, value in metrics.items()}
        row |= {f"{stage.name}/seconds": seconds}
        nonlocal caught_up
        if not caught_up:  # the stage was resumed
            session.trackers.catch_up(stage.name, before, folder, below=step)
            caught_up = True
        session.trackers.log(before + step, row)

    return on_step


def _order(stage: StageSettings, sets: Sequence[Sequence[Any]]) -> Order[Any]:
    """Return the order of a stage's rows. Of several data sets, every row has the name of its set."""
    if len(sets) > 1:
        sets = [
            [replace(row, data=name) for row in of] for name, of in zip(stage.data_names, sets, strict=True)
        ]
    return Order(sets, tuple(share.weight for share in stage.shares), stage.data_names)


def _rollout_source(
    session: Session, stage: RlSettings, engine: Engine, scorer: Scorer, score: Callable[..., list[Score]]
) -> RolloutSource:
    prepared = session.prepared
    method = prepared.methods[stage.name]
    assert method.plan is not None  # checked when the run was prepared
    prompts = prepared.stage_prompts[stage.name]
    named = [
        (f"{name}/{d.problem_id}" if len(prompts) > 1 else d.problem_id, d.token_ids[d.num_prompt_tokens :])
        for name in (stage.guided if method.needs_demonstrations else ())
        for d in prepared.demonstrations[name]
    ]
    sampler = Sampler(
        engine=engine, plan=method.plan, sampling=sampling_parameters(stage.sampling, prepared.stop_ids),
        samples_per_prompt=stage.samples_per_prompt, decode=session.decode, score=score,
        seed=prepared.settings.seed, solved_at=stage.solved_at, check_stop=session.check_stop,
        demonstrations=dict(named), unguided=frozenset(stage.data_names) - {*stage.guided},
        hinted=partial(hinted_prompt, prepared),
    )  # fmt: skip
    return RolloutSource(
        _order(stage, prompts), sampler=sampler, scorer=scorer, method=method,
        prompts_per_step=stage.prompts_per_step, updates_per_step=stage.updates_per_rollout,
        decode_prompt=session.decode_prompt, is_ahead=stage.rollout_ahead == 1,
    )  # fmt: skip
