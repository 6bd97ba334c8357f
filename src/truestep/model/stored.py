"""Weights as they are stored: reads any rows of a parameter from safetensors files, and writes such files tensor by
tensor, so that no process has to hold the whole model.

Which stored tensors make a parameter, and the other way round, is what transformers says (renamed tensors, experts
that are stored one by one), so both give the bits of its from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from truestep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MOVED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # stored by old versions, and computed now
_CHUNK = 1 << 24  # numbers that are compared at once


class Weights(Protocol):
    """The values of a model's parameters and saved buffers, by name."""

    def read(self, name: str, first: int, stop: int) -> Tensor:
        """Return rows of a tensor, or all of a tensor without dimensions."""

    def holds(self, name: str) -> bool:
        """Return whether a buffer is among them, or else is computed."""


@dataclass(frozen=True)
class WholeWeights:
    """The weights of a model that is in memory."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str, first: int, stop: int) -> Tensor:
        whole = self.tensors[name].detach()
        return whole[first:stop].clone() if whole.ndim else whole.clone()

    def holds(self, name: str) -> bool:
        return name in self.tensors


@dataclass
class _Recipe:
    """How a parameter is made: the stored tensors by pattern, and the converter that joins or splits them, if any."""

    target: str
    converter: Any = None
    stored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    splits_rows: bool = False  # row i needs only the i-th stored tensor of each pattern (experts)


def stored_files(source: str, config: Any) -> list[Path]:
    """Return the safetensors files of a folder or hub id, first the index if there is one, or [] if its weights are not
    stored like that."""
    from transformers.utils import cached_file

    if any(getattr(config, name, None) for name in ("quantization_config", "transformers_weights")):
        return []

    def find(name: str) -> Path | None:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    if (index := find(INDEX)) is None:
        single = find(SINGLE)
        return [] if single is None else [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        files = {name: find(name) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index}: the index of the weights cannot be read; use complete files of one model"
        ) from None
    if missing := [name for name, file in files.items() if file is None]:
        raise UserError(f"{index} lists {missing[0]}, which is not there; use complete files of one model")
    return [index, *(file for file in files.values() if file is not None)]


def hollow(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a configuration on the meta device, that is, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    wide = [re.compile(pattern.replace("*", r"\d+")) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(pattern.search(name) for pattern in wide):  # transformers keeps them in float32
            tensor.data = tensor.data.float()
    return model.requires_grad_(True)  # as from_pretrained does, also for what the class freezes


class StoredWeights:
    """The weights of ``model``, which is on the meta device, in safetensors files. Rows are read when they are asked for.

    Raises UserError, which names the tensor and its file, if one is missing, has a different shape or not a
    floating-point dtype, or does not belong to the model. A tied parameter that is stored twice, with different values,
    is untied, as transformers does."""

    def __init__(self, model: PreTrainedModel, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.model, self.index = model, files[0]
        self.slices: dict[str, Any] = {}
        self.file_of: dict[str, Path] = {}
        for path in (file for file in files if file.suffix == ".safetensors"):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a valid safetensors file: {error}") from None
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                self.slices[key], self.file_of[key] = file.get_slice(key), path
        self.expected = dict(model.state_dict(keep_vars=True))
        self.recipes = self._recipes()
        self._check()
        self._untie()

    def read(self, name: str, first: int, stop: int) -> Tensor:
        name, like = self._held(name), self.expected[name]
        recipe = self.recipes[name]
        if recipe.converter is None:
            (key,) = recipe.stored[""]
            view = self.slices[key]
            return (view[first:stop] if like.ndim else view[...]).to(like.dtype, copy=True)
        if first == stop:
            return like.new_empty((0, *like.shape[1:]), device="cpu")
        if recipe.splits_rows:
            return self._made(recipe, name, range(first, stop))
        return self._made(recipe, name)[first:stop].clone()

    def holds(self, name: str) -> bool:
        return name in self.expected

    def _recipes(self) -> dict[str, _Recipe]:
        """Return how each tensor of the model is made, as transformers' loading does."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix, expected = self.model.base_model_prefix, self.expected
        found: dict[str, _Recipe] = {}
        unexpected = []
        for key in sorted(self.slices, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if target not in expected and key in expected:
                target, pattern = rename_source_key(key, [], [], prefix, expected)
            if target in expected:
                recipe = found.setdefault(target, _Recipe(target, by_pattern.get(pattern)))
                recipe.stored[pattern or ""].append(key)
            else:
                unexpected.append(key)
        known = [*(self.model._keys_to_ignore_on_load_unexpected or ()), *_MOVED]
        for key in (k for k in unexpected if not any(re.search(pattern, k) for pattern in known)):
            raise self._fault(key, f"{type(self.model).__name__} has no place for it")
        self.model._weight_conversions = [
            one for one in mapping if one.was_used()
        ]  # export writes the same names
        return found

    def _check(self) -> None:
        """Compare dtypes and shapes with the model's, without reading a tensor. Add the further tensors that a converter
        makes from the same stored ones."""
        for recipe in list(self.recipes.values()):
            keys = [key for keys in recipe.stored.values() for key in keys]
            for key in keys:
                if (dtype := self.slices[key].get_dtype()) not in _DTYPES:
                    raise self._fault(key, f"its dtype is {dtype}, which is not one of {', '.join(_DTYPES)}")
            if recipe.converter is None:
                made = {recipe.target: tuple(self.slices[keys[0]].get_shape())}
            else:
                try:
                    made = {n: tuple(t.shape) for n, t in self._convert(recipe, None, "meta").items()}
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    raise self._fault(keys[0], f"{recipe.target} cannot be made of it: {error}") from None
            for name, shape in made.items():
                if name in self.expected and shape != tuple(self.expected[name].shape):
                    wanted = list(self.expected[name].shape)
                    raise self._fault(
                        keys[0], f"{name} has the shape {list(shape)}, but config.json says {wanted}"
                    )
                self.recipes[name] = recipe
            if recipe.converter is not None:
                recipe.splits_rows = self._splits_rows(recipe, made)
        for name in self.expected:
            if self._held(name) not in self.recipes:
                raise UserError(
                    f"model.path: {self.index}: no file has {name}; use complete files of one model"
                )

    def _splits_rows(self, recipe: _Recipe, made: Mapping[str, tuple[int, ...]]) -> bool:
        from transformers.core_model_loading import MergeModulelist

        shape = made[recipe.target]
        merges = any(isinstance(one, MergeModulelist) and one.dim == 0 for one in recipe.converter.operations)
        if not merges or len(made) > 1 or any(len(keys) != shape[0] for keys in recipe.stored.values()):
            return False
        (one,) = self._convert(recipe, range(1), "meta").values()
        return tuple(one.shape) == (1, *shape[1:])

    def _made(self, recipe: _Recipe, name: str, rows: range | None = None) -> Tensor:
        return self._convert(recipe, rows, "cpu")[name]

    def _convert(self, recipe: _Recipe, rows: range | None, device: str) -> dict[str, Tensor]:
        """Run a converter on its stored tensors (or only on those of some rows), or on tensors of their shapes."""
        converter, dtype = copy.deepcopy(recipe.converter), self.expected[recipe.target].dtype
        for pattern, keys in recipe.stored.items():
            for key in keys if rows is None else [keys[row] for row in rows]:
                view = self.slices[key]
                if device == "meta":
                    tensor = torch.empty(view.get_shape(), dtype=dtype, device="meta")
                else:
                    tensor = view[...].to(dtype)
                converter.add_tensor(recipe.target, key, pattern, tensor)
        made = converter.convert(recipe.target, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def _aliases(self, name: str) -> list[str]:
        """Return the names of a tensor: several if it is tied."""
        return [other for other, tensor in self.expected.items() if tensor is self.expected[name]]

    def _held(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        if name in self.recipes:
            return name
        return next((other for other in self._aliases(name) if other in self.recipes), name)

    def _untie(self) -> None:
        """Give a tied parameter that is stored with other values a tensor of its own."""
        for name, source in dict(self.model.all_tied_weights_keys).items():
            if name not in self.recipes or source not in self.recipes or self._is_equal(name, source):
                continue
            owner, _, leaf = name.rpartition(".")
            parameter = self.expected[name]
            self.expected[name] = torch.nn.Parameter(torch.empty_like(parameter))
            setattr(self.model.get_submodule(owner), leaf, self.expected[name])
            self.model.all_tied_weights_keys.pop(name)

    def _is_equal(self, a: str, b: str) -> bool:
        shape = self.expected[a].shape
        size = max(1, _CHUNK // max(1, shape[1:].numel()))
        cuts = [(first, min(first + size, shape[0])) for first in range(0, shape[0], size)]
        return all(torch.equal(self.read(a, *cut), self.read(b, *cut)) for cut in cuts)

    def _fault(self, key: str, why: str) -> UserError:
        return UserError(f"{self.file_of[key]}: {key}: {why}; use complete files of one model")


@torch.no_grad()
def fill_buffers(model: PreTrainedModel, weights: Weights, device: torch.device) -> None:
    """Give the buffers on the meta device their values: those that the weights have are read, and all others are computed,
    by the function with which transformers computes them after it has read the weights."""
    for tensor in model.parameters():
        tensor._is_hf_initialized = True  # they keep their values
    for name, owner in model.named_modules():
        computed = False
        for leaf, buffer in [(leaf, b) for leaf, b in owner._buffers.items() if b is not None and b.is_meta]:
            path = f"{name}.{leaf}".lstrip(".")
            if weights.holds(path):
                saved = weights.read(path, 0, buffer.shape[0] if buffer.ndim else 1).to(device)
                saved._is_hf_initialized = True  # type: ignore[attr-defined]
                owner._buffers[leaf] = saved
            else:
                owner._buffers[leaf], computed = torch.empty_like(buffer, device=device), True
        if computed:
            model._init_weights(owner)
