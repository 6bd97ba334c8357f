"""Reads versions and settings from a lock file or the files of a past run (text, JSON, TOML and plain YAML).

Pickles are not opened and links are not followed; a file that is too large or broken is named, not read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truestep.audit.postmortem.measured import KEYS, load
from truestep.audit.postmortem.pins import LOCKS, Broken, Pins, command_lines, of_lock, of_text, parse_json
from truestep.errors import UserError
from truestep.redaction import redact

PACKAGES = frozenset(m.package for m in load())
TRAINER = "transformers Trainer"
# argument that only one kind of trainer has → that trainer, which is also a transformers Trainer
MARKS = {
    "num_generations": "TRL GRPOTrainer",
    "dataset_text_field": "TRL SFTTrainer",
    "finetuning_type": "LLaMA-Factory",
}
SCRIPTS = (".sh", ".bash", ".slurm", ".sbatch", ".cmd", ".txt", ".dockerfile")
IMAGES = ("Dockerfile", "Containerfile")
SKIPPED = {".git", "__pycache__", "node_modules", "site-packages", ".venv", "venv"}
MOST_FILES, MOST_BYTES = 100_000, 256 << 20
LIMITS = {".json": 1 << 20, ".yaml": 1 << 18, ".yml": 1 << 18, "lock": 8 << 20}  # bytes; else 1 MiB
# A JSON or YAML file without any of these words is not relevant here, and is not parsed.
WORDS = (
    "zero_optimization", "gradient_accumulation_steps", "per_device_train_batch_size", "average_tokens_across_devices",
    "train_micro_batch_size_per_gpu", "train_batch_size", "distributed_type", "deepspeed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Values, each with the first file that gives it, for ``words.SETTINGS``, batch sizes and the trainer."""

    versions: dict[str, dict[str, str]] = field(default_factory=dict)  # package → version → file
    ranges: dict[str, str] = field(default_factory=dict)  # package → the line that requires it, without a pin
    complete: dict[str, int] = field(default_factory=dict)  # file that pins an environment → its packages
    settings: dict[str, dict[Any, str]] = field(default_factory=dict)  # name → value → file
    problems: list[str] = field(default_factory=list)
    deepspeed: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # file → its whole configuration
    named: dict[str, str] = field(default_factory=dict)  # path of such a file → the file that refers to it

    def add(self, key: str, value: Any, file: str) -> None:
        if value is not None:
            self.settings.setdefault(key, {}).setdefault(value, file)

    def only(self, key: str) -> Any:
        """Return the value if there is exactly one, else None."""
        found = list(self.settings.get(key, {}))
        return found[0] if len(found) == 1 else None


def gather(path: Path) -> Evidence:
    """Read one file, or all files of a run's folder. Raises UserError if there is no such path."""
    evidence = Evidence()
    if path.is_file():
        folder, files = path.parent, [(path, path.stat().st_size)]
    elif path.is_dir():
        folder, files = path, list(_files(path, evidence))
    else:
        raise UserError(
            f"{path} does not exist; pass a lock file, or the directory with the files of a past run"
        )
    states = set()
    for file, size in sorted(files, key=lambda entry: entry[0].name == "config.json"):  # config.json last
        name = str(file.relative_to(folder))
        try:
            if file.name == "trainer_state.json":
                _state(file, name, evidence)
                states.add(file.parent)
            elif file.name != "config.json":
                _read(file, size, name, evidence)
            elif file.parent in states:  # written by the run; elsewhere, by the model's author
                _model(file, name, evidence)
        except (Broken, OSError) as error:
            evidence.problems.append(f"{name}: {getattr(error, 'strerror', error)}")
    _choose_deepspeed(evidence)
    _work_out_accumulation(evidence)
    return evidence


def _files(folder: Path, evidence: Evidence) -> Iterator[tuple[Path, int]]:
    """Yield regular files with their sizes, sorted by name, but not more than can be read in seconds."""
    count, total, told = 0, 0, evidence.problems
    for root, folders, names in os.walk(folder, onerror=lambda e: told.append(f"{e.filename}: {e.strerror}")):
        folders[:] = sorted(f for f in folders if f not in SKIPPED)
        for name in sorted(names):
            path = Path(root) / name
            count += 1
            try:
                status = path.lstat()
            except OSError:
                continue
            known = path.suffix.lower() in (*LIMITS, *SCRIPTS) or name in LOCKS or name.startswith(IMAGES)
            if not known or not stat.S_ISREG(status.st_mode):
                continue
            total += status.st_size if status.st_size <= _limit(path) else 0
            if count > MOST_FILES or total > MOST_BYTES:
                told.append(f"stopped at {path.relative_to(folder)}; pass the directory of one run")
                return
            yield path, status.st_size


def _is_lock(path: Path) -> bool:
    return path.name in LOCKS or path.suffix == ".lock"


def _limit(path: Path) -> int:
    return LIMITS["lock"] if _is_lock(path) else LIMITS.get(path.suffix.lower(), 1 << 20)


