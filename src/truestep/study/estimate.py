"""Estimates the cells, FLOPs, memory and time of a study before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.flops import Ledger, ModelShape, group_work, sequence_work
from truestep.pipeline.paper_plan import GIB, STATE_BYTES, only_set, rl_work, shape_of
from truestep.settings import RejectionSettings, RlSettings, Settings, SftSettings, StageSettings
from truestep.study.plan import Study, cell_settings, stage_tables

PROCESS_GIB = 0.7  # an interpreter with torch and transformers, but no model
START_SECONDS = 3.0  # start of a forked child: data, tokenizer, evaluation set-up
TINY_VOCABULARY = 101
Lengths = dict[str, tuple[int, int]]  # data set → mean tokens of prompt and worked solution


def estimate(study: Study, base_dir: Path) -> dict[str, Any]:
    """Return one row per arm, and totals. A rollout is assumed to be as long as a demonstration, or as the
    length limit without demonstrations. What a method adds (demonstrations, more rounds) is not counted."""
    lengths: Lengths = {}
    rows: list[dict[str, Any]] = []
    for arm in study.arms:
        settings = cell_settings(study, arm.name, 0, stage_tables(study, arm), study.name)
        work = [_stage(settings, stage, base_dir, lengths) for stage in settings.stages]
        per_seed, shape = sum(work, Ledger()), _shape(settings)
        tuning = study.tuning_of(arm)
        trials = len(tuning.factors) * len(tuning.seeds) if tuning else 0
        own = work[-1].full_flops(shape) if work else 0.0
        seeds = len(study.seeds_of(arm))
        new_cells = seeds + trials
        scoring = _evaluation_seconds(study, settings, base_dir, lengths) * new_cells
        seconds = new_cells * (own / study.flops_per_second + START_SECONDS) + scoring
        goal = arm.equal_flops
        shares = [study.resources.of(name) for name in ("", *arm.stages)]
        ranks, gpus = max(share.ranks for share in shares), max(share.gpus for share in shares)
        rows.append({
            "arm": arm.name, "cells": seeds, "trials": trials, "stages": list(arm.stages),
            "flops_paper": per_seed.paper_flops(shape), "flops_full": per_seed.full_flops(shape),
            "flops_own_stage": own, "gib": round(ranks * _gib(settings), 2), "ranks": ranks, "gpus": gpus,
            "cpu_seconds": round(seconds),
            "cpu_seconds_per_cell": round(seconds / new_cells),
            "matched": f"steps of {arm.stages[-1]} set to match {goal.to}" if goal else "",
        })  # fmt: skip
    total = sum(row["cpu_seconds"] for row in rows)
    return {
        "name": study.name, "question": study.question, "seeds": list(study.seeds), "arms": rows,
        "cells": sum(r["cells"] for r in rows), "trials": sum(r["trials"] for r in rows),
        "flops_full": sum((r["cells"] + r["trials"]) * r["flops_own_stage"] for r in rows),
        "cpu_hours": round(total / 3600, 2), "hours": round(total / 3600 / study.workers, 2),
        "gib": round(study.workers * max(r["gib"] for r in rows), 2),
        "controls_off": dict(study.controls_off),
    }  # fmt: skip


def _lengths(settings: Settings, name: str, base_dir: Path, known: Lengths) -> tuple[int, int]:
    """Return the mean number of tokens of a prompt and of a solution (0: none). A token is assumed to have 1
    character for the built-in model, and otherwise 4."""
    if name not in known:
        data, seed = settings.data[name], settings.seed
        problems = load_problems(name, data, seed=seed, base_dir=base_dir, needs=("answer",))
        unit = 1.0 if settings.model.path in ("tiny", "./base/model") else 0.25
        frame = len(settings.chat.system) + len(settings.chat.user) - 9
        prompt = sum(frame + len(p.messages[-1].content) for p in problems) / len(problems)
        solution = sum(len(p.solution) for p in problems) / len(problems)
        known[name] = round(unit * prompt) + 3, (round(unit * solution) + 1 if solution else 0)
    return known[name]


def _stage(settings: Settings, stage: StageSettings, base_dir: Path, known: Lengths) -> Ledger:
    prompt, solution = _lengths(settings, only_set(stage), base_dir, known)
    if isinstance(stage, RlSettings):
        return rl_work(stage, prompt, [solution or stage.sampling.max_new_tokens] * stage.samples_per_prompt)
    assert isinstance(stage, SftSettings | RejectionSettings)
    rows = settings.data[only_set(stage)].limit
    if stage.epochs and rows == "all":
        raise UserError(f"data.{only_set(stage)}.limit: an estimate needs a number of rows; set limit = N")
    count = stage.epochs * int(rows) if stage.epochs else stage.steps * stage.sequences_per_step
    return sequence_work(prompt, solution or 64).times(count)


def _evaluation_seconds(study: Study, settings: Settings, base_dir: Path, known: Lengths) -> float:
    shape, work = _shape(settings), Ledger()
    for name in settings.evaluate.data:
        prompt, solution = _lengths(settings, name, base_dir, known)
        length = solution or settings.evaluate.data_sampling.max_new_tokens
        rows = settings.data[name].limit
        num = (int(rows) if rows != "all" else 500) * settings.evaluate.data_samples
        group = group_work(prompt, [length], scored=False)
        passes, pairs = group.generated_pass_tokens, group.generated_pairs
        work += Ledger(generated_pass_tokens=passes, generated_pairs=pairs).times(num)
    return work.full_flops(shape) / study.flops_per_second


def _shape(settings: Settings) -> ModelShape:
    """Return the shape of the built-in model (and of a pinned base), as set by the study's ``model.tiny``."""
    tiny = settings.model.tiny
    return shape_of({
        "model_type": "llama", "hidden_size": tiny.hidden_size, "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.num_layers, "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_heads, "vocab_size": TINY_VOCABULARY, "tie_word_embeddings": True,
    })  # fmt: skip


def _gib(settings: Settings) -> float:
    tiny, state = settings.model.tiny, _shape(settings).num_parameters * STATE_BYTES
    per_token = 4 * tiny.num_layers * (8 * tiny.hidden_size + 3 * tiny.intermediate_size)
    tokens = max((stage.tokens_per_microbatch for stage in settings.stages), default=0)
    return PROCESS_GIB + (state + tokens * per_token) / GIB
