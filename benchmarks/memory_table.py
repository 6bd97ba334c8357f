"""Write the tables of docs/how-to/gpu.md: what the paper's recipes need, and how good the predictions are.

    python benchmarks/memory_table.py [--check]

The first table is what ``truestep run RECIPE --dry-run`` says; the second is results/memory.json (memory_measure.py).
Held by: tests/study/test_memory.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pages

from truestep.pipeline.paper_plan import declared_plan
from truestep.settings import load_settings

PAGE = pages.ROOT / "docs/how-to/gpu.md"
MEASURED = pages.ROOT / "results/memory.json"
RECIPES = pages.ROOT / "recipes/paper"
ONE, LORA = "declared.num_gpus=1", "lora={ rank = 16 }"
OFFLOAD, SHORT = 'compute.offload="optimizer"', "tokens_per_microbatch=9216"
SFT, RL = "qwen2.5-math-7b-sft", "qwen2.5-math-7b-luffy"
CASES = (
    ("SFT, 16 ranks", SFT, ()),
    ("RL, 16 ranks, torch", RL, ()),
    ("RL, 16 ranks, vLLM", RL, ('stages.rl.engine="vllm"',)),
    ("SFT, one GPU", SFT, (ONE, OFFLOAD)),
    ("SFT, one GPU", SFT, (ONE, OFFLOAD, "compute.offload_activations=true")),
    ("RL, one GPU, torch", RL, (ONE, OFFLOAD)),
    ("RL, one GPU and one of vLLM", RL, (ONE, OFFLOAD, 'stages.rl.engine="vllm"')),
    ("SFT, one GPU", SFT, (ONE, f"stages.sft.{LORA}", f"stages.sft.{SHORT}")),
    ("RL, one GPU, torch", RL, (ONE, f"stages.rl.{LORA}", f"stages.rl.{SHORT}", "stages.rl.sampling.max_running=8")),
    ("RL, one GPU and one of vLLM", RL, (ONE, f"stages.rl.{LORA}", f"stages.rl.{SHORT}", 'stages.rl.engine="vllm"')),
)  # fmt: skip
CARDS = (24, 48, 80)


def needs() -> list[str]:
    lines = [
        pages.table_row(("stage", "--set", "device, GiB", "smallest card", "host, GiB", "vLLM's card, GiB",
                         "tokens/s trained, assumed", "tokens/s sampled, assumed")),
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, recipe, changes in CASES:
        path = RECIPES / f"{recipe}.toml"
        row = declared_plan(load_settings(path, changes), RECIPES, str(path))["stages"][-1]
        gib, rates = row["gib_per_gpu"], row["assumed tokens/s"]
        # A tenth stays free for kernels and fragmentation.
        card = next((f"{size} GB" for size in CARDS if gib < 0.9 * size * 1e9 / 2**30), "none of these")
        lines.append(pages.table_row((
            name, " ".join(f"`{change}`" for change in changes) or "–", f"{gib:.1f}", card,
            f"{row['host_gib_per_rank']:.1f}", f"{row['server_gib_per_gpu']:.1f}" if row["server_gib"] else "–",
            f"{rates['training']:,}", f"{rates['sampling']:,}" if "sampling" in rates else "–",
        )))  # fmt: skip
    return lines


def compared() -> list[str]:
    document = json.loads(MEASURED.read_text(encoding="utf-8"))
    lines = [
        pages.table_row(("measured with", "model", "dtype", "tokens", "checkpointing", "adapters", "offload",
                         "predicted, GiB", "measured, GiB", "ratio")),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, words in (("fake", "fake tensors"), ("real", "real steps")):
        for one in document[kind]:
            yes = {
                key: "yes" if one[key] is True else one[key] or "–"
                for key in ("checkpointing", "lora", "offload")
            }
            lines.append(pages.table_row((
                words, one["model"], one["dtype"], f"{one['tokens']:,}", *yes.values(),
                f"{one['predicted_gib']:.2f}", f"{one['measured_gib']:.2f}", f"{one['ratio']:.3f}",
            )))  # fmt: skip
    return lines


def files() -> dict[Path, str]:
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("needs", needs()), ("compared", compared())):
        begin, end = f"<!-- {name}: benchmarks/memory_table.py -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return {PAGE: text}


if __name__ == "__main__":
    pages.write_or_check(__doc__, files)
