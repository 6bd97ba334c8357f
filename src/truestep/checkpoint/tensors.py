"""Writes a model's weights tensor by tensor: byte for byte what transformers' save_pretrained writes, without the whole
model in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truestep.checkpoint.reader import DTYPES
from truestep.model.stored import INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE_BYTES = "50GB"  # transformers' default
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors sorts tensors by dtype, the last of these first, and then by name.
_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


@dataclass(frozen=True)
class Streamed:
    """The parameters of a model. ``empty`` has them on the meta device, and ``read`` returns one whole tensor. It is
    called once for each, in the order of ``empty``."""

    empty: Mapping[str, Tensor]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Streamed:
        return cls(
            {name: tensor.detach().to("meta") for name, tensor in tensors.items()}, tensors.__getitem__
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.empty.values())


def write_weights(folder: Path, model: PreTrainedModel, weights: Streamed) -> None:
    """Write the safetensors files of the model with these parameters and its own saved buffers, under the names that its
    files had when it was read."""
    from huggingface_hub import split_torch_state_dict_into_shards

    own = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in own}
    read = weights.read
    weights = Streamed(
        {**weights.empty, **Streamed.of(buffers).empty},
        lambda name: buffers[name] if name in buffers else read(name),
    )
    parts = _parts(model, weights)
    stored = {name: tensor for _, made in parts for name, tensor in made.items()}
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=_FILE_BYTES
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in split.filename_to_tensors.items():
        places |= _allocate(folder / file, {name: stored[name] for name in names})
    for names, _ in parts:
        for name, tensor in _converted(model, {name: weights.read(name) for name in names}).items():
            path, offset = places.pop(name)
            with path.open("r+b") as out:
                out.seek(offset)
                out.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if split.is_sharded:
        count = sum(tensor.numel() for tensor in weights.empty.values())
        index = {
            "metadata": {"total_parameters": count, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parts(model: PreTrainedModel, weights: Streamed) -> list[tuple[list[str], dict[str, Tensor]]]:
    """Return which parameters are read together, and the tensors that are stored of them, on the meta device. Usually it
    is one by one. Only if a stored tensor is made of several parameters, it is all of them at once."""
    whole = _converted(model, weights.empty)
    each = [([name], _converted(model, {name: tensor})) for name, tensor in weights.empty.items()]
    found = [(name, tensor.shape) for _, made in each for name, tensor in made.items()]
    if sorted(found) == sorted((name, tensor.shape) for name, tensor in whole.items()):
        return each
    return [(list(weights.empty), whole)]


def _converted(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names and in the form in which they are stored."""
    from transformers.core_model_loading import revert_weight_conversion

    ignored = model._keys_to_ignore_on_save or ()
    return dict(revert_weight_conversion(model, {n: t for n, t in tensors.items() if n not in ignored}))


def _allocate(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Path, int]]:
    """Write a safetensors file without its data. Return where the data of each tensor begins."""
    order = sorted(tensors, key=lambda name: (-_ORDER.index(_NAMES[tensors[name].dtype]), name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in order:
        start, stop = stop, stop + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + stop)
    return {name: (path, 8 + len(text) + header[name]["data_offsets"][0]) for name in order}
