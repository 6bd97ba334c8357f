"""One stage: a model folder in, a model folder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from truestep import rundir, signals
from truestep.data.chat import completion_text
from truestep.device import compute_device, matmul_rate
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.grade.score import Grader
from truestep.model.forward import decoder_layers
from truestep.model.load import LoadedModel, load_model
from truestep.objective.schedule import Schedule, learning_rate
from truestep.pipeline.coin import CoinGrader, CoinSource
from truestep.pipeline.evaluation import dev_score, evaluate_checkpoint, sampling_parameters
from truestep.pipeline.prepare import Prepared, hinted_prompt, num_sequences, num_steps, stage_identity
from truestep.pipeline.track import Log
from truestep.progress import Reporter
from truestep.records import Demonstration, Prompt, Role, Stop, Verdict
from truestep.rollout.engine import SampleRequest
from truestep.rollout.engine_torch import TorchEngine
from truestep.rollout.sample import Sampler
from truestep.seeding import Purpose
from truestep.settings import RejectionSettings, RlSettings, SftSettings, StageSettings
from truestep.train.loop import StageRun
from truestep.train.parallel import Ranks, replicate, shard
from truestep.train.policy import Policy
from truestep.train.source import DemonstrationSource, RolloutSource, Source


@dataclass(kw_only=True)
class Session:
    """What all stages of a run share."""

    prepared: Prepared
    folder: Path
    grader: Grader
    ranks: Ranks
    reporter: Reporter
    trackers: Sequence[Log] = ()
    steps_before: int = 0  # of earlier stages: trackers count through the whole run

    def decode(self, ids: Sequence[int]) -> str:
        return completion_text(self.prepared.tokenizer, ids)

    def decode_prompt(self, prompt: Prompt) -> str:
        return str(self.prepared.tokenizer.decode(list(prompt.token_ids)))


def open_model(session: Session, path: str) -> LoadedModel:
    """The model of a folder (or the base model) in the run's dtype."""
    settings = session.prepared.settings
    model = (
        settings.model if path == settings.model.path else settings.model.model_copy(update={"path": path})
    )
    return load_model(
        model, dtype=getattr(torch, settings.compute.dtype), device=compute_device(), seed=settings.seed
    )


def make_policy(session: Session, path: str) -> Policy:
    compute = session.prepared.settings.compute
    policy = Policy(
        open_model(session, path),
        gradient_checkpointing=compute.gradient_checkpointing,
        compile=compute.compile,
    )
    for note in [*policy.notes, *_slow_dtype(compute.dtype)]:
        session.reporter.say(note)
    if session.ranks.world_size > 1:
        replicate(policy, session.ranks)
        if compute.parallel == "fsdp2":
            shard(policy, decoder_layers(policy.model), next(policy.parameters()).dtype)
    return policy


def _slow_dtype(name: str) -> list[str]:
    """A line of advice where the processor has no fast path for the compute dtype (bfloat16 without AMX or
    AVX-512)."""
    if name != "bfloat16":
        return []
    rate, plain = matmul_rate(torch.bfloat16), matmul_rate(torch.float32)
    if rate > plain:
        return []
    return [
        f"bfloat16 runs {plain / rate:.0f} times slower than float32 on this processor ({rate / 1e9:.1f} against "
        f'{plain / 1e9:.1f} GFLOP/s): compute.dtype = "float32" will be faster'
    ]


def make_engine(session: Session, policy: Policy, path: str, max_running: int) -> TorchEngine:
    """An engine over the policy's own module; over a second, whole model where the policy is sharded."""
    if session.ranks.world_size > 1 and session.prepared.settings.compute.parallel == "fsdp2":
        whole = Policy(open_model(session, path))
        return TorchEngine(whole.model, max_running=max_running, packs=whole.packs and whole.plain_head)
    return TorchEngine(policy.model, max_running=max_running, packs=policy.packs and policy.plain_head)


