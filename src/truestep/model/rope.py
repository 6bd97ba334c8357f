"""The context length and RoPE of a model, set in its configuration before it is loaded."""

from __future__ import annotations

from typing import Any

from truestep.errors import UserError
from truestep.settings import ModelSettings


def override(config: Any, settings: ModelSettings) -> None:
    """Set the context length and RoPE that all stages and the exported model will have. The exported model of a stage,
    which has them already, stays as it is. Raises UserError for a longer context without a rule for its positions."""
    if settings.context_length != "model":
        if not hasattr(config, "max_position_embeddings"):
            fault = f"{config.model_type} has no max_position_embeddings to override"
            raise UserError(f'model.context_length: {fault}; set "model"')
        _extend(config, settings, settings.context_length)
        config.max_position_embeddings = settings.context_length
    elif settings.rope_scaling != "model":
        raise UserError(
            f'model.rope_scaling = "{settings.rope_scaling}" needs a model.context_length beyond the model\'s own; set it'
        )
    if settings.rope_theta != "model":
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(parameters, dict) or "rope_theta" not in parameters:
            fault = f"{config.model_type} has no single RoPE theta to override"
            raise UserError(f'model.rope_theta: {fault}; set "model"')
        config.rope_parameters = {**parameters, "rope_theta": settings.rope_theta}


def _extend(config: Any, settings: ModelSettings, length: int) -> None:
    """Set the rule by which RoPE reaches ``length`` positions."""
    own, rope, rule = (
        int(config.max_position_embeddings),
        getattr(config, "rope_parameters", None),
        settings.rope_scaling,
    )
    single = rope if isinstance(rope, dict) and "rope_theta" in rope else {}
    kind = single.get("rope_type", "default")
    if length <= own:
        if rule in ("linear", "yarn") and not (length == own and kind == rule):
            raise UserError(
                f'model.rope_scaling = "{rule}": the model has {own} positions, which are enough for '
                f"model.context_length = {length}; remove rope_scaling"
            )
        return
    where = f"model.context_length = {length} is more than the {own} positions of the model"
    if not isinstance(rope, dict):
        raise UserError(f"{where}, which has no RoPE to extend; set {own} or less")
    if rule == "model" and settings.rope_theta == "model":
        raise UserError(
            f'{where}; say how RoPE reaches them: set model.rope_scaling = "yarn" (or "linear"; "none" leaves it as it is), or '
            "a larger model.rope_theta"
        )
    if rule in ("linear", "yarn"):
        if not single or kind != "default":
            has = f"already has the rule {kind!r}" if single else "has several of them"
            raise UserError(
                f'model.rope_scaling = "{rule}": RoPE of {config.model_type} {has}; set {own} or less, or "none"'
            )
        of_yarn = {"original_max_position_embeddings": own} if rule == "yarn" else {}
        config.rope_parameters = {**rope, "rope_type": rule, "factor": length / own, **of_yarn}
