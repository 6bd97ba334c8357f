"""Chooses parameters by pattern: what a stage freezes, and what has no weight decay.

A pattern is a shell pattern (``*`` matches any characters, also dots) of a parameter's name in the Hugging Face
model, such as ``model.layers.[0-3].*``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from truestep.errors import UserError, did_you_mean
from truestep.flops import ModelShape
from truestep.model.load import num_used, read_config, resolve
from truestep.model.rope import override
from truestep.model.tiny import tiny_model, tiny_tokenizer
from truestep.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS: dict[str, Callable[[nn.Module, str], bool]] = {
    "norms": lambda owner, leaf: "norm" in type(owner).__name__.lower(),
    "biases": lambda owner, leaf: leaf == "bias",
}


def chosen(model: nn.Module, patterns: Sequence[str], key: str) -> dict[str, Tensor]:
    """Return the parameters that a pattern, or a word for a kind of parameters, matches. A tied parameter has
    several names, any of which may match. Raises UserError, naming the key, if a pattern matches nothing."""
    names = dict(model.named_parameters(remove_duplicate=False))
    owners = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for pattern in patterns:
        if (kind := WORDS.get(pattern)) is not None:  # a model may have none of them
            found |= {
                n: p for n, p in names.items() if kind(owners[n.rpartition(".")[0]], n.rpartition(".")[2])
            }
            continue
        matched = {name: p for name, p in names.items() if fnmatchcase(name, pattern)}
        if not matched:
            hint = did_you_mean(pattern, list(names)) or f"; the first parameter is {next(iter(names))}"
            raise UserError(
                f"{key}: {pattern!r} matches no parameter of the model{hint}; a pattern may end with *"
            )
        found |= matched
    return found


def freeze(model: nn.Module, patterns: Sequence[str], key: str = "freeze") -> None:
    """Switch off the gradients of the parameters that the patterns match. Raises UserError if none is left."""
    for parameter in chosen(model, patterns, key).values():
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"{key} = {list(patterns)} matches every parameter, so nothing is trained; remove a pattern"
        )


def without_frozen(model: PreTrainedModel, shape: ModelShape) -> ModelShape:
    """Return the shape with the part of the backward pass that frozen parameters leave. A forward pass of two tokens
    shows which products have an input with a gradient. Held by: tests/unit/test_flops.py"""
    if all(p.requires_grad for p in model.parameters()):
        return shape
    counts = {"matrices": 0, "weights": 0, "inputs": 0, "layers": 0}

    def see(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = next((t for t in (*args, *named.values()) if isinstance(t, Tensor)), None)
        flows = given is not None and given.requires_grad
        for matrix in (p for p in module.parameters(recurse=False) if p.dim() > 1):
            size = num_used(module, matrix, model.config)
            counts["matrices"] += size
            counts["weights"] += size * matrix.requires_grad
            counts["inputs"] += size * flows
            flows = flows or matrix.requires_grad  # the input of an expert's second product

    def see_layer(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counts["layers"] += (output if isinstance(output, Tensor) else output[0]).requires_grad

    products = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in products]
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == shape.num_layers)
    layers = next(lists, nn.ModuleList())
    hooks += [layer.register_forward_hook(see_layer) for layer in layers]
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    share = (counts["weights"] + counts["inputs"]) / (2 * counts["matrices"])
    return replace(shape, backward_share=share, num_backward_layers=counts["layers"] if layers else None)


def empty_model(settings: ModelSettings) -> PreTrainedModel:
    """Return the model without memory for its weights (on the meta device), to look at its names."""
    from transformers import AutoModelForCausalLM

    source = resolve(settings)
    with torch.device("meta"):
        if source == "tiny":
            return tiny_model(settings.tiny, len(tiny_tokenizer()), 8, seed=0)
        config = read_config(source)
        override(config, settings)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
