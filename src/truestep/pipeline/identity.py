"""Hashes of all that a stage's or an evaluation's result depends on: another hash, another result."""

from __future__ import annotations

from typing import Any

from truestep.pipeline.prepare import Prepared
from truestep.settings import RejectionSettings, RlSettings, settings_hash


def stage_identity(prepared: Prepared, index: int) -> str:
    """The hash of all that a stage's result depends on: its own settings and data, and every stage before
    it."""
    settings = prepared.settings
    parts: list[Any] = [base_identity(prepared), settings.chat]
    for stage in settings.stages[: index + 1]:
        # What is about memory or files alone may change between two sittings of a run.
        frozen = stage.model_copy(update={"save_every": 1, "keep_checkpoints": 1, "tokens_per_microbatch": 1})
        if isinstance(frozen, RlSettings | RejectionSettings):
            frozen = frozen.model_copy(
                update={"sampling": frozen.sampling.model_copy(update={"max_running": 1})}
            )
        if code := prepared.code[stage.name]:
            parts.append(str(sorted(code.items())))
        parts += [frozen, prepared.content[stage.data], prepared.content.get(stage.dev.data, "")]
        if stage.dev.data:
            parts.append(settings.evaluate.data_sampling.model_copy(update={"max_running": 1}))
    return settings_hash(*parts)


def evaluation_identity(prepared: Prepared, model_identity: str, name: str) -> str:
    settings = prepared.settings
    sampling = settings.evaluate.data_sampling.model_copy(update={"max_running": 1})
    samples = settings.evaluate.data_samples
    return settings_hash(
        sampling, samples, settings.chat, settings.seed, model_identity, prepared.content[name]
    )


def base_identity(prepared: Prepared) -> str:
    """The hash of the base model: its settings and the content of its files."""
    settings = prepared.settings
    compute = settings.compute.model_copy(update={"threads": 1})
    return settings_hash(settings.model, prepared.model_content, compute, settings.seed)
