"""truestep's side: the stage loop of an ordinary run (``run_stage``), its engine, and the machine's matmul
rate.

All work of a run is timed: take data, pack, step, publish and check the weights, compute metrics. Only
evaluation and checkpoints, which are not part of a step, are left out.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import StepClock, generation_figures, report, specification, text_parity

from truestep.device import compute_device, keep_free_memory, make_deterministic, matmul_rate, set_threads
from truestep.model.load import load_model
from truestep.objective.methods import Method, build
from truestep.objective.schedule import constant
from truestep.records import (
    Message,
    Origin,
    Problem,
    Prompt,
    RewardInput,
    Score,
    TrainSequence,
    Verdict,
    judged,
)
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.rollout.sample import Sampler
from truestep.seeding import Purpose
from truestep.settings import (
    ModelSettings,
    OptimizerSettings,
    RlSettings,
    SamplingSettings,
    SftSettings,
    StageSettings,
)
from truestep.train.loop import StageSpec, run_stage
from truestep.train.memory import Memory
from truestep.train.optim import MasterOptimizer
from truestep.train.order import Order
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.source import DemonstrationSource, RolloutSource, StepData
from truestep.train.update import Updater

FAR = 1_000_000  # a step that is never reached: the last step of a stage saves a checkpoint
LR = 1e-5


class _Enough(Exception):
    """Raised when all steps are measured, to leave the stage without its final checkpoint."""


class _Rows:
    """The shared rows in their given order, so that the peers train on the same rows."""

    updates_per_step = 1

    def __init__(self, rows: Sequence[dict[str, Any]], size: int, clock: StepClock) -> None:
        self.rows, self.size, self.clock = rows, size, clock

    def take(self, step: int, memory: Memory) -> StepData:
        rows = self.rows[step * self.size : (step + 1) * self.size]
        self.clock.count(sum(len(r["ids"]) for r in rows))
        sequences = [
            TrainSequence(
                token_ids=tuple(r["ids"]),
                origin=tuple(
                    Origin.EXPERT if i >= r["num_prompt"] else Origin.CONTEXT for i in range(len(r["ids"]))
                ),
                num_prefix_tokens=0,
                group=i,
            )
            for i, r in enumerate(rows)
        ]
        return StepData(minibatches=[sequences], memory=memory)

    def drop(self) -> None:
        """Nothing runs beside the training."""


def make_policy(spec: dict[str, Any]) -> Policy:
    settings, dtype = ModelSettings(path=spec["model"]), getattr(torch, spec["dtype"])
    loaded = load_model(settings, dtype=dtype, device=compute_device(), seed=0)
    return Policy(loaded, gradient_checkpointing=spec.get("recompute", False), compile=spec["compile"])


def stage_spec(
    stage: StageSettings,
    folder: Path,
    scorer: Scorer,
    method: Method,
    source: DemonstrationSource | RolloutSource,
    max_length: int,
    engine: Engine | None = None,
) -> StageSpec:
    updater = Updater(
        policy=scorer.policy,
        scorer=scorer,
        method=method,
        optimizers={"optimizer": MasterOptimizer(scorer.policy, stage.optimizer)},
        learning_rate=constant(LR),
        updates_per_step=source.updates_per_step,
        max_length=max_length,
    )
    return StageSpec(
        name=stage.kind,
        folder=folder,
        settings=stage,
        identity="bench",
        policy=scorer.policy,
        source=source,
        updater=updater,
        num_steps=FAR,
        engine=engine,
    )


def measure(run: StageSpec, clock: StepClock, steps: int) -> None:
    """Run ``steps`` steps of the stage; the clock starts at the first."""

    def on_step(done: int, metrics: object, seconds: float) -> None:
        if clock.end_step() == steps:
            raise _Enough

    clock.restart()
    with contextlib.suppress(_Enough):
        run_stage(replace(run, on_step=on_step))


def sft(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    policy = make_policy(spec)
    clock = StepClock()
    stage = SftSettings(
        kind="sft",
        data="rows",
        tokens_per_microbatch=spec["tokens_per_microbatch"],
        optimizer=OptimizerSettings(lr=LR),
        save_every=FAR,
        sequences_per_step=spec["sequences_per_step"],
        steps=FAR,
    )
    source = _Rows(spec["rows"], spec["sequences_per_step"], clock)
    scorer = Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=stage.tokens_per_microbatch)
    run = stage_spec(stage, folder, scorer, build("sft", {}), source, policy.context_length)
    measure(run, clock, spec["warmup"] + spec["steps"])
    trained = sum(len(r["ids"]) - r["num_prompt"] for r in spec["rows"]) / sum(
        len(r["ids"]) for r in spec["rows"]
    )
    head = policy.model.get_output_embeddings().weight.numel()
    return {
        **clock.figures(spec["warmup"]),
        "num_parameters": policy.shape.num_parameters,
        "num_head_parameters": head,
        "trained_share": trained,
    }


def grade(samples: Sequence[RewardInput]) -> list[Score]:
    return [judged(Verdict.CORRECT if text_parity(s.completion) else Verdict.INCORRECT) for s in samples]


def rl(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    policy = make_policy(spec)
    clock = StepClock()
    engine = TorchEngine(policy.model, max_running=64, packs=policy.packs and policy.plain_head)
    method = build("grpo_token_mean", {})
    limit, prompts, samples = spec["max_new_tokens"], spec["prompts_per_step"], spec["samples_per_prompt"]
    stage = RlSettings(
        kind="rl",
        data="rows",
        tokens_per_microbatch=spec["tokens_per_microbatch"],
        optimizer=OptimizerSettings(lr=LR),
        save_every=FAR,
        steps=FAR,
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        updates_per_rollout=1,
        sampling=SamplingSettings(max_new_tokens=limit),
    )
    sampler = Sampler(
        engine=engine,
        plan=method.plan,
        sampling=SamplingParameters(
            temperature=1.0, max_new_tokens=limit, stop_token_ids=()
        ),  # always sample to the limit
        samples_per_prompt=samples,
        decode=lambda ids: str(policy.tokenizer.decode(list(ids), skip_special_tokens=True)),
        score=grade,
        seed=spec["seed"],
    )
    scorer = Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=stage.tokens_per_microbatch)
    source = RolloutSource(
        Order([[Prompt(problem=_problem(p["id"]), token_ids=tuple(p["ids"])) for p in spec["prompts"]]]),
        sampler=sampler,
        scorer=scorer,
        method=method,
        prompts_per_step=prompts,
        updates_per_step=1,
        decode_prompt=lambda prompt: str(policy.tokenizer.decode(list(prompt.token_ids))),
    )
    run = stage_spec(stage, folder, scorer, method, source, limit, engine)
    measure(run, clock, spec["warmup"] + spec["steps"])
    clock.tokens = [prompts * samples * limit] * len(clock.tokens)
    return clock.figures(spec["warmup"])


def _problem(name: str) -> Problem:
    return Problem(id=name, messages=(Message(role="user", content="-"),), answer="-")


def rollout(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    del folder
    policy = make_policy(spec)
    stops = tuple(spec["stop_token_ids"])
    engine = TorchEngine(
        policy.model, max_running=len(spec["prompts"]), packs=policy.packs and policy.plain_head
    )

    def generate(limit: int) -> dict[str, Any]:
        requests = [
            SampleRequest(
                problem_id=p["id"],
                sample_index=0,
                prompt_ids=tuple(p["ids"]),
                seed=spec["seed"],
                purpose=Purpose.SAMPLE,
                step=0,
            )
            for p in spec["prompts"]
        ]
        sampling = SamplingParameters(temperature=1.0, max_new_tokens=limit, stop_token_ids=stops)
        began = time.perf_counter()
        lengths = [len(r.completion_ids) for r in engine.generate(requests, sampling)]
        return generation_figures(lengths, time.perf_counter() - began)

    generate(spec["warmup_tokens"])
    return generate(spec["max_new_tokens"])


def rate(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    del folder
    size = spec["matmul_size"]
    return {
        "flops_per_second": matmul_rate(getattr(torch, spec["dtype"]), size=size, seconds=spec["seconds"])
    }


def main() -> None:
    spec = specification()
    set_threads(spec["threads"])
    make_deterministic()  # as in a run
    keep_free_memory()
    with tempfile.TemporaryDirectory() as folder:
        figures = {"sft": sft, "rl": rl, "rollout": rollout, "rate": rate}[spec["what"]](spec, Path(folder))
    report(figures, "truestep", "torch", "transformers")


if __name__ == "__main__":
    main()
