"""Finds out from a user's configuration file which subject it configures, and how it configures the step.

Only what affects the optimizer step is used. A tiny model and plain SGD replace the configured ones, and the
notes name what cannot be done on a CPU. The file is read, never executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from truestep.audit.postmortem import run_files as past_files
from truestep.audit.postmortem.run_files import Broken, truth, whole
from truestep.audit.subjects import CASES, ENGINE, TABLE, Configuration, Subject
from truestep.errors import UserError

MOST_MICROBATCHES = 8
TRL_KEYS = ("packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field", "max_seq_length")
FACTORY_KEYS = ("finetuning_type", "dataset_dir", "cutoff_len")
EXPECTED = (
    "DeepSpeed JSON, TrainingArguments JSON or YAML, accelerate or LLaMA-Factory YAML, or an OpenRLHF command"
)
LLAMA = {"arch": "llama"}
NOT_TAKEN_OVER = ("optim", "weight_decay")  # of the optimizer, for which plain SGD stands in
# Settings that change the gradient and that the audited step does not use.
CHANGES = (
    "neftune_noise_alpha", "use_liger_kernel", "padding_free", "use_dft_loss", "use_asft_loss", "use_eaft_loss",
    "prescale_gradients", "gradient_predivide_factor",
    "curriculum_learning", "progressive_layer_drop", "sparse_gradients",
)  # fmt: skip


@dataclass(kw_only=True)
class Configured:
    """What a file configures. ``notes`` say what was reduced or left out."""

    subject: str
    options: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    documented: str = ""
    notes: list[str] = field(default_factory=list)
    needs: tuple[str, ...] = ()  # what must be installed in addition to the subject's own needs
    unused: list[str] = field(default_factory=list)  # settings that change the step and are not used

    def accumulate(self, steps: int | None, total: int | None = None, micro: int | None = None) -> None:
        """Set the number of micro-batches per step, either as given or from the batch sizes."""
        if steps:
            self.options["accumulation"] = steps
        elif total and micro:
            self.options["accumulation"] = max(1, total // micro)
            self.notes.append(f"{total // micro} micro-batches per step, assuming one process")

    def zero(self, key: str, stage: int | None, device: Any, clipping: Any) -> None:
        """Set DeepSpeed's own settings."""
        place = str(device or "none").lower()
        self.options |= {key: stage or 0, "offload": place != "none"}
        if place == "nvme":
            self.notes.append("offload to nvme is audited as offload to cpu")
        self.clip(clipping)

    def clip(self, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            self.options["max_grad_norm"] = float(value)

    def precision(self, bf16: Any, fp16: Any) -> None:
        if truth(bf16):
            self.options["dtype"] = "bfloat16"
        if truth(fp16):
            self.notes.append("float16 needs a GPU; audited in float32")


def _table(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = found.get(key) or {}
    if not isinstance(value, Mapping):
        raise Broken(f"{key}: expected a table of settings, got {type(value).__name__}")
    return value


def _count(found: Mapping[str, Any], key: str, least: int = 1, most: int = 10**6) -> int | None:
    """Return a whole number, or None if the file leaves it open (missing, "auto" or a variable)."""
    value = found.get(key)
    number, open_ = whole(value), isinstance(value, str) and re.match(r"auto$|[$<{]", value.strip())
    if value is None or (number is None and open_):
        return None
    if number is None or not least <= number <= most:
        raise Broken(f"{key} = {value!r}: expected a whole number from {least} to {most}")
    return number


def read(path: Path) -> tuple[Subject, list[str]]:
    """Return the subject, with only the configuration that the file describes, and the notes. One in bfloat16 is there
    in float32 as well, in which less is hidden by rounding.

    Raises UserError if the file is missing, cannot be read or does not configure a known trainer.
    """
    try:
        found = _load(path)
        configured = _recognise(found, path)
        configured.unused += [key for key in CHANGES if found.get(key)]
    except Broken as error:
        raise UserError(f"--config {path}: {error}") from None
    _reduce(configured)
    subject = next(s for s in TABLE if s.name == configured.subject)
    loop = configured.subject in ("DeepSpeed", "accelerate", "OpenRLHF SFTTrainer")
    cases: tuple[str, ...] = ENGINE if loop else CASES
    if configured.options.get("assistant_only"):
        cases = ("chat",)
    elif configured.options.get("packing") or configured.options["accumulation"] < 3:
        cases = ("ragged", "unsplit")
    how: dict[str, Any] = {"options": configured.options, "documented": configured.documented, "only": cases}
    one = Configuration(world_size=configured.processes, unused=tuple(configured.unused), **how)
    needs = (*subject.needs, *configured.needs)
    wide = {key: value for key, value in one.options.items() if key != "dtype"}
    both = [one] if wide == one.options else [one, replace(one, options=wide)]
    return replace(subject, needs=needs, configurations=both), configured.notes


def _load(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--config: cannot read {path} ({why}); pass {EXPECTED}") from None
    parsers = dict.fromkeys((".yaml", ".yml"), past_files.parse_yaml)
    parsers |= dict.fromkeys(past_files.SCRIPTS, past_files.flags_of)
    try:
        found = parsers.get(path.suffix.lower(), past_files.parse_json)(text)
    except Broken as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(found, Mapping):
        raise UserError(f"--config {path}: expected a table of settings, got {type(found).__name__}")
    return found


def _recognise(found: Mapping[str, Any], path: Path) -> Configured:
    tables = [isinstance(found.get(k), Mapping) for k in ("optimizer", "bf16", "fp16")]
    plain = "train_batch_size" in found and any(tables)
    if plain or "zero_optimization" in found or "train_micro_batch_size_per_gpu" in found:
        return _deepspeed(Configured(subject="DeepSpeed"), found, "stage")
    if "distributed_type" in found:
        return _accelerate(found, path)
    if any(key in found for key in ("micro_train_batch_size", "train.micro_batch_size", "ds.zero_stage")):
        return _openrlhf(found)
    if any(key in found for key in ("per_device_train_batch_size", "gradient_accumulation_steps", *TRL_KEYS)):
        return _arguments(found, path)
    raise UserError(f"--config: {path} contains no setting of a known trainer; pass {EXPECTED}")


def _deepspeed(configured: Configured, found: Mapping[str, Any], stage_key: str) -> Configured:
    zero = _table(found, "zero_optimization")
    old = "cpu" if truth(zero.get("cpu_offload")) else "none"
    device = (_table(zero, "offload_optimizer") or {"device": old}).get("device")
    configured.zero(stage_key, _count(zero, "stage", 0, 3), device, found.get("gradient_clipping"))
    steps, total = _count(found, "gradient_accumulation_steps"), _count(found, "train_batch_size")
    configured.accumulate(steps, total, _count(found, "train_micro_batch_size_per_gpu"))
    configured.precision(_table(found, "bf16").get("enabled"), _table(found, "fp16").get("enabled"))
    if found.get("optimizer"):
        configured.notes.append("optimizer: audited with plain SGD")
    return configured


def _accelerate(found: Mapping[str, Any], path: Path) -> Configured:
    inner = _table(found, "deepspeed_config")
    kind = str(found["distributed_type"]).upper()
    under = kind == "DEEPSPEED"
    configured = Configured(subject="DeepSpeed" if under else "accelerate")
    if kind not in ("DEEPSPEED", "NO", "FALSE", "MULTI_CPU", "MULTI_GPU"):  # YAML reads NO as false
        note = "audited as accelerate's loop without it (see the subject torch FSDP2)"
        configured.notes.append(f"distributed_type {kind}: {note}")
    if under and inner.get("deepspeed_config_file"):
        _deepspeed(configured, _beside(str(inner["deepspeed_config_file"]), path), "stage")
    elif under:
        stage, device = _count(inner, "zero_stage", 0, 3), inner.get("offload_optimizer_device")
        configured.zero("stage", stage, device, inner.get("gradient_clipping"))
    key = "gradient_accumulation_steps"
    configured.accumulate(_count(inner if key in inner else found, key))
    configured.processes = whole(found.get("num_processes")) or 1
    if str(found.get("mixed_precision")).lower() not in ("none", "no", "false"):
        configured.notes.append(f"mixed_precision = {found['mixed_precision']}: audited in float32")
    return configured


def _openrlhf(found: Mapping[str, Any]) -> Configured:
    first = partial(past_files.first, found)
    configured = Configured(subject="OpenRLHF SFTTrainer", options=dict(LLAMA))
    configured.options["stage"] = whole(first("zero_stage", "ds.zero_stage")) or 2
    configured.options["offload"] = bool(truth(first("adam_offload", "ds.adam_offload")))
    total = whole(first("train_batch_size", "train.batch_size"))
    configured.accumulate(None, total, whole(first("micro_train_batch_size", "train.micro_batch_size")))
    if truth(first("bf16", "ds.bf16")) or "bf16" in str(first("param_dtype", "ds.param_dtype")):
        configured.notes.append("bf16: audited in float32")
    return configured


def _arguments(found: Mapping[str, Any], path: Path) -> Configured:
    """Read TrainingArguments, TRL's SFTConfig or LLaMA-Factory's YAML, with or without DeepSpeed."""
    inner = found.get("deepspeed")
    if isinstance(inner, str) and inner.strip():
        inner = _beside(inner, path)
    trl = any(key in found for key in TRL_KEYS)
    factory = any(key in found for key in FACTORY_KEYS)
    name = "LLaMA-Factory" if factory else "TRL SFTTrainer" if trl else "transformers Trainer"
    name += " + DeepSpeed" if inner and not factory else ""
    configured = Configured(subject=name, options=dict(LLAMA))
    if inner:
        configured.needs = ("deepspeed",)
        _deepspeed(configured, _table({"deepspeed": inner}, "deepspeed"), "zero_stage")
    for key in ("packing", "assistant_only_loss"):
        if truth(found.get(key)):
            configured.options[key.removesuffix("_loss")] = True
    configured.accumulate(_count(found, "gradient_accumulation_steps"))
    if "max_grad_norm" in found:
        configured.clip(found["max_grad_norm"])
    else:
        configured.options.setdefault("max_grad_norm", None)  # the framework's own default
    for key in ("label_smoothing_factor", "loss_type"):
        if found.get(key):
            configured.options[key] = found[key]
    if truth(found.get("average_tokens_across_devices")) is False:
        configured.options["average_tokens_across_devices"] = False
        configured.documented = "average_tokens_across_devices = false"
        configured.processes = 2
        configured.notes.append("audited on 2 processes, since averaging has no effect on one process")
    configured.precision(found.get("bf16"), found.get("fp16"))
    if left_out := [key for key in NOT_TAKEN_OVER if found.get(key)]:
        configured.notes.append(f"{', '.join(left_out)}: not used; audited with plain SGD")
    return configured


def _beside(name: str, path: Path) -> Mapping[str, Any]:
    """Load the file ``name``, whose path is relative to the file ``path`` or to the current directory."""
    near = path.parent / name
    return _load(near if near.is_file() else Path(name))


def _reduce(configured: Configured) -> None:
    """Reduce a configuration to what runs on a CPU in seconds and still shows every pattern."""
    asked = configured.options.get("accumulation")
    if not asked:
        configured.options["accumulation"] = 4
        configured.notes.append("the file does not say how many micro-batches a step has; audited with 4")
    elif asked > MOST_MICROBATCHES:
        configured.options["accumulation"] = MOST_MICROBATCHES
        configured.notes.append(f"{asked} micro-batches per step are audited as {MOST_MICROBATCHES}")
    if configured.processes > 2:
        configured.notes.append(f"{configured.processes} processes are audited as 2")
    configured.processes = min(2, configured.processes)