def make_stage(session: Session, index: int, path: str, ledger: Ledger) -> StageRun:
    """Assemble stage ``index``, which starts from the model in ``path``."""
    prepared = session.prepared
    stage = prepared.settings.stages[index]
    folder = stage_folder(session.folder, index, stage)
    policy = make_policy(session, path)
    engine: TorchEngine | None = None
    if isinstance(stage, RlSettings):
        engine = make_engine(session, policy, path, stage.sampling.max_running)
        source: Source = _rollout_source(session, stage, engine)
        steps = stage.steps
    elif isinstance(stage, RejectionSettings):
        kept, cost = _rejection_samples(session, stage, policy, folder, path)
        ledger = ledger + cost
        source, steps = _demonstrations(session, stage, kept)
    elif isinstance(stage, SftSettings):
        source, steps = _demonstrations(session, stage, prepared.demonstrations[stage.data].kept)
    else:
        raise TypeError(f"unknown stage {type(stage).__name__}")
    sampling = getattr(stage, "sampling", None)
    return StageRun(
        name=stage.name,
        folder=folder,
        settings=stage,
        identity=stage_identity(prepared, index),
        policy=policy,
        method=prepared.methods[stage.name],
        source=source,
        num_steps=steps,
        learning_rate=_schedule(stage, steps * source.updates_per_step),
        temperature=sampling.temperature if isinstance(stage, RlSettings) and sampling else 1.0,
        max_length=sampling.max_new_tokens if sampling else prepared.context_length,
        engine=engine,
        reference=make_policy(session, path).requires_grad_(False)
        if prepared.methods[stage.name].needs_reference
        else None,
        dev_score=_dev_score(session, index, policy, engine, folder),
        ranks=session.ranks,
        ledger=ledger,
        on_step=_on_step(session, stage.name),
        warn=session.reporter.say,
    )


def _on_step(session: Session, name: str) -> Callable[[int, Mapping[str, float], float], None]:
    before = session.steps_before

    def on_step(step: int, metrics: Mapping[str, float], seconds: float) -> None:
        session.reporter.advance(step, step_note(metrics))
        for log in session.trackers:
            log(
                before + step,
                {f"{name}/{key}": value for key, value in metrics.items()} | {f"{name}/seconds": seconds},
            )

    return on_step


def stage_folder(run: Path, index: int, stage: StageSettings) -> Path:
    return run / "stages" / f"{index + 1:02d}-{stage.name}"


def step_note(metrics: Mapping[str, float]) -> str:
    """The few figures worth a look while it runs."""
    shown = [
        ("reward", "reward"),
        ("loss", "loss"),
        ("mixed_groups", "mixed"),
        ("dev/score", "dev"),
        ("entropy", "entropy"),
    ]
    return "  ".join(f"{label} {metrics[key]:.3f}" for key, label in shown if key in metrics)


def _schedule(stage: StageSettings, total_updates: int) -> Schedule:
    o = stage.optimizer
    return learning_rate(
        peak=o.lr,
        kind=o.schedule,
        total_steps=total_updates,
        warmup_fraction=o.warmup_fraction,
        min_ratio=o.min_lr_ratio,
    )


def _demonstrations(
    session: Session, stage: SftSettings | RejectionSettings, kept: Sequence[Demonstration]
) -> tuple[Source, int]:
    source = DemonstrationSource(
        kept,
        sequences_per_step=stage.sequences_per_step,
        num_sequences=num_sequences(stage, len(kept)),
        seed=session.prepared.settings.seed,
        ranks=session.ranks,
        updates_per_step=session.prepared.methods[stage.name].updates_per_step,
    )
    return source, num_steps(stage, len(kept))


def _rollout_source(session: Session, stage: RlSettings, engine: TorchEngine) -> Source:
    prepared = session.prepared
    method = prepared.methods[stage.name]
    assert method.plan is not None  # checked when the run was prepared
    traces = prepared.demonstrations[stage.data].kept if method.needs_demonstrations else ()
    coin = CoinGrader(seed=prepared.settings.seed) if stage.reward == "random" else None
    sampler = Sampler(
        engine=engine,
        plan=method.plan,
        sampling=sampling_parameters(stage.sampling, prepared.stop_ids),
        samples_per_prompt=stage.samples_per_prompt,
        decode=session.decode,
        grade=coin or session.grader.score_many,
        seed=prepared.settings.seed,
        check_stop=signals.check if session.ranks.world_size == 1 else lambda: None,
        demonstrations={d.problem_id: d.token_ids[d.num_prompt_tokens :] for d in traces},
        hinted=lambda prompt, fraction: hinted_prompt(prepared, prompt, fraction),
    )
    source: Source = RolloutSource(
        prepared.stage_prompts[stage.name],
        sampler=sampler,
        method=method,
        prompts_per_step=stage.prompts_per_step,
        updates_per_step=stage.updates_per_rollout,
        ranks=session.ranks,
        decode_prompt=session.decode_prompt,
    )
    return source if coin is None else CoinSource(inner=source, coin=coin)


