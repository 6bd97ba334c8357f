"""LoRA (arXiv:2106.09685): a trained product of two small matrices beside a linear layer's frozen one.

The layer computes x·Wᵀ + s·(x·Aᵀ)·Bᵀ, with s = alpha / rank, or alpha / √rank for rsLoRA (arXiv:2312.03732). A stage
starts with B = 0, that is, with the model that it was given, and ends with the merged matrix W + s·B·A. The weights
keep their names, so that an adapted model is saved, sharded and compared like any other one.
Shapes: N inputs, I inputs and O outputs of a layer, r the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from truestep.errors import UserError, did_you_mean
from truestep.model.select import chosen, empty_model, freeze
from truestep.seeding import Purpose, integer
from truestep.settings import ModelSettings
from truestep.stage_settings import LoraSettings, StageSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # of the names in PEFT's files
ALL_LINEAR = "all-linear"
ADAPTER = ("lora_A", "lora_B")


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, which ``is_on`` switches."""

    lora_A: nn.Parameter  # [r, I]
    lora_B: nn.Parameter  # [O, r]
    scale: float
    seed: int
    is_on: bool

    @classmethod
    def of(cls, layer: nn.Linear, settings: LoraSettings, seed: int, name: str) -> LoraLinear:
        """Return the layer with a new adapter. Its weight and bias are the same tensors, without gradients."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made.train(layer.training)
        made.scale, made.is_on = settings.scale, True
        made.seed = integer(seed, Purpose.MODEL_INIT, item=f"lora {name}")
        made.lora_A = nn.Parameter(layer.weight.new_empty(settings.rank, layer.in_features))
        made.lora_B = nn.Parameter(layer.weight.new_empty(layer.out_features, settings.rank))
        if not layer.weight.is_meta:
            for leaf in ADAPTER:
                getattr(made, leaf).data.copy_(made.initial(leaf))
        return made

    def initial(self, leaf: str) -> Tensor:
        """Return what lora_A or lora_B of a new adapter is, in its dtype, in host memory."""
        like = getattr(self, leaf)
        whole = torch.zeros(like.shape)
        if leaf == "lora_A":
            draw = torch.Generator().manual_seed(self.seed)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=draw)  # as nn.Linear and PEFT do
        return whole.to(like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output + linear(self.reduced(input), self.lora_B) if self.is_on else output

    def reduced(self, input: Tensor) -> Tensor:
        """Return s·(x·Aᵀ) [N, r], which B expands."""
        return linear(input, self.lora_A) * self.scale


def layers_of(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers with an adapter by name, each once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def install(model: PreTrainedModel, settings: LoraSettings, seed: int, key: str = "lora") -> None:
    """Freeze the model, and add adapters to the layers that ``targets`` match. ``train_also`` stays trained.

    Raises UserError, naming the key, if a pattern matches nothing, or a layer that cannot have an adapter."""
    also = chosen(model, settings.train_also, f"{key}.train_also")
    model.requires_grad_(False)
    for name, layer in targets_of(model, settings.targets, f"{key}.targets").items():
        adapted = LoraLinear.of(layer, settings, seed, name)
        for owner in model.modules():
            for leaf, child in list(owner.named_children()):
                if child is layer:  # also if several modules share it
                    setattr(owner, leaf, adapted)
    for parameter in also.values():
        parameter.requires_grad_(True)


def targets_of(model: PreTrainedModel, patterns: Sequence[str], key: str) -> dict[str, nn.Linear]:
    """Return the layers that the patterns match, by name. ``all-linear`` stands for every linear layer but the output
    layer, as in PEFT. A pattern without a dot is the last part of a name: q_proj is every layer of that name."""
    head = model.get_output_embeddings()
    modules = {name: m for name, m in model.named_modules() if name}
    holders = {n: m for n, m in modules.items() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    found: dict[str, nn.Linear] = {}
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            matched = {n: m for n, m in holders.items() if type(m) is nn.Linear and m is not head}
        else:
            full = pattern if "." in pattern else f"*.{pattern}"
            matched = {n: m for n, m in holders.items() if fnmatchcase(n, full) or n == pattern}
        if not matched:
            hint = did_you_mean(pattern, sorted({n.rpartition(".")[2] for n in holders} | {ALL_LINEAR}))
            first = next(iter(holders), "none")
            raise UserError(
                f"{key}: {pattern!r} matches no layer{hint or f'; the first one is {first}'}; patterns may have *"
            )
        for name, module in matched.items():
            if type(module) is not nn.Linear:
                kind = type(module).__name__
                raise UserError(
                    f"{key}: {pattern!r} matches {name}, which is a {kind}; only linear layers can have an adapter "
                    f'(train it whole with train_also = ["{name}.*"])'
                )
            found[name] = module
    return found


def check_trained(settings: ModelSettings, stages: Sequence[StageSettings]) -> None:
    """Raise UserError if a stage's ``freeze``, ``lora`` or ``optimizer.no_decay`` does not fit the model."""
    for stage in stages:
        key, undecayed = f"stages.{stage.name}", stage.optimizer.no_decay
        if stage.freeze or undecayed or stage.lora.rank:
            model = empty_model(settings)
            choose_trained(model, stage, seed=0)
            chosen(model, undecayed, f"{key}.optimizer.no_decay")


