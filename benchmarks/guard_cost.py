"""What the live guard costs, in pairs of steps of one process: SmolLM2-135M's shape with random weights, on a CPU.

Three kinds of steps follow each other in every round: without a guard, with one that does not watch this step,
and with one that watches it. Which of them is the first changes from round to round, because a step is slower or
faster after another one. Processor time is compared, which other processes disturb less. Peak memory is that of
child processes with and without a guard.
usage: python benchmarks/guard_cost.py [--rounds 5] [--tokens 512] [--micro 4] [--dtype float32] [--out FILE]"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from truestep.guard import guard
from truestep.guard.live import FIRST
from truestep.rundir import provenance

SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_theta": 100000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EVERY = 20
ORDER = ("plain", "idle", "watched")


class Step:
    """A model and one optimizer step of it on random tokens."""

    def __init__(self, asked: Any) -> None:
        torch.manual_seed(0)
        self.asked = asked
        self.model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).to(getattr(torch, asked.dtype))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.random = torch.Generator().manual_seed(1)

    def take(self) -> float:
        """Take a step; return its seconds of processor time."""
        count, tokens = self.asked.micro, self.asked.tokens
        batches = [torch.randint(3, 49152, (1, tokens), generator=self.random) for _ in range(count)]
        began = time.process_time()
        for ids in batches:
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
            (out.loss / count).backward()
            del out
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - began


def watching(step: Step, is_due: bool) -> tuple[float, float, list[Any]]:
    """Return (seconds of a step, seconds to attach the guard, records)."""
    began = time.process_time()
    watch = guard(step.model, step.optimizer, every=10**9)
    if not is_due:
        watch.step_number = FIRST
        assert watch.sketch is not None
        watch.sketch.is_on = False
    attached = time.process_time() - began
    seconds = step.take()
    watch.close()
    assert not watch.failure, watch.failure
    return seconds, attached, watch.records


def child(asked: Any) -> None:
    """Take three steps and print the peak memory in MiB."""
    step = Step(asked)
    if asked.child == "guard":
        with guard(step.model, step.optimizer, every=1) as watch:
            for _ in range(3):
                step.take()
        assert len(watch.records) == 3, watch.failure
    else:
        for _ in range(3):
            step.take()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(asked: Any, kind: str) -> float:
    command = [
        sys.executable,
        __file__,
        "--child",
        kind,
        "--tokens",
        str(asked.tokens),
        "--micro",
        str(asked.micro),
    ]
    command += ["--dtype", asked.dtype]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.split("peak ")[1])


def interval(values: list[float]) -> list[float]:
    """Return the median and the 2.5 % and 97.5 % quantiles of bootstrapped medians."""
    random = np.random.default_rng(0)
    drawn = np.median(random.choice(values, (2000, len(values))), axis=1)
    return [float(np.median(values)), *map(float, np.quantile(drawn, (0.025, 0.975)))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.child:
        child(asked)
        return
    step = Step(asked)
    step.take()
    rows = []
    for number in range(asked.rounds):
        row, inside, verdict = {}, 0.0, ""
        for kind in (ORDER * 2)[number % 3 :][:3]:
            if kind == "plain":
                row[kind] = step.take()
                continue
            row[kind], row["attach"], records = watching(step, kind == "watched")
            if records:
                inside, verdict = records[0]["seconds"], records[0]["verdict"]
        rows.append(row)
        print(f"round {number + 1}: plain {row['plain']:.2f} s, idle {row['idle']:.2f}, watched {row['watched']:.2f}, "
              f"attach {row['attach']:.2f}, judging {inside:.2f} {verdict}", flush=True)  # fmt: skip
    share = {
        "watched": interval([r["watched"] / r["plain"] - 1 for r in rows]),
        "idle": interval([r["idle"] / r["plain"] - 1 for r in rows]),
        "average": interval(
            [(r["watched"] - r["idle"]) / EVERY / r["plain"] + r["idle"] / r["plain"] - 1 for r in rows]
        ),
    }
    memory = {kind: peak(asked, kind) for kind in ("none", "guard")}
    command = f"python benchmarks/guard_cost.py --rounds {asked.rounds} --tokens {asked.tokens}"
    command += f" --micro {asked.micro} --dtype {asked.dtype}"
    document = {
        "command": command, "commit": provenance(0)["commit"], "torch": torch.__version__, "dtype": asked.dtype,
        "tokens": asked.tokens, "micro": asked.micro, "threads": asked.threads, "rounds": rows, "share": share,
        "peak_mib": memory, "every": EVERY,
    }  # fmt: skip
    for name, (middle, low, high) in share.items():
        print(f"{name}: {middle:+.1%} [{low:+.1%}, {high:+.1%}] of a step")
    print(
        f"peak memory: {memory['none']:.0f} MiB, with the guard {memory['guard']:.0f} ({memory['guard'] / memory['none'] - 1:+.1%})"
    )
    if asked.out:
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