def _read(path: Path, size: int, name: str, evidence: Evidence) -> None:
    if size > _limit(path):
        # Say nothing about a large tokenizer or data set, unless it begins like a configuration.
        if _is_lock(path) or any(word in _head(path) for word in WORDS):
            raise Broken(f"larger than {_limit(path) >> 10} KiB, not read")
        return
    text = path.read_bytes().decode("utf-8", "replace")
    parse = {".json": parse_json, ".yaml": parse_yaml, ".yml": parse_yaml}.get(path.suffix.lower())
    if _is_lock(path):
        _pinned(of_lock(text), name, evidence)
    elif parse is None or (parse is parse_yaml and "dependencies:" in text):
        _pinned(of_text(text), name, evidence)
        if parse is None:
            _commands(text, name, evidence)
    elif any(word in text for word in WORDS):
        _mapping(parse(text), name, evidence)


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1 << 16).decode("utf-8", "replace")


def _state(path: Path, name: str, evidence: Evidence) -> None:
    """Record that the Trainer was used, because only the Trainer writes this file."""
    if '"global_step"' not in _head(path):
        raise Broken("not a trainer state: global_step is missing at its beginning")
    evidence.add("trainer", TRAINER, name)


def parse_yaml(text: str) -> Any:
    """Parse plain YAML, if pyyaml is installed. Raises Broken."""
    try:
        yaml: Any = importlib.import_module("yaml")  # nothing else here needs it
    except ModuleNotFoundError:
        raise Broken("not read: YAML needs the pyyaml package; run pip install pyyaml") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Broken(f"not valid YAML: {redact(' '.join(str(error).split()))[:200]}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Broken(f"not valid YAML: {type(error).__name__}") from None


def _version(package: str, version: Any, file: str, evidence: Evidence) -> None:
    if package in PACKAGES and isinstance(version, str):
        evidence.versions.setdefault(package, {}).setdefault(version, file)


def _pinned(pins: Pins, name: str, evidence: Evidence) -> None:
    for package, version in pins.versions:
        _version(package, version, name, evidence)
    for package in PACKAGES & pins.ranges.keys():
        evidence.ranges.setdefault(package, f"{name}: {pins.ranges[package]}")
    if pins.whole:
        evidence.complete[name] = pins.whole


def _model(path: Path, name: str, evidence: Evidence) -> None:
    if path.lstat().st_size > LIMITS[".json"]:
        raise Broken(f"larger than {LIMITS['.json'] >> 10} KiB, not read")
    found = parse_json(path.read_bytes().decode("utf-8", "replace"))
    if isinstance(found, Mapping):
        _version("transformers", found.get("transformers_version"), name, evidence)
        classes = found.get("architectures")
        evidence.add("architecture", str(classes[0]) if isinstance(classes, list) and classes else None, name)


def whole(value: Any) -> int | None:
    """Return a whole number from a file or a command line; None for auto, a variable or anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if 0 <= value < 1e9 and value == int(value) else None
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()) else None


def truth(value: Any) -> bool | None:
    """Return a truth value from a file or a command line, or None for any other value."""
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(_word(value))


def _plain(value: Any) -> bool | float | str | None:
    """Return an argument's value; None if it is none of a truth value, a number or a word."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
        known = truth(value)
        return value if known is None else known
    return value if isinstance(value, bool | int | float) else None


def _word(value: Any) -> str:
    """Return a name in lower case. True and False become yes and no, since YAML reads a bare NO as false."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.lower() if isinstance(value, str) else ""


def _mapping(found: Any, name: str, evidence: Evidence) -> None:
    """Read a configuration of any known tool."""
    if not isinstance(found, Mapping):
        return
    # Trackers wrap every value in a separate object.
    found = {k: v["value"] if isinstance(v, Mapping) and "value" in v else v for k, v in found.items()}
    if "distributed_type" in found and ("num_processes" in found or "compute_environment" in found):
        _accelerate(found, name, evidence)
    elif "zero_optimization" in found or "train_micro_batch_size_per_gpu" in found:
        evidence.deepspeed[name] = found
    else:
        _arguments(found, name, evidence)


def _arguments(found: Mapping[str, Any], name: str, evidence: Evidence) -> None:
    """Read TrainingArguments, or a file whose settings are passed on to them."""
    if "per_device_train_batch_size" in found:
        evidence.add("trainer", TRAINER, name)
    for mark in MARKS.keys() & found.keys():
        evidence.add("trainer", TRAINER, name)
        evidence.add("trainer", MARKS[mark], name)
    evidence.add("accumulation", whole(found.get("gradient_accumulation_steps")), name)
    for key in KEYS.values():
        if key.argument and key.argument in found:
            evidence.add(key.setting, _plain(found[key.argument]), name)
    _embedded(found.get("deepspeed"), name, evidence)


def _embedded(value: Any, name: str, evidence: Evidence) -> None:
    """Read a DeepSpeed configuration inside another file, or note the path of one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_json(value)
    if isinstance(value, Mapping):
        _deepspeed(value, name, evidence)
        evidence.named.setdefault("", name)
    elif isinstance(value, str) and value.lower() not in ("", "null", "none", "true", "false"):
        evidence.named.setdefault(value, name)


def _accelerate(found: Mapping[str, Any], name: str, evidence: Evidence) -> None:
    kind = _word(found["distributed_type"])
    evidence.add("processes", 1 if kind == "no" else whole(found.get("num_processes")), name)
    inner = found.get("deepspeed_config")
    if kind != "deepspeed":
        evidence.add("zero_stage", 0, name)
    elif isinstance(inner, Mapping):
        evidence.add("zero_stage", whole(inner.get("zero_stage")), name)
        evidence.add("offload", _word(inner.get("offload_optimizer_device")) or None, name)
        evidence.add("accumulation", whole(inner.get("gradient_accumulation_steps")), name)
        file = inner.get("deepspeed_config_file")
        evidence.named.setdefault(file if isinstance(file, str) else "", name)


def _deepspeed(found: Mapping[str, Any], name: str, evidence: Evidence) -> None:
    zero = found.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        evidence.add("zero_stage", whole(zero.get("stage", 0)), name)
        old = "cpu" if zero.get("cpu_offload") is True else "none"
        offload = zero.get("offload_optimizer") or {"device": old}
        if isinstance(offload, Mapping):
            evidence.add("offload", _word(offload.get("device") or "none") or None, name)
    steps = whole(found.get("gradient_accumulation_steps"))
    evidence.add("accumulation", steps, name)
    if steps is None:
        evidence.add("batch_size", whole(found.get("train_batch_size")), name)
        evidence.add("micro_batch_size", whole(found.get("train_micro_batch_size_per_gpu")), name)


def _choose_deepspeed(evidence: Evidence) -> None:
    """Use the DeepSpeed configurations that a run names, or all of them if none is named."""
    if not evidence.named:
        for name, found in evidence.deepspeed.items():
            _deepspeed(found, name, evidence)
    for wanted, by in evidence.named.items():
        fitting = [name for name in evidence.deepspeed if wanted and Path(name).name == Path(wanted).name]
        for name in fitting:
            _deepspeed(evidence.deepspeed[name], name, evidence)
        if wanted and not fitting:
            why = "which is not in the folder or cannot be read"
            evidence.problems.append(f"{by} names {wanted[:200]}, {why}")


def _work_out_accumulation(evidence: Evidence) -> None:
    """Compute the accumulation from the batch sizes and the processes, if no file gives it."""
    batch, micro, processes = (evidence.only(k) for k in ("batch_size", "micro_batch_size", "processes"))
    if not evidence.settings.get("accumulation") and batch is not None and micro and processes:
        file = f"{batch} / ({micro} × {processes}), {next(iter(evidence.settings['batch_size'].values()))}"
        evidence.add("accumulation", max(1, batch // (micro * processes)), file)


def _commands(text: str, name: str, evidence: Evidence) -> None:
    """Read every line that starts a training run; a backslash continues a line."""
    for line in command_lines(text) if "--" in text or "verl.trainer" in text else ():
        if found := re.search(r"\bverl\.trainer\.(\w+)", line):
            evidence.add("trainer", f"verl {found[1]}", name)
        flags = _flags(line)
        per_node = first(flags, "nproc_per_node", "num_gpus", "num_processes")
        nodes = first(flags, "nnodes", "num_nodes")
        if whole(per_node) and (nodes is None or whole(nodes)):
            total = (whole(per_node) or 1) * (1 if "num_processes" in flags else whole(nodes) or 1)
            evidence.add("processes", total, name)
        trainer = re.search(r"train_(\w+)", line)
        if trainer and "openrlhf" in line.lower():
            evidence.add("trainer", f"OpenRLHF {trainer[1]}", name)
            evidence.add("zero_stage", whole(first(flags, "zero_stage", "ds.zero_stage")), name)
            offloads = first(flags, "adam_offload", "ds.adam_offload")
            evidence.add("offload", "cpu" if offloads else "none", name)
            evidence.add("batch_size", whole(first(flags, "train_batch_size", "train.batch_size")), name)
            micro = first(flags, "micro_train_batch_size", "train.micro_batch_size")
            evidence.add("micro_batch_size", whole(micro), name)
            evidence.named.setdefault("", name)
        elif flags:
            _arguments(flags, name, evidence)


def _flags(line: str) -> dict[str, str]:
    """Return a command line's flags (--name value, --name=value, --name). The last value of each counts."""
    words = [word.strip("\"'") for word in line.split()]
    flags = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            flags[key.replace("-", "_")] = value if equals else "" if after.startswith("--") else after
    return {key: value or "true" for key, value in flags.items()}


def flags_of(text: str) -> dict[str, str]:
    """Return the flags of all lines of a script."""
    return {key: value for line in command_lines(text) for key, value in _flags(line).items()}


def first(flags: Mapping[str, Any], *names: str) -> Any:
    return next((flags[name] for name in names if name in flags), None)
