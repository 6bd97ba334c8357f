"""transformers' ``generate`` on one left-padded batch of all prompts, with the cache, until the last row
stops."""

from __future__ import annotations

import time
from typing import Any

import torch
from measure import generation_figures, num_generated, report, specification
from transformers import AutoModelForCausalLM, GenerationConfig


def main() -> None:
    spec = specification()
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=getattr(torch, spec["dtype"]), trust_remote_code=False
    )
    model.eval()
    stops = spec["stop_token_ids"]
    prompts = [p["ids"] for p in spec["prompts"]]
    width = max(map(len, prompts))
    ids = torch.tensor([[stops[0]] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def generate(limit: int) -> dict[str, Any]:
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=limit,
            eos_token_id=stops,
            pad_token_id=stops[0],
            use_cache=True,
        )
        began = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        seconds = time.perf_counter() - began
        return generation_figures([num_generated(row, stops) for row in out[:, width:].tolist()], seconds)

    generate(spec["warmup_tokens"])
    report(generate(spec["max_new_tokens"]), "torch", "transformers")


if __name__ == "__main__":
    main()
