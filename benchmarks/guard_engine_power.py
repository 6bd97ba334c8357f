"""Measure after how many updates the guard names a frozen engine, and how often it accuses a fresh one.

    python benchmarks/guard_engine_power.py [--seeds 3] [--updates 200] [--out results/guard_engine_power.json]

A random Llama (6 layers, hidden size 128) is trained by AdamW on random policy-gradient-like signs, in float32.
Two engines are read after 0, 1, 2, 5, 10, 20, 50, 100 and 200 updates: a
frozen copy of the start, and one with the newest weights, each in
float32 or bfloat16. "grid" models start from weights that are exactly representable in bfloat16, as if loaded
from such a file. "trainer" is the precision of the trainer's matrix products (bfloat16: autocast). The engine's
allowed lag is 0. Prints a table; every seed is a row of the JSON file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from truestep.guard.engine import EngineCheck, Version
from truestep.guard.engine_read import logprobs
from truestep.guard.tokens import Batch
from truestep.rundir import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
RATES, TOKENS, DTYPES = (1e-6, 1e-5, 1e-4, 1e-3), (256, 1024, 4096), (torch.float32, torch.bfloat16)
CHECKED = (1, 2, 5, 10, 20, 50, 100)  # updates; and the last
WIDTH = 256  # tokens that each probe sequence adds
CPU = torch.device("cpu")


def llama(seed: int, *, on_grid: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    return model.to(torch.bfloat16).float() if on_grid else model


class Trainer:
    """Takes one update of AdamW at a time; the loss has signed weights of sequences, as in RL."""

    def __init__(self, model: Any, seed: int, rate: float, *, autocast: bool) -> None:
        self.model, self.random = model, torch.Generator().manual_seed(seed + 1000)
        self.rows = torch.randint(3, 256, (8, 33), generator=self.random)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        self.autocast = autocast
        if autocast:
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)

    def update(self) -> None:
        rows = self.rows[torch.randperm(8, generator=self.random)[:2]]
        sign = torch.randn(2, generator=self.random)
        logits = self.model(rows).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        (loss * sign[:, None]).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Readings:
    """Log-probabilities of all probe sequences, read once for each state of the weights and each precision."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences
        self.now: list[list[float]] = []

    def of(self, model: Any) -> list[list[float]]:
        values, _ = logprobs(model, self.sequences, CPU)
        return values.reshape(len(self.sequences), -1).tolist()


def one_run(seed: int, rate: float, *, on_grid: bool, autocast: bool, updates: int) -> list[dict[str, Any]]:
    """Return a row for each precision of the engine and number of tokens."""
    model = llama(seed, on_grid=on_grid)
    random = torch.Generator().manual_seed(seed)
    sequences = torch.randint(3, 256, (max(TOKENS) // WIDTH, WIDTH + 1), generator=random).tolist()
    start, trainer = copy.deepcopy(model), Trainer(model, seed, rate, autocast=autocast)
    read = Readings(sequences)
    frozen = {dtype: read.of(copy.deepcopy(start).to(dtype)) for dtype in DTYPES}
    cells: dict[Any, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for dtype, tokens in itertools.product(DTYPES, TOKENS):
        for kind in ("frozen", "fresh"):
            check = EngineCheck(
                lambda ids, kind=kind, dtype=dtype: current[kind, dtype][: len(ids)], model, lag=0, tokens=tokens
            )  # fmt: skip
            cells[dtype, tokens, kind] = {"check": check, "found": None, "alarms": 0, "right": 0, "checks": 0}
    batches = [Batch(ids=torch.tensor(sequences))]
    for version in range(updates + 1):
        if version:
            trainer.update()
        if version not in (0, updates, *CHECKED):
            continue
        trained, narrow = logprobs(model, sequences, CPU)
        for dtype in DTYPES:
            engine = copy.deepcopy(model).to(dtype) if dtype is not torch.float32 else model
            engine.__dict__.pop("forward", None)  # the autocast of the trainer
            same = engine is model and not autocast
            now = trained.reshape(len(sequences), -1).tolist() if same else read.of(engine)
            current["fresh", dtype], current["frozen", dtype] = now, frozen[dtype]
            if autocast and engine is model:
                model.forward = torch.autocast("cpu", torch.bfloat16)(type(model).forward.__get__(model))
        for (_, tokens, kind), cell in cells.items():
            if kind == "frozen" and cell["found"] is not None:
                continue
            seen = checked(cell["check"], version, batches, trained[:tokens], narrow)
            cell["checks"] += 1
            stale = any(c.code == "stale_engine" for c in seen.causes)
            if kind == "frozen":
                cell["found"] = version if stale else None
            cell["alarms"] += int(stale)
            cell["right"] += int(not stale and not seen.notes and version > 0)
    return [
        {
            "seed": seed, "rate": rate, "grid": on_grid, "trainer": "bfloat16" if autocast else "float32",
            "engine": str(dtype).removeprefix("torch."), "tokens": tokens,
            "frozen_found_after": cells[dtype, tokens, "frozen"]["found"],
            "fresh_checks": cells[dtype, tokens, "fresh"]["checks"],
            "fresh_right": cells[dtype, tokens, "fresh"]["right"],
            "fresh_alarms": cells[dtype, tokens, "fresh"]["alarms"],
        }
        for dtype, tokens in itertools.product(DTYPES, TOKENS)
    ]  # fmt: skip


def checked(check: EngineCheck, version: int, batches: list[Batch], trained: np.ndarray, narrow: bool) -> Any:
    """Return what the check says, with the trainer's log-probabilities read before."""

    def read(number: int) -> None:
        check.is_narrow = narrow
        check.history.append(Version(number, trained))

    check._read = read  # type: ignore[method-assign]
    return check.before_step(version, lambda step: True, batches)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "guard_engine_power.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    for rate, (on_grid, autocast) in itertools.product(
        given.rates, ((False, False), (True, False), (True, True))
    ):
        for seed in range(given.seeds):
            rows += one_run(seed, rate, on_grid=on_grid, autocast=autocast, updates=given.updates)
            print(f"{time.monotonic() - began:.0f} s: rate {rate:g}, seed {seed}", flush=True)
    print(table(rows, given.updates))
    head = {"commit": provenance(0)["commit"], "command": "python benchmarks/guard_engine_power.py",
            "seeds": list(range(given.seeds)), "updates": given.updates, "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip
    write_json(given.out, {**head, "rows": rows})


def table(rows: list[dict[str, Any]], updates: int) -> str:
    lines = [
        "rate     grid  trainer  engine    tokens  frozen named after (median, range)  false alarms / checks  right"
    ]
    keys = ("rate", "grid", "trainer", "engine", "tokens")
    for key, group in itertools.groupby(rows_sorted(rows, keys), key=lambda r: tuple(r[k] for k in keys)):
        cells = list(group)
        found = [updates + 1 if r["frozen_found_after"] is None else r["frozen_found_after"] for r in cells]
        shown = [
            f">{updates}" if f > updates else f"{f:g}"
            for f in (statistics.median(found), min(found), max(found))
        ]
        alarms, checks, right = (sum(r["fresh_" + n] for r in cells) for n in ("alarms", "checks", "right"))
        rate, grid, trainer, engine, tokens = key
        lines.append(
            f"{rate:<8g} {'yes' if grid else 'no':5} {trainer:8} {engine:9} {tokens:<7} "
            f"{shown[0]:>6} ({shown[1]}–{shown[2]}) {'':15} {alarms} / {checks:<6} {right}"
        )
    return "\n".join(lines)


def rows_sorted(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: tuple(row[k] for k in keys))


if __name__ == "__main__":
    main()
