"""Estimates the cells, FLOPs, memory and time of a study before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from truestep.flops import Ledger, ModelShape, group_work, sequence_work
from truestep.pipeline.memory import GIB
from truestep.pipeline.paper_plan import rl_work, shape_of
from truestep.settings import ModelSettings, RlSettings, SftSettings, StageSettings
from truestep.study.plan import Study

if TYPE_CHECKING:
    from truestep.pipeline.prepare import Prepared
    from truestep.study.inputs import Inputs

PROCESS_GIB = 0.7  # an interpreter with torch and transformers, but no model
START_SECONDS = 3.0  # start of a forked child: data, tokenizer, evaluation set-up
TINY_VOCABULARY = 101
MOST_MEASURED = 500  # worked solutions whose tokens are counted
Lengths = dict[str, tuple[float, float]]  # data set → mean tokens of prompt and of worked solution (0: none)

STATE_BYTES = 16  # of a parameter in float32: weight, gradient and two moments


def estimate(study: Study, inputs: Inputs) -> dict[str, Any]:
    """Return one row per arm, and totals. A rollout is assumed to be as long as a demonstration, or as the
    length limit without demonstrations. What a method adds (demonstrations, more rounds) is not counted."""
    prepared, rows = inputs.prepared, list[dict[str, Any]]()
    shape, lengths = _shape(prepared.settings.model), _lengths(prepared)
    by_name = {stage.name: stage for stage in prepared.settings.stages}
    one_evaluation = _evaluation_work(study, prepared, lengths).full_flops(shape) / study.flops_per_second
    for arm in study.arms:
        stages = [by_name[name] for name in inputs.stages[arm.name]]
        work = [_stage(prepared, stage, lengths) for stage in stages]
        per_seed = sum(work, Ledger())
        tuning = study.tuning_of(arm)
        trials = len(tuning.factors) * len(tuning.seeds) if tuning else 0
        own = work[-1].full_flops(shape) if work else 0.0
        seeds = len(study.seeds_of(arm))
        new_cells = seeds + trials
        seconds = new_cells * (own / study.flops_per_second + START_SECONDS + one_evaluation)
        goal = arm.equal_flops
        shares = [study.resources.of(name) for name in ("", *arm.stages)]
        ranks, gpus = max(share.ranks for share in shares), max(share.gpus for share in shares)
        rows.append({
            "arm": arm.name, "cells": seeds, "trials": trials, "stages": list(arm.stages),
            "flops_paper": per_seed.paper_flops(shape), "flops_full": per_seed.full_flops(shape),
            "flops_own_stage": own, "gib": round(ranks * _gib(prepared.settings.model, shape, stages), 2),
            "ranks": ranks, "gpus": gpus,
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
        **({"allow_overlap": dict(study.allow_overlap)} if study.allow_overlap else {}),
    }  # fmt: skip


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _lengths(prepared: Prepared) -> Lengths:
    found = {}
    for name, problems in prepared.problems.items():
        made = prepared.demonstrations.get(name, ())
        prompts = [len(p.token_ids) for p in prepared.prompts.get(name, ())]
        prompt = _mean(prompts or [d.num_prompt_tokens for d in made])
        if made:
            found[name] = prompt, _mean([len(d.token_ids) - d.num_prompt_tokens for d in made])
        else:
            texts = [p.solution for p in problems[:MOST_MEASURED] if p.solution]
            found[name] = prompt, _mean([len(prepared.tokenizer.encode(text)) + 1 for text in texts])
    return found


def _stage(prepared: Prepared, stage: StageSettings, lengths: Lengths) -> Ledger:
    """Return the work of a stage. If it has several data sets, their mean lengths are weighted."""
    from truestep.pipeline.sizes import num_sequences

    total = sum(share.weight for share in stage.shares)
    prompt, solution = (
        round(sum(share.weight / total * lengths[share.name][which] for share in stage.shares))
        for which in (0, 1)
    )
    if isinstance(stage, RlSettings):
        return rl_work(stage, prompt, [solution or stage.sampling.max_new_tokens] * stage.samples_per_prompt)
    if isinstance(stage, SftSettings):
        num = num_sequences(stage, [len(prepared.demonstrations[name]) for name in stage.data_names])
    else:
        num = num_sequences(stage, [len(of_set) for of_set in prepared.stage_prompts[stage.name]])  # type: ignore[arg-type]
    return sequence_work(prompt, solution or 64).times(num)


def _evaluation_work(study: Study, prepared: Prepared, lengths: Lengths) -> Ledger:
    """Return the work of a cell's evaluation."""
    work, evaluate = Ledger(), prepared.settings.evaluate
    for name in study.run["evaluate"]["data"]:
        prompt, solution = (round(length) for length in lengths[name])
        group = group_work(prompt, [solution or evaluate.data_sampling.max_new_tokens], scored=False)
        passes, pairs = group.generated_pass_tokens, group.generated_pairs
        num = len(prepared.problems[name]) * evaluate.data_samples
        work += Ledger(generated_pass_tokens=passes, generated_pairs=pairs).times(num)
    return work


def _shape(model: ModelSettings) -> ModelShape:
    if model.path != "tiny":
        from truestep.model.load import model_shape
        from truestep.model.select import empty_model

        return model_shape(empty_model(model))
    tiny = model.tiny
    return shape_of({
        "model_type": "llama", "hidden_size": tiny.hidden_size, "intermediate_size": tiny.intermediate_size,
        "num_hidden_layers": tiny.num_layers, "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_heads, "vocab_size": TINY_VOCABULARY, "tie_word_embeddings": True,
    })  # fmt: skip


def _gib(model: ModelSettings, shape: ModelShape, stages: Sequence[StageSettings]) -> float:
    width, inner = shape.attention_width, 3 * shape.attention_width
    if model.path == "tiny":
        width, inner = model.tiny.hidden_size, model.tiny.intermediate_size
    per_token = 4 * shape.num_layers * (8 * width + 3 * inner)
    tokens = max((stage.tokens_per_microbatch for stage in stages), default=0)
    return PROCESS_GIB + (shape.num_parameters * STATE_BYTES + tokens * per_token) / GIB
