"""A whole run in a second: a model of a few thousand parameters, one-token-a-character sums, SFT and then
RL."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import signals
from truestep.checkpoint.store import load_latest
from truestep.pipeline.prepare import Prepared, prepare
from truestep.pipeline.run import open_run_folder
from truestep.pipeline.run import run as run_pipeline
from truestep.settings import load_settings
from truestep.signals import Interrupted
from truestep.train.parallel import Ranks

RECIPE = """
name = "tiny"

[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 }

[compute]
threads = 1

[data.train]
source = "train.jsonl"

[data.test]
source = "procedural:addition"
split = "test"
limit = 2
options = { digits = 1 }

[[stages]]
kind = "sft"
data = "train"
steps = 14
sequences_per_step = 8
tokens_per_microbatch = 40
save_every = 6
optimizer = { lr = 2e-2, schedule = "cosine", warmup_fraction = 0.2 }

[[stages]]
kind = "rl"
data = "train"
steps = 5
prompts_per_step = 4
samples_per_prompt = 4
tokens_per_microbatch = 40
save_every = 2
optimizer = { lr = 5e-3 }
sampling = { max_new_tokens = 3, max_running = 6 }

[evaluate]
data = ["test"]
sampling = { max_new_tokens = 2, temperature = 0.6 }
"""

# An evaluation of a model on data of its own; {model} is a path relative to the recipe.
EVALUATION = """
name = "tiny"
[model]
path = "{model}"
[compute]
threads = 1
[data.test]
source = "procedural:addition"
split = "test"
limit = 4
options = {{ digits = 1 }}
[evaluate]
data = ["test"]
samples_per_problem = 2
sampling = {{ max_new_tokens = 2, temperature = 0.6 }}
"""


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None:
        self.said.append(what)

    def advance(self, done: int, note: str = "") -> None:
        pass


def write_recipe(folder: Path) -> Path:
    """Sums whose worked answer is right half of the time, so that a group of samples is soon mixed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        f'{{"id": "q{i}", "problem": "{i}+{j}", "answer": "{j % 2}", "checker": "exact", "solution": "{i % 2}"}}'
        for i, j in ((i, (i * 7) % 4) for i in range(12))
    ]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    path = folder / "run.toml"
    path.write_text(RECIPE)
    return path


def prepared(recipe: Path, *overrides: str) -> Prepared:
    return prepare(load_settings(recipe, overrides), base_dir=recipe.parent)


def go(made: Prepared, folder: Path, *, resume: bool = False) -> Silent:
    """What the command line does, without its signal handlers."""
    open_run_folder(made, folder, resume=resume, rank=0)
    reporter = Silent()
    run_pipeline(made, folder, ranks=Ranks(), reporter=reporter)
    return reporter


# ----------------------------------------------------------------------------------------------- interruption

# Where a signal is looked for, by the function that is on the stack.
PLACES = {
    "_stop_together": "step",
    "train_step": "micro-batch",
    "with_proximal": "proximal",
    "take": "decode",
    "record": "evaluate",
    "begin": "decode",
    "_sums": "validation",
}


@dataclass
class Alarm:
    """Stands for the list of pending signals: it stays empty until it has been looked at ``ring_at``
    times."""

    ring_at: int = sys.maxsize
    looks: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_name not in PLACES:
            frame = frame.f_back
        self.looks.append(PLACES[frame.f_code.co_name] if frame is not None else "?")
        return len(self.looks) > self.ring_at

    def __getitem__(self, index: int) -> int:
        return 2  # SIGINT


def interrupted_at(monkeypatch: pytest.MonkeyPatch, ring_at: int) -> Alarm:
    alarm = Alarm(ring_at)
    monkeypatch.setattr(signals, "_pending", alarm)
    return alarm


# ----------------------------------------------------------------------------------------------- what is left


def assert_continues(
    made: Prepared, whole: Path, places: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that are stopped at one of the places, and resumed, have the bytes of the whole run."""
    for at in places:
        folder = whole.parent / f"stopped-{at}"
        with monkeypatch.context() as patch:
            interrupted_at(patch, at)
            with pytest.raises(Interrupted):
                go(made, folder)
        go(made, folder, resume=True)
        assert differing(fingerprint(folder), fingerprint(whole)) == []


def fingerprint(folder: Path) -> dict[str, str]:
    """Everything of a finished run that must not depend on where it was interrupted, as hashes by name."""
    found: dict[str, str] = {}
    for stage in sorted((folder / "stages").iterdir()):
        for name in ("metrics.jsonl", "rollouts.jsonl", "export/model.safetensors"):
            found[f"{stage.name}/{name}"] = hashlib.sha256((stage / name).read_bytes()).hexdigest()
        last = load_latest(stage / "checkpoints", warn=lambda text: None)
        assert last is not None
        for group, tensors in last.tensors.items():
            for key, tensor in tensors.items():
                found[f"{stage.name}/{group}/{key}"] = _digest(tensor)
        found[f"{stage.name}/step"] = str(last.step)
    for path in sorted((folder / "evaluations").rglob("*.samples.jsonl")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw).hexdigest()


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())
