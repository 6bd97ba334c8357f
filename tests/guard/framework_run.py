"""Runs a training loop with the guard and without it, in one process, and compares what was trained.

Run as ``python framework_run.py MODULE,MODULE OUTPUT NAME...`` in every rank. Every loop is a function of a ``Run``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from leave import leave

LENGTHS = (2, 27, 3, 17, 40, 5, 22, 9, 33, 4, 14, 30, 6, 19, 36, 11, 25, 7, 44, 13, 8, 12, 28, 38)
IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LOOPS: dict[str, tuple[Callable[[Run], Any], dict[str, Any]]] = {}
Row = dict[str, list[int]]


class Run:
    """One run of one loop."""

    def __init__(self, folder: Path, is_guarded: bool) -> None:
        self.folder, self.is_guarded = folder, is_guarded
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.guard: Any = None
        self.callback: Any = None
        self.records: list[dict[str, Any]] = []
        self.failure = ""
        self.notes: dict[str, Any] = {}

    def watch(self, model: Any, optimizer: Any = None, **options: Any) -> Any:
        """Return a guard, or an object that does nothing."""
        if not self.is_guarded:
            return contextlib.nullcontext(_Nothing())
        from truestep.guard import guard

        self.guard = guard(model, optimizer, **{"every": 1, **options})
        return self.guard

    def callbacks(self, **options: Any) -> list[Any]:
        if not self.is_guarded:
            return []
        from truestep.guard import TruestepGuard

        self.callback = TruestepGuard(**{"every": 1, **options})
        return [self.callback]

    def end(self) -> None:
        found = self.guard or (self.callback and self.callback.guard)
        if found is not None:
            self.records, self.failure = list(found.records), found.failure
        elif self.is_guarded:
            self.failure = "the guard was never made"


class _Nothing:
    def step(self) -> None:
        pass


def loop(**about: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a loop, with what is expected of it: ``verdict``, ``code`` (all codes that may be found, the main
    one first), ``at`` (the first step with it), ``sees_tokens`` and ``scale`` (of the loss, in each step); and with
    ``ranks``, ``dtype`` and ``slow``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LOOPS[about.pop("name", function.__name__)] = (function, about)
        return function

    return register


def rows(count: int = 24) -> list[Row]:
    """Return rows of a prompt of four tokens and an answer that ends in the stop token."""
    random = torch.Generator().manual_seed(1)
    made = []
    for length in (LENGTHS * 3)[:count]:
        ids = torch.randint(3, 64, (length + 4,), generator=random).tolist()
        ids[-1] = 2
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 4 + ids[4:]})
    return made


def collate(batch: Sequence[Row]) -> dict[str, torch.Tensor]:
    longest, filler = max(len(r["input_ids"]) for r in batch), {"labels": -100}
    return {
        k: torch.tensor([r[k] + [filler.get(k, 0)] * (longest - len(r[k])) for r in batch])
        for k in ("input_ids", "attention_mask", "labels")
    }


def llama(**more: Any) -> Any:
    import transformers

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    size = {"intermediate_size": 64, "max_position_embeddings": 256}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**IDS, **settings, **size, **more}))


def steps_of(
    run: Run, steps: int, accumulation: int, size: int = 1
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield this rank's micro-batches of each step."""
    all_rows = rows(72)
    batches = [collate(all_rows[i : i + size]) for i in range(0, len(all_rows), size)][run.rank :: run.world]
    for number in range(steps):
        yield batches[number * accumulation : (number + 1) * accumulation]


def token_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return −Σ log p of the trained tokens."""
    wide = logits[:, :-1].float().transpose(1, 2)
    return torch.nn.functional.cross_entropy(wide, labels[:, 1:], ignore_index=-100, reduction="sum")


def trained(run: Run, micro: Sequence[dict[str, torch.Tensor]]) -> float:
    """Return the trained tokens of a step over all ranks, per rank: DDP takes the mean over ranks."""
    each = [int((m["labels"][:, 1:] != -100).sum()) for m in micro]
    run.notes.setdefault("tokens", []).append(each)
    count = torch.tensor(float(sum(each)))
    if run.world > 1:
        torch.distributed.all_reduce(count)
    return float(count) / run.world


def digest(parameters: Any) -> str:
    """Return a hash of all bits of the parameters."""
    made = hashlib.sha256()
    for one in parameters:
        part = one.detach()
        part = part.full_tensor() if hasattr(part, "full_tensor") else part
        made.update(
            part.contiguous().view(torch.uint8).numpy().tobytes() if part.dim() else part.numpy().tobytes()
        )
    return made.hexdigest()[:16]


def both(name: str, folder: Path) -> dict[str, Any]:
    """Run a loop without and with the guard. It returns the parameters, or their digest."""
    function, about = LOOPS[name]
    said: dict[str, Any] = {"name": name, **about}
    values, began = [], time.perf_counter()
    for is_guarded in (False, True):
        run = Run(folder / f"{name}-{is_guarded}", is_guarded)
        given = inspect.signature(function).parameters
        try:
            random = torch.get_rng_state()
            result = function(run, **{k: v for k, v in about.items() if k in given})
            values.append(result if isinstance(result, str) else digest(result))
            torch.set_rng_state(random)
        except Exception as error:  # noqa: BLE001 (a crash is a result)
            traceback.print_exc(limit=-4)
            return {
                **said,
                "crash": f"{'with' if is_guarded else 'without'}: {type(error).__name__}: {error}"[:400],
            }
        finally:
            torch.compiler.reset()
            run.end()
    return {**said, "bit_equal": values[0] == values[1], "hash": values[0], "failure": run.failure,
            "records": run.records, "notes": run.notes,
            "seconds": time.perf_counter() - began}  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.modules["framework_run"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    modules, output, *names = sys.argv[1:]
    for module in modules.split(","):
        importlib.import_module(module)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    versions = {}
    for package in ("torch", "transformers", "accelerate", "trl", "peft", "deepspeed", "openrlhf", "llamafactory",
                    "axolotl", "liger-kernel"):  # fmt: skip
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(f"{output}.{os.environ.get('RANK', '0')}", "w") as file,
    ):
        for name in names:
            print(f"== {name}", file=sys.stderr, flush=True)
            found = both(name, Path(folder))
            file.write(json.dumps({**found, "versions": versions}) + "\n")
            file.flush()
    if torch.distributed.is_initialized():
        leave()


if __name__ == "__main__":
    main()
