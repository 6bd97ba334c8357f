"""Runs one code block of docs/guard.md with a tiny model.

python tests/guard/docs_blocks.py HEADING STORE RANK RANKS        one process of several
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from leave import leave
from torch.nn.functional import cross_entropy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guard.md"
LENGTHS = (2, 27, 3, 17, 40, 5, 22, 9, 33, 4, 14, 30)  # trained tokens of the rows
PROMPT = 4


def blocks() -> dict[str, str]:
    """Return heading → Python code of each block in docs/guard.md."""
    found = {}
    for part in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        if code := re.search(r"^```python\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL):
            found[part.partition("\n")[0]] = code[1]
    return found


def names(rank: int = 0) -> dict[str, Any]:
    """Return what the page says that its examples use."""
    import transformers

    torch.manual_seed(0)
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(
        **ids, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    random = torch.Generator().manual_seed(1 + rank)
    rows = []
    for length in LENGTHS:
        tokens = torch.randint(3, 64, (PROMPT + length,), generator=random)
        tokens[-1] = 2
        labels = torch.cat([torch.full((PROMPT,), -100), tokens[PROMPT:]])
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    micro = [{key: value[None] for key, value in row.items()} for row in rows]
    return {
        "torch": torch, "cross_entropy": cross_entropy, "model": model, "rows": rows,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "steps": [micro[i : i + 4] for i in range(0, len(micro), 4)],
        "collate": lambda batch: {key: batch[0][key][None] for key in batch[0]},
    }  # fmt: skip


def run(heading: str, space: dict[str, Any]) -> None:
    exec(compile(blocks()[heading], f"{PAGE} {heading}", "exec"), space)


if __name__ == "__main__":
    chosen, store, own_rank, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=own_rank, world_size=ranks
    )
    run(chosen, names(own_rank))
    leave()
