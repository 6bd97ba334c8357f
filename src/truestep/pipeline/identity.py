"""Hashes of all that the result of a stage or an evaluation depends on."""

from __future__ import annotations

from typing import Any

from truestep.pipeline.prepare import Prepared
from truestep.settings import RejectionSettings, RlSettings, settings_hash


def stage_identity(prepared: Prepared, index: int) -> str:
    """The hash of a stage's settings, code and data, and of every stage before it."""
    settings = prepared.settings
    parts: list[Any] = [base_identity(prepared), settings.chat]
    for stage in settings.stages[: index + 1]:
        # Settings that concern only memory or files may change when a run is resumed.
        ignored: dict[str, Any] = {"save_every": 1, "keep_checkpoints": 1, "tokens_per_microbatch": 1}
        if isinstance(stage, RlSettings | RejectionSettings):
            ignored["sampling"] = stage.sampling.model_copy(update={"max_running": 1})
        frozen = stage.model_copy(update=ignored)
        if code := prepared.code[stage.name]:
            parts.append(str(sorted(code.items())))
        parts += [frozen, prepared.content[stage.data], prepared.content.get(stage.dev.data, "")]
        if stage.dev.data:
            parts.append(settings.evaluate.data_sampling.model_copy(update={"max_running": 1}))
    return settings_hash(*parts)


def evaluation_identity(prepared: Prepared, model_identity: str, name: str) -> str:
    settings = prepared.settings
    sampling = settings.evaluate.data_sampling.model_copy(update={"max_running": 1})
    sampled = (sampling, settings.evaluate.data_samples, settings.chat, settings.seed)
    return settings_hash(*sampled, model_identity, prepared.content[name])


def base_identity(prepared: Prepared) -> str:
    """The hash of the base model: its settings and the content of its files."""
    settings = prepared.settings
    compute = settings.compute.model_copy(update={"threads": 1})
    return settings_hash(settings.model, prepared.model_content, compute, settings.seed)
