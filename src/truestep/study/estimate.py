"""What a study would take, before it is run: cells, FLOPs, memory, time. An estimate, and said to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.flops import Ledger, ModelShape, group_work, sequence_work
from truestep.pipeline.paper_plan import GIB, STATE_BYTES, shape_of
from truestep.settings import RejectionSettings, RlSettings, Settings, SftSettings
from truestep.study.plan import Arm, Study, cell_settings, stage_tables

PROCESS_GIB = 0.7  # an interpreter with torch and transformers, and nothing loaded
START_SECONDS = 3.0  # of a forked child: data, tokenizer, evaluation set-up
TINY_VOCABULARY = 101


def estimate(study: Study, base_dir: Path) -> dict[str, Any]:
    """Rows by arm and their sum. Own samples are taken to be as long as a demonstration if there are some,
    else as long as allowed; what a method adds of its own (demonstrations in groups, further rounds) is not
    counted."""
    lengths: dict[str, tuple[int, int]] = {}
    rows: list[dict[str, Any]] = []
    for arm in study.arms:
        settings = cell_settings(study, arm.name, 0, stage_tables(study, arm), study.name)
        per_seed = sum(
            (_stage(settings, i, base_dir, lengths) for i in range(len(settings.stages))), Ledger()
        )
        last = _stage(settings, len(settings.stages) - 1, base_dir, lengths) if settings.stages else Ledger()
        shape = _shape(settings)
        tuned = bool(study.tuning and arm.stages and not arm.untuned)
        trials = len(study.tuning.factors) * len(study.tuning.seeds) if tuned and study.tuning else 0
        own = last.full_flops(shape)
        seeds = len(study.seeds_of(arm))
        new_cells = seeds + trials
        seconds = new_cells * (own / study.flops_per_second + START_SECONDS) + _evaluation_seconds(
            study, settings, base_dir, lengths) * new_cells  # fmt: skip
        rows.append({
            "arm": arm.name, "cells": seeds, "trials": trials, "stages": list(arm.stages),
            "flops_paper": per_seed.paper_flops(shape), "flops_full": per_seed.full_flops(shape),
            "flops_own_stage": own, "gib": round(_gib(settings), 2), "cpu_seconds": round(seconds),
            "cpu_seconds_per_cell": round(seconds / new_cells), "matched": _matched(arm),
        })  # fmt: skip
    total = sum(row["cpu_seconds"] for row in rows)
    return {
        "name": study.name, "question": study.question, "seeds": list(study.seeds), "arms": rows,
        "cells": sum(r["cells"] for r in rows), "trials": sum(r["trials"] for r in rows),
        "flops_full": sum((r["cells"] + r["trials"]) * r["flops_own_stage"] for r in rows),
        "cpu_hours": round(total / 3600, 2), "hours": round(total / 3600 / study.workers, 2),
        "gib": round(study.workers * max(r["gib"] for r in rows), 2), "controls_off": dict(study.controls_off),
    }  # fmt: skip


def _matched(arm: Arm) -> str:
    return f"steps of {arm.stages[-1]} as {arm.equal_flops.to} has spent" if arm.equal_flops else ""


def _lengths(
    settings: Settings, name: str, base_dir: Path, known: dict[str, tuple[int, int]]
) -> tuple[int, int]:
    """Mean tokens of prompt and worked solution (0: none): a character is a token for the built-in model,
    about a quarter of one for others."""
    if name not in known:
        problems = load_problems(
            name, settings.data[name], seed=settings.seed, base_dir=base_dir, needs=("answer",)
        )
        unit = 1.0 if settings.model.path in ("tiny", "./base/model") else 0.25
        prompt = sum(len(settings.chat.system) + len(settings.chat.user) - 9 + len(p.messages[-1].content)
                     for p in problems) / len(problems)  # fmt: skip
        solution = sum(len(p.solution) for p in problems) / len(problems)
        known[name] = round(unit * prompt) + 3, (round(unit * solution) + 1 if solution else 0)
    return known[name]


def _stage(settings: Settings, index: int, base_dir: Path, known: dict[str, tuple[int, int]]) -> Ledger:
    stage = settings.stages[index]
    prompt, solution = _lengths(settings, stage.data, base_dir, known)
    if isinstance(stage, RlSettings):
        length = solution or stage.sampling.max_new_tokens
        groups = stage.steps * stage.prompts_per_step
        later = 1 - 1 / stage.updates_per_rollout
        own = [length] * stage.samples_per_prompt
        return group_work(prompt, own, scored=True).times(groups * later) + group_work(
            prompt, own, scored=False).times(groups * (1 - later))  # fmt: skip
    if not isinstance(stage, SftSettings | RejectionSettings):
        raise TypeError(f"unknown stage {type(stage).__name__}")
    rows = settings.data[stage.data].limit
    if stage.epochs and rows == "all":
        raise UserError(f"data.{stage.data}.limit: an estimate needs a number of rows: set limit = N")
    count = stage.epochs * int(rows) if stage.epochs else stage.steps * stage.sequences_per_step
    return sequence_work(prompt, solution or 64).times(count)


def _evaluation_seconds(
    study: Study, settings: Settings, base_dir: Path, known: dict[str, tuple[int, int]]
) -> float:
    shape, work = _shape(settings), Ledger()
    for name in settings.evaluate.data:
        prompt, solution = _lengths(settings, name, base_dir, known)
        length = solution or settings.evaluate.data_sampling.max_new_tokens
        rows = settings.data[name].limit
        num = (int(rows) if rows != "all" else 500) * settings.evaluate.data_samples
        group = group_work(prompt, [length], scored=False)
        work += Ledger(
            generated_pass_tokens=group.generated_pass_tokens, generated_pairs=group.generated_pairs
        ).times(num)
    return work.full_flops(shape) / study.flops_per_second


def _config(settings: Settings) -> dict[str, Any]:
    tiny = settings.model.tiny
    return {
        "model_type": "llama", "hidden_size": tiny.hidden_size, "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.num_layers, "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_heads, "vocab_size": TINY_VOCABULARY, "tie_word_embeddings": True,
    }  # fmt: skip


def _shape(settings: Settings) -> ModelShape:
    """The built-in model's shape, which a pinned base has too (``model.tiny`` of the study says which)."""
    return shape_of(_config(settings))


def _gib(settings: Settings) -> float:
    shape, tiny = _shape(settings), settings.model.tiny
    held = shape.num_parameters * STATE_BYTES
    for stage in settings.stages:
        held = max(held, shape.num_parameters * STATE_BYTES
                   + stage.tokens_per_microbatch * tiny.num_layers * (8 * tiny.hidden_size + 3 * tiny.intermediate_size)
                   * 4)  # fmt: skip
    return PROCESS_GIB + held / GIB