def choose_trained(model: PreTrainedModel, stage: StageSettings, seed: int) -> None:
    """Freeze what the stage does not train, and add its adapters. Raises UserError."""
    if stage.lora.rank:
        install(model, stage.lora, seed, f"stages.{stage.name}.lora")
    else:
        freeze(model, stage.freeze, f"stages.{stage.name}.freeze")


def head_adapter(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what the output layer's adapter adds to the logits, as two factors, or None if it adds nothing."""
    return (head.reduced(hidden), head.lora_B) if isinstance(head, LoraLinear) and head.is_on else None


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Compute without adapters, that is, with the model that the stage started from."""
    layers = list(layers_of(model).values())
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in ADAPTER


@torch.no_grad()
def merged(scale: float, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return W + s·B·A [O, I], computed in at least float32 and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (second.to(wide) @ first.to(wide))).to(weight.dtype)


@torch.no_grad()
def merged_weights(model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the same model without adapters. ``whole`` has all weights by name, not sharded. An output
    layer that was tied to the input table gets a separate weight if it has an adapter."""
    layers, names = layers_of(model), {id(p): name for name, p in model.named_parameters()}
    found = {name: tensor for name, tensor in whole.items() if not is_adapter(name)}
    for name, layer in layers.items():
        parts = (whole[key] for key in (names[id(layer.weight)], f"{name}.lora_A", f"{name}.lora_B"))
        found[f"{name}.weight"] = merged(layer.scale, *parts)
    return found


@torch.no_grad()
def with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Copy weights into a model without adapters, and return it. Its output layer is untied if the weights have one."""
    head = model.get_output_embeddings()
    (name,) = (f"{name}.weight" for name, module in model.named_modules() if module is head)
    if name in weights and name not in dict(model.named_parameters()):
        head.weight = nn.Parameter(weights[name].clone())
        model.config.tie_word_embeddings = False
    own = dict(model.named_parameters())
    if different := sorted(own.keys() ^ weights.keys()):
        raise KeyError(f"the weights are not those of the model: {different[:3]}")
    for key, parameter in own.items():
        parameter.copy_(weights[key])
    return model


def save_adapter(
    folder: Path, model: nn.Module, whole: Mapping[str, Tensor], settings: LoraSettings, base: str
) -> None:
    """Write the adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    layers, tensors = layers_of(model), {}
    for name in layers:
        for leaf in ADAPTER:
            tensors[f"{PREFIX}{name}.{leaf}.weight"] = whole[f"{name}.{leaf}"].contiguous()
    also = [n for n in chosen(model, settings.train_also, "lora.train_also") if not is_adapter(n)]
    whole_modules = sorted({name.rpartition(".")[0] for name in also})
    for name in also:
        tensors[f"{PREFIX}{name}"] = whole[name].contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": settings.rank,
        "lora_alpha": settings.alpha, "use_rslora": settings.rslora, "target_modules": sorted(layers),
        "modules_to_save": whole_modules or None, "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
