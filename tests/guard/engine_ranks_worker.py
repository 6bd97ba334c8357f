"""One of two gloo processes of runs with an engine. Arguments: STORE RANK OUT."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from leave import leave
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from truestep.guard import Guard, guard
from truestep.guard.engine_read import logprobs


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(kind: str, rank: int, deliver: str, guarded: bool = True) -> tuple[Any, list[torch.Tensor]]:
    """Train for six steps; the ranks have rows of different length. Return (guard, whole parameters)."""
    model = llama()
    engine = copy.deepcopy(model)
    rows = torch.randint(3, 64, (2, 20 + 7 * rank), generator=torch.Generator().manual_seed(rank))
    if kind == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    called: Any = DistributedDataParallel(model) if kind == "ddp" else model
    asked = 0

    def ask(ids: list[list[int]]) -> list[list[float]]:
        nonlocal asked
        asked += 1
        if deliver == "failing":
            raise RuntimeError("asleep")
        values = iter(logprobs(engine, ids, torch.device("cpu"))[0].tolist())
        return [[next(values) for _ in one[1:]] for one in ids]

    optimizer = torch.optim.AdamW(called.parameters(), lr=1e-3)
    told: Guard | None = None
    if guarded:
        told = guard(called, optimizer, engine=ask, every=1, on_fault=lambda record: None, loss="any")
    for _ in range(6):
        if deliver == "fresh":
            with torch.no_grad():
                for own, new in zip(engine.parameters(), whole(model), strict=True):
                    own.copy_(new)
        optimizer.zero_grad()
        logits = called(input_ids=rows).logits[:, :-1]
        nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:]).backward()
        optimizer.step()
    if told is not None:
        told.asked = asked  # type: ignore[attr-defined]
    return told, whole(model)


def whole(model: nn.Module) -> list[torch.Tensor]:
    values = [p.detach() for p in model.parameters()]
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]


def main() -> None:
    store, rank, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for kind in ("ddp", "fsdp2"):
        _, alone = train(kind, rank, "frozen", guarded=False)
        for deliver in ("fresh", "frozen", "failing"):
            told, values = train(kind, rank, deliver)
            found[f"{kind} {deliver}"] = {
                "failure": told.failure, "asked": told.asked,
                "codes": [r["codes"] for r in told.records], "notes": [r["notes"] for r in told.records],
                "engine": [r["engine"] for r in told.records],
                "same": all(torch.equal(a, b) for a, b in zip(alone, values, strict=True)),
            }  # fmt: skip
    out.write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
