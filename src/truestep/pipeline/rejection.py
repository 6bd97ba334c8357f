"""Rejection-sampling SFT, in which accepted samples of the initial model become demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truestep import rundir
from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.pipeline.evaluation import sampling_parameters
from truestep.pipeline.models import Session, make_engine
from truestep.records import Demonstration, Prompt, Stop, Verdict
from truestep.rollout.engine import Engine, SampleRequest
from truestep.seeding import Purpose
from truestep.settings import RejectionSettings
from truestep.train.policy import Policy


def rejection_samples(
    session: Session, stage: RejectionSettings, policy: Policy, folder: Path, path: str
) -> tuple[list[Demonstration], Ledger]:
    """Sample from the initial model; keep up to ``keep_per_prompt`` different accepted samples per prompt.
    Each rank samples for its share of the prompts. All return what all ranks kept, and their own work."""
    prepared, ranks = session.prepared, session.ranks
    engine = make_engine(session, policy, path, stage.sampling.max_running)
    prompts = {p.problem.id: p for of_set in prepared.stage_prompts[stage.name] for p in of_set}
    with ranks.apart():
        accepted, lengths = _accepted(session, stage, engine, ranks.mine(list(prompts.values())))
    shares = ranks.exchange([[name, list(kept)] for name, kept in accepted.items()])
    found = sorted((name, kept) for share in shares for name, kept in share)
    kept = [_as_demonstration(prompts[name], tuple(ids)) for name, several in found for ids in several]
    num_samples = sum(ranks.exchange(len(lengths)))
    if ranks.rank == 0:
        counts = {"samples": num_samples, "kept": len(kept), "problems": len(prompts)}
        counts["problems_with_any"] = sum(bool(several) for _, several in found)
        rundir.write_json(folder / "rejection.json", counts)
    if len(kept) < stage.sequences_per_step:
        raise UserError(
            f"stages.{stage.name}: only {len(kept)} of {num_samples} samples were kept, fewer than "
            f"sequences_per_step = {stage.sequences_per_step}; increase samples_per_prompt, or start from a better model"
        )
    return kept, engine.take_cost() + Ledger(rollout_tokens=sum(lengths))


def _accepted(
    session: Session, stage: RejectionSettings, engine: Engine, prompts: Sequence[Prompt]
) -> tuple[dict[str, dict[tuple[int, ...], None]], list[int]]:
    """Sample and grade. Return the different accepted completions of each prompt, in the order of their
    numbers, and the lengths of all samples."""
    problems = {p.problem.id: p.problem for p in prompts}
    shared: dict[str, Any] = {"seed": session.prepared.settings.seed, "purpose": Purpose.SAMPLE, "step": 0}
    requests = [
        SampleRequest(problem_id=prompt.problem.id, sample_index=i, prompt_ids=prompt.token_ids, **shared)
        for prompt in prompts
        for i in range(stage.samples_per_prompt)
    ]
    session.reporter.begin(f"{stage.name}: sampling", len(requests))
    rollouts, sampling = [], sampling_parameters(stage.sampling, session.prepared.stop_ids)
    for rollout in engine.generate(requests, sampling, session.check_stop):
        rollouts.append(rollout)
        session.reporter.advance(len(rollouts))
    rollouts.sort(key=lambda r: (r.problem_id, r.sample_index))
    completions = [(problems[r.problem_id], session.decode(r.completion_ids)) for r in rollouts]
    scores = session.grader.score_many(completions)
    chosen: dict[str, dict[tuple[int, ...], None]] = {}
    for rollout, score in zip(rollouts, scores, strict=True):
        accepted = chosen.setdefault(rollout.problem_id, {})
        is_right = score.verdict is Verdict.CORRECT and rollout.stop is Stop.STOP_TOKEN
        if is_right and len(accepted) < stage.keep_per_prompt:
            accepted[rollout.completion_ids] = None
    return chosen, [len(r.completion_ids) for r in rollouts]


def _as_demonstration(prompt: Prompt, completion: tuple[int, ...]) -> Demonstration:
    tokens, num = prompt.token_ids + completion, len(prompt.token_ids)
    return Demonstration(problem_id=prompt.problem.id, token_ids=tokens, num_prompt_tokens=num)
