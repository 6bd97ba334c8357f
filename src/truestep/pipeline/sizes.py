"""The numbers that follow from a stage's settings and data: its steps, its batches, and whether they are possible."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError, count, verb
from truestep.pipeline.prompts import longest_of_stage, longest_sample
from truestep.settings import RejectionSettings, RlSettings, SftSettings, StageSettings
from truestep.train.order import Shares

if TYPE_CHECKING:
    from truestep.pipeline.prepare import Prepared


def num_sequences(stage: SftSettings | RejectionSettings, available: Sequence[int]) -> int:
    """Return how many sequences (with repetition over epochs) the stage trains on, if its data sets have so many. With
    several data sets, the stage ends with the step in which the named one has been seen ``epochs`` times."""
    if not stage.epochs:
        return stage.steps * stage.sequences_per_step
    if len(available) == 1:
        return round(stage.epochs * available[0])
    assert isinstance(stage, SftSettings)
    which = stage.data_names.index(stage.epochs_of)
    return stage.sequences_per_step * shares_of(stage).steps_until(
        which, round(stage.epochs * available[which])
    )


def num_steps(stage: SftSettings | RejectionSettings, available: Sequence[int]) -> int:
    return math.ceil(num_sequences(stage, available) / stage.sequences_per_step)


def shares_of(stage: StageSettings) -> Shares:
    """Return how the places of the stage's steps are shared by its data sets."""
    size = (
        stage.prompts_per_step if isinstance(stage, RlSettings) else getattr(stage, "sequences_per_step", 1)
    )
    return Shares(tuple(share.weight for share in stage.shares), size)


def check_lengths(prepared: Prepared, stage: StageSettings) -> None:
    """Raise UserError if a stage's batches and lengths do not fit its data."""
    where, names = f"stages.{stage.name}", [f"data.{name}" for name in stage.data_names]
    longest = 0
    if isinstance(stage, SftSettings):
        kept = [prepared.demonstrations[name] for name in stage.data_names]
        longest = max(len(d.token_ids) for of_set in kept for d in of_set)
        if (size := stage.sequences_per_step) > (num := num_sequences(stage, [len(k) for k in kept])):
            fault = f"is more than the {num} sequences of the whole stage"
            raise UserError(f"{where}.sequences_per_step = {size} {fault}; set a smaller number")
    if isinstance(stage, RlSettings | RejectionSettings):
        longest = longest_of_stage(prepared, stage)
    if isinstance(stage, RlSettings):
        size, prompts = stage.prompts_per_step, prepared.stage_prompts[stage.name]
        for which, (name, of_set) in enumerate(zip(names, prompts, strict=True)):
            asked = size if len(names) == 1 else shares_of(stage).most(which)
            if asked > (num := len(of_set)):
                fault = f"is more than the {num} problems of {name} that can be trained on"
                mixed = "" if len(names) == 1 else f" (the weight asks for {asked} of them in a step)"
                raise UserError(f"{where}.prompts_per_step = {size} {fault}{mixed}; set a smaller number")
    if stage.tokens_per_microbatch < longest:
        raise UserError(
            f"{where}.tokens_per_microbatch = {stage.tokens_per_microbatch} is less than the longest "
            f"sequence, which has {longest} tokens; set {longest} or more"
        )


def check_tested(prepared: Prepared, name: str) -> None:
    """Raise UserError if a problem of a test or dev set leaves no room for a completion."""
    limit = prepared.settings.evaluate.data_sampling.max_new_tokens
    longest_sample(prepared, prepared.prompts[name], name, limit, "evaluate.sampling")


def batch_table(prepared: Prepared, world_size: int) -> list[Mapping[str, Any]]:
    """Return the batch sizes and numbers of steps that follow from the settings, as one row per stage."""
    rows: list[Mapping[str, Any]] = []
    columns = ("problems", "steps", "optimizer updates", "sequences per update", "epochs")
    values: tuple[Any, ...]
    for stage in prepared.settings.stages:
        if isinstance(stage, SftSettings):
            nums = [len(prepared.demonstrations[name]) for name in stage.data_names]
            updates = prepared.methods[stage.name].updates_per_step
            steps, epochs = num_steps(stage, nums), _epochs(stage, nums, num_sequences(stage, nums))
            values = (sum(nums), steps, steps * updates, stage.sequences_per_step // updates, epochs)
        elif isinstance(stage, RlSettings):
            nums = [len(prompts) for prompts in prepared.stage_prompts[stage.name]]
            updates = stage.updates_per_rollout
            size = stage.prompts_per_step // updates * stage.samples_per_prompt
            epochs = _epochs(stage, nums, stage.steps * stage.prompts_per_step)
            values = (sum(nums), stage.steps, stage.steps * updates, size, epochs)
        else:
            num = sum(map(len, prepared.stage_prompts[stage.name]))
            values = (num, "after sampling", "–", stage.sequences_per_step, "–")
        rows.append({
            "stage": stage.name, "kind": stage.kind, "method": prepared.methods[stage.name].name,
            **dict(zip(columns, values, strict=True)),
            "ranks": world_size, "tokens per micro-batch": stage.tokens_per_microbatch,
            "lr": f"{stage.optimizer.lr:g} {stage.optimizer.schedule}",
        })  # fmt: skip
    measured = [_measurements(stage) for stage in prepared.settings.stages]
    used = [key for key in measured[0] if any(one[key] for one in measured)] if measured else []
    return [
        {**row, **{key: one[key] or "–" for key in used}} for row, one in zip(rows, measured, strict=True)
    ]


def _measurements(stage: StageSettings) -> dict[str, str]:
    """Return what is measured while the stage trains, and what follows from it ("" for nothing)."""
    found = {}
    for name, of in (("validation", stage.validation), ("dev", stage.dev)):
        best = ", exports the best" if of.select_best else ""
        found[name] = f"{of.data}, every {count(of.every_steps, 'step')}{best}" if of.data else ""
    early = stage.early_stopping
    least = f" by more than {early.min_change:g}" if early.min_change else ""
    num = count(early.patience, "measurement")
    after = f"after {num} of {early.watch} in a row that {verb(early.patience, 'are')} not better"
    return found | {"early stopping": f"{after}{least}" if early.patience else ""}


def _epochs(stage: StageSettings, available: Sequence[int], num: int) -> float | str:
    """Return how often ``num`` places visit every row; of several data sets, as text with the rows of a step."""
    if len(available) == 1:
        return round(num / available[0], 2)
    shares = shares_of(stage)
    counts = [shares.before(num // shares.size, which) for which in range(len(available))]
    sets = zip(stage.shares, counts, available, strict=True)
    return ", ".join(f"{of.name} {count / rows:.2f} (weight {of.weight:g})" for of, count, rows in sets)
