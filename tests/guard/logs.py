"""Logs of real guarded runs of a tiny model, and logs that are made up to be large or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from truestep.guard import Guard, guard

LENGTHS = (2, 27, 3, 17)  # trained tokens of the micro-batches
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>\u202e\x1b[2J"\'& ' + "w" * 90


class ToyModel(nn.Module):
    """A model without attention, with several linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden)


def train(
    log: Path | None,
    fault: str = "",
    *,
    steps: int = 4,
    lengths: tuple[int, ...] = LENGTHS,
    close: bool = True,
    **options: Any,
) -> Guard:
    """Train with "" (no fault), "mean of means" or "dropped" (only the first and last micro-batch). ``close=False``
    leaves the log as after a kill."""
    torch.manual_seed(0)
    model = ToyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch = guard(model, optimizer, log=log, **{"every": 2, "accumulation": len(lengths), **options})
    random = torch.Generator().manual_seed(1)
    total = sum(lengths)
    for _ in range(steps):
        for k, length in enumerate(lengths):
            ids = torch.randint(3, 64, (1, length + 1), generator=random)
            loss = cross_entropy(model(input_ids=ids)[0, :-1], ids[0, 1:], reduction="sum")
            kept = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            (loss / (length * len(lengths) if fault == "mean of means" else total)).backward()
            if fault == "dropped" and 0 < k < len(lengths) - 1:
                for name, parameter in model.named_parameters():
                    parameter.grad = kept[name]
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
    if close:
        watch.close()
    return watch


def header(**more: Any) -> dict[str, Any]:
    return {
        "schema": 1, "kind": "run", "time": "2026-01-02T03:04:05Z", "truestep": "0.1.0", "torch": "2.13.0",
        "packages": {"transformers": "5.19.0"}, "model": "Qwen3ForCausalLM", "parameters": 7_615_616_512,
        "tensors": 339, "linear": 196, "watched": [f"model.layers.{i}.self_attn.k_proj" for i in range(6)],
        "gradient": "gradients", "ranks": 1, "every": 20,
        "declared": {"accumulation": 4, "loss": "token_mean", "max_grad_norm": 1.0, "rate": True},
        "unseen": ["not declared, so not checked: the learning rate"], **more,
    }  # fmt: skip


def step(number: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "schema": 1, "kind": "step", "step": number, "verdict": "RIGHT", "codes": [], "fault": "", "notes": [],
        "weights": [[1.0] * 4], "errors": [[1e-6] * 4], "tokens": [list(LENGTHS)], "token_weights": [[1 / 49] * 4],
        "residual": 1.2e-6, "scale": 1.0, "condition": 2.0, "dtype": "float32", "causes": [],
        "engine": {}, "gradient": "gradients", "seconds": 0.0123, **more,
    }  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def large(path: Path) -> Path:
    """Eight ranks with 16 micro-batches each, and 300 watched steps."""
    weights = [[1.0 if k in (0, 15) else 0.0 for k in range(16)] for _ in range(8)]
    tokens = [[(r * 31 + k * 17) % 900 + 100 for k in range(16)] for r in range(8)]
    rest = {"weights": weights, "tokens": tokens, "token_weights": [[1e-5] * 16] * 8, "dtype": "bfloat16"}
    good = {**rest, "weights": [[1.0] * 16] * 8}
    fault = {"verdict": "FAULT", "codes": ["kept"], "fault": "the intermediate micro-batches are dropped"}
    steps = [step(20 * n + 3, **(good if n < 100 else {**rest, **fault})) for n in range(300)]
    end = {"schema": 1, "kind": "end", "steps": 6000, "finished": True}
    return write(path, header(ranks=8), *steps, end)


def hostile(path: Path) -> Path:
    """Every text of the log is hostile."""
    evil = {
        "model": HOSTILE, "time": HOSTILE, "truestep": HOSTILE, "torch": HOSTILE, "packages": {HOSTILE: HOSTILE},
        "watched": [HOSTILE] * 3, "gradient": HOSTILE, "unseen": [HOSTILE] * 2,
    }  # fmt: skip
    bad = step(
        verdict="FAULT", codes=[HOSTILE], fault=HOSTILE, notes=[HOSTILE], dtype=HOSTILE, gradient=HOSTILE,
        weights=[[1e200, -5.0, None, 0.3]], tokens=[[10**9, 0, 3]], seconds=None, residual=None, scale=1e250,
    )  # fmt: skip
    off = {"schema": 1, "kind": "off", "step": 1, "why": HOSTILE}
    return write(path, header(**evil), bad, off)