def _rejection_samples(
    session: Session, stage: RejectionSettings, policy: Policy, folder: Path, path: str
) -> tuple[list[Demonstration], Ledger]:
    """Sample from the stage's start, keep up to ``keep_per_prompt`` distinct accepted completions a
    prompt."""
    prepared = session.prepared
    engine = make_engine(session, policy, path, stage.sampling.max_running)
    prompts = {p.problem.id: p for p in prepared.prompts[stage.data]}
    requests = [
        SampleRequest(
            problem_id=p.problem.id,
            sample_index=i,
            prompt_ids=p.token_ids,
            seed=prepared.settings.seed,
            purpose=Purpose.SAMPLE,
            step=0,
        )
        for p in prompts.values()
        for i in range(stage.samples_per_prompt)
    ]
    session.reporter.begin(f"{stage.name}: sampling", len(requests))
    rollouts = []
    for done, rollout in enumerate(
        engine.generate(requests, sampling_parameters(stage.sampling, prepared.stop_ids), signals.check),
        start=1,
    ):
        rollouts.append(rollout)
        session.reporter.advance(done)
    rollouts.sort(key=lambda r: (r.problem_id, r.sample_index))
    scores = session.grader.score_many(
        [(prompts[r.problem_id].problem, session.decode(r.completion_ids)) for r in rollouts]
    )
    chosen: dict[str, dict[tuple[int, ...], None]] = {}
    for rollout, score in zip(rollouts, scores, strict=True):
        accepted = chosen.setdefault(rollout.problem_id, {})
        if (
            score.verdict is Verdict.CORRECT
            and rollout.stop is Stop.STOP_TOKEN
            and len(accepted) < stage.keep_per_prompt
        ):
            accepted[rollout.completion_ids] = None
    kept = [_as_demonstration(prompts[id_], ids) for id_, accepted in chosen.items() for ids in accepted]
    rundir.write_json(
        folder / "rejection.json",
        {
            "samples": len(rollouts),
            "kept": len(kept),
            "problems": len(prompts),
            "problems_with_any": sum(bool(a) for a in chosen.values()),
        },
    )
    if len(kept) < stage.sequences_per_step:
        raise UserError(
            f"stages.{stage.name}: only {len(kept)} of {len(rollouts)} samples were accepted, fewer than "
            f"sequences_per_step = {stage.sequences_per_step}: sample more, or start from a better model"
        )
    cost = engine.take_cost()
    return kept, Ledger(
        rollout_tokens=sum(len(r.completion_ids) for r in rollouts),
        prompt_tokens=cost.prefill_tokens,
        generated_pass_tokens=cost.prefill_tokens + cost.decode_tokens,
        generated_pairs=cost.pairs,
    )


def _as_demonstration(prompt: Prompt, completion: tuple[int, ...]) -> Demonstration:
    num, own = len(prompt.token_ids), len(completion)
    return Demonstration(
        problem_id=prompt.problem.id,
        token_ids=prompt.token_ids + completion,
        roles=(Role.USER,) * num + (Role.ASSISTANT,) * own,
        trained=(False,) * num + (True,) * own,
        num_prompt_tokens=num,
    )


def _dev_score(
    session: Session, index: int, policy: Policy, engine: TorchEngine | None, folder: Path
) -> Callable[[int], float] | None:
    prepared = session.prepared
    if not prepared.settings.stages[index].dev.data:
        return None
    shared = engine or make_engine(session, policy, "", prepared.settings.evaluate.data_sampling.max_running)
    return dev_score(prepared, index, engine=shared, grader=session.grader, folder=folder)


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
