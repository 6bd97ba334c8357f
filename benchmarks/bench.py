"""Compare speed and memory with TRL, transformers and vLLM, on the same machine, model, data and dtype.

    python benchmarks/bench.py [--only sft,rollout,rl,matmul] [--repetitions 3] [--threads 2] [--data
                               FILE.jsonl] [--dtype float32|bfloat16] [--model PATH] [--quick] [--out
                               results/bench/results.json] [--size rl_steps=1 ...]

Every repetition is a fresh process, and repetitions are interleaved (ours, peer, ours, peer, ...), so that a
slow minute of the machine affects all of them; a ratio compares the same repetition. Each peer has a separate
environment under .bench/, made on first use. A peer that cannot be installed, or that fails, is reported and
does not end the benchmark. Progress goes to stderr, a table per section to stdout, and raw figures with
provenance to the JSON file, which keeps its figures for sections that were not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from environments import FOLDER, ROOT, NotAvailable, interpreter, preload
from table import section_table
from workload import describe, longest, prompt_workload, sft_workload

from truestep.device import matmul_rate, set_threads
from truestep.errors import UserError
from truestep.model.load import resolve
from truestep.rundir import provenance, read_json, write_json
from truestep.settings import ModelSettings

SECTIONS = ("sft", "rollout", "rl", "matmul")
SEED = 0
PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the workload, the same for truestep and its peers."""

    sft_steps: int = 4
    sequences_per_step: int = 16
    tokens_per_microbatch: int = 1024
    sft_tokens_per_microbatch: int = 320
    rollout_prompts: int = 64
    rollout_tokens: int = 128
    rl_steps: int = 3
    prompts_per_step: int = 4
    samples_per_prompt: int = 8
    rl_tokens: int = 64
    matmul_size: int = 2048
    matmul_seconds: float = 3.0
    timeout: int = 3600


QUICK = Sizes(
    sft_steps=1,
    sequences_per_step=8,
    rollout_prompts=8,
    rollout_tokens=16,
    rl_steps=1,
    prompts_per_step=2,
    samples_per_prompt=4,
    rl_tokens=8,
    matmul_seconds=0.3,
    timeout=600,
)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One process to be measured: a script in peers/, its environment ("" is our own), and its
    specification."""

    name: str
    script: str
    spec: Mapping[str, Any]
    environment: str = ""
    once: bool = False  # only in the first repetition


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sft_contestants(sizes: Sizes) -> list[Contestant]:
    common = {
        "what": "sft",
        "steps": sizes.sft_steps,
        "warmup": 1,
        "sequences_per_step": sizes.sequences_per_step,
        "tokens_per_microbatch": sizes.sft_tokens_per_microbatch,
        "max_length": 1024,
        "gradient_checkpointing": False,
        "trainer": "trl",
        "packing": False,
        "batch_size": 8,
        "accumulation": sizes.sequences_per_step // 8,
        "compile": False,
    }
    # A packed row of TRL has 1024 tokens: three rows are about 16 sequences of 188 tokens.
    rows = max(1, round(sizes.sequences_per_step * 188 / 1024))
    packed = {**common, "packing": True, "batch_size": 1, "accumulation": rows}
    batch = f"8 x {common['accumulation']}, padded"
    trl = {"script": "trl_sft.py", "environment": "trl"}
    return [
        Contestant(name="truestep", script="ours.py", spec={**common, "recompute": "selective"}),
        Contestant(
            name="truestep, compiled layers",
            script="ours.py",
            spec={**common, "recompute": "selective", "compile": True, "warmup": 2},
        ),
        Contestant(name=f"TRL, {batch}", spec=common, **trl),
        Contestant(name="TRL, packing", spec=packed, **trl),
        Contestant(name=f"transformers Trainer, {batch}", spec={**common, "trainer": "transformers"}, **trl),
        Contestant(
            name=f"TRL, {batch}, its default checkpointing",
            spec={**common, "gradient_checkpointing": True},
            once=True,
            **trl,
        ),
    ]


def rollout_contestants(sizes: Sizes) -> list[Contestant]:
    spec = {"what": "rollout", "max_new_tokens": sizes.rollout_tokens, "warmup_tokens": 4, "compile": False}
    return [
        Contestant(name="truestep", script="ours.py", spec=spec),
        Contestant(name="transformers generate", script="transformers_generate.py", spec=spec),
        Contestant(name="vLLM", script="vllm_generate.py", spec=spec, environment="vllm"),
    ]


def rl_contestants(sizes: Sizes) -> list[Contestant]:
    spec = {
        "what": "rl",
        "steps": sizes.rl_steps,
        "warmup": 1,
        "prompts_per_step": sizes.prompts_per_step,
        "samples_per_prompt": sizes.samples_per_prompt,
        "max_new_tokens": sizes.rl_tokens,
        "tokens_per_microbatch": sizes.tokens_per_microbatch,
        "gradient_checkpointing": False,
        "compile": False,
    }
    return [
        Contestant(name="truestep", script="ours.py", spec=spec),
        Contestant(
            name="truestep, compiled layers", script="ours.py", spec={**spec, "compile": True, "warmup": 2}
        ),
        Contestant(name="TRL GRPOTrainer", script="trl_grpo.py", spec=spec, environment="trl"),
        Contestant(
            name="TRL GRPOTrainer, its default checkpointing",
            script="trl_grpo.py",
            spec={**spec, "gradient_checkpointing": True},
            environment="trl",
            once=True,
        ),
    ]


def matmul_contestants(sizes: Sizes) -> list[Contestant]:
    """Return contestants for the machine's rate and for truestep's SFT step without and with compiled layers.
    The compiler's cache is empty in the first repetition and warm after it."""
    rate = {"what": "rate", "matmul_size": sizes.matmul_size, "seconds": sizes.matmul_seconds}
    eager = dict(sft_contestants(sizes)[0].spec)
    compiled = {**eager, "compile": True, "warmup": 2}
    return [
        Contestant(name="matmul rate", script="ours.py", spec=rate),
        Contestant(name="truestep, eager", script="ours.py", spec=eager),
        Contestant(name="truestep, compiled", script="ours.py", spec=compiled),
    ]


CONTESTANTS = {
    "sft": sft_contestants,
    "rollout": rollout_contestants,
    "rl": rl_contestants,
    "matmul": matmul_contestants,
}


def workload_of(section: str, sizes: Sizes, model: str, data: str) -> dict[str, Any]:
    if section in ("sft", "matmul"):
        steps = sizes.sft_steps + 3  # two for warm-up and one spare: packing may fill its rows better
        return sft_workload(model, data, steps * sizes.sequences_per_step, SEED)
    if section == "rollout":
        return prompt_workload(model, data, sizes.rollout_prompts, sizes.rollout_prompts, SEED)
    return prompt_workload(
        model, data, (sizes.rl_steps + 2) * sizes.prompts_per_step, sizes.prompts_per_step, SEED
    )


def fitted(contestant: Contestant, workload: dict[str, Any]) -> Contestant:
    """Return the contestant with micro-batches that fit the longest sequence, which truestep never splits."""
    spec = dict(contestant.spec)
    if "tokens_per_microbatch" in spec:
        least = longest(workload, spec.get("max_new_tokens", 0))
        spec["tokens_per_microbatch"] = max(spec["tokens_per_microbatch"], least)
    return replace(contestant, spec=spec)


def run_section(
    section: str, options: argparse.Namespace, sizes: Sizes, model: str, dtype: str
) -> dict[str, Any]:
    """Run all repetitions of all contestants of a section, interleaved."""
    workload = workload_of(section, sizes, model, options.data)
    say(f"{section}: {describe(workload)}")
    contestants = [fitted(contestant, workload) for contestant in CONTESTANTS[section](sizes)]
    results: dict[str, Any] = {
        c.name: {"spec": dict(c.spec), "repetitions": [], "failed": ""} for c in contestants
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shared = Path(folder) / "workload.json"
        write_json(shared, workload)
        general = {
            "model": model,
            "dtype": dtype,
            "threads": options.threads,
            "seed": SEED,
            "workload": str(shared),
        }
        for repetition in range(options.repetitions):
            for contestant in contestants:
                result = results[contestant.name]
                if result["failed"] or (contestant.once and repetition):
                    continue
                began = time.perf_counter()
                try:
                    line = run_contestant(
                        contestant, {**general, **contestant.spec}, Path(folder), sizes.timeout
                    )
                except NotAvailable as error:
                    result["failed"] = str(error)
                    say(f"{section}  {contestant.name}: not run ({error})")
                    continue
                result["repetitions"].append(line)
                say(
                    f"{section}  {repetition + 1}/{options.repetitions}  {contestant.name}: {shown(line['figures'])}"
                    f"  [{time.perf_counter() - began:.0f} s, load {line['load_average']:.1f}]"
                )
    return {
        "provenance": provenance(SEED),
        "model": model,
        "dtype": dtype,
        "threads": options.threads,
        "data": options.data or "made up",
        "workload": describe(workload),
        "contestants": results,
    }


def run_contestant(
    contestant: Contestant, spec: Mapping[str, Any], folder: Path, timeout: int
) -> dict[str, Any]:
    """Return the figures of one process. Raises NotAvailable with one line if there are none."""
    python = interpreter(contestant.environment, say)
    path = folder / "specification.json"
    write_json(path, dict(spec))
    threads = str(spec["threads"])
    # A peer runs as its users run it: without our packages and without truestep's wait policy for OpenMP.
    ours = contestant.script == "ours.py"
    hidden = {"PYTHONPATH"} if contestant.environment else set()
    hidden |= set() if ours else {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    variables = {
        **{k: v for k, v in os.environ.items() if k not in hidden},
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(
            folder / "inductor"
        ),  # empty in a section's first repetition, warm after it
        **preload(contestant.environment),
    }
    command = [str(python), str(PEERS / contestant.script), str(path)]
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"no result within {timeout} s") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"figures"')]
    if done.returncode or not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        reason = words[-1].strip()[:200] if words else "no message"
        raise NotAvailable(f"exit code {done.returncode}: {reason}")
    return dict(json.loads(lines[-1]))


def shown(figures: Mapping[str, Any]) -> str:
    names = {"tokens_per_second": "tokens/s", "seconds_per_step": "s/step", "flops_per_second": "FLOP/s"}
    parts = [f"{figures[key]:.4g} {unit}" for key, unit in names.items() if key in figures]
    return ", ".join([*parts, f"{figures['peak_rss_bytes'] / 2**30:.2f} GiB"])


def pick_dtype(wanted: str, threads: int) -> tuple[str, dict[str, float]]:
    """Return the wanted dtype, or the one that this processor multiplies faster, and the measured rates."""
    set_threads(threads)
    rates = {name: matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    say("matmul: " + ", ".join(f"{name} {rate / 1e9:.1f} GFLOP/s" for name, rate in rates.items()))
    return wanted or max(rates, key=lambda name: rates[name]), rates


def quick_model(tokenizer_folder: str) -> str:
    """Make a random two-layer model with the real tokenizer, to try everything out."""
    target = FOLDER / "models" / "quick"
    if not (target / "config.json").is_file():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    return str(target)


def default_data() -> str:
    """Return the file in TRUESTEP_DATA (a file, or a folder with gsm8k/train.jsonl), or "" if there is
    none."""
    place = Path(os.environ.get("TRUESTEP_DATA", ""))
    file = place if place.is_file() else place / "gsm8k" / "train.jsonl"
    return str(file) if os.environ.get("TRUESTEP_DATA") and file.is_file() else ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the speed and memory of truestep with its peers.")
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="sections to run, comma-separated (default: all)"
    )
    parser.add_argument("--repetitions", type=int, default=0, help="default: 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--data",
        default=default_data(),
        help="a JSONL file with problem and solution (default: made-up data)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="default: the faster one on this machine"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--quick", action="store_true", help="try everything out, with a tiny random model and few steps"
    )
    parser.add_argument(
        "--out", default="", help="default: results/bench/results.json, or .bench/quick.json with --quick"
    )
    parser.add_argument(
        "--size", action="append", default=[], help="NAME=NUMBER, a field of the class Sizes; may be repeated"
    )
    options = parser.parse_args(arguments)
    options.sections = [s.strip() for s in options.only.split(",") if s.strip()]
    unknown = [s for s in options.sections if s not in SECTIONS]
    if unknown:
        parser.error(f"--only {unknown[0]} is unknown; pass {', '.join(SECTIONS)}")
    known = {f.name for f in fields(Sizes)} - {"matmul_seconds"}
    for text in options.size:
        name, _, value = text.partition("=")
        if name not in known or not value.isdigit() or int(value) < 1:
            parser.error(
                f"--size {text} is not valid; pass NAME=NUMBER, with NAME one of {', '.join(sorted(known))}"
            )
    options.size = {name: int(value) for name, _, value in (text.partition("=") for text in options.size)}
    options.repetitions = options.repetitions or (1 if options.quick else 3)
    options.out = Path(
        options.out or (FOLDER / "quick.json" if options.quick else ROOT / "results/bench/results.json")
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    FOLDER.mkdir(exist_ok=True)
    sizes = replace(QUICK if options.quick else Sizes(), **options.size)
    try:
        model = resolve(ModelSettings(path=options.model))
        model = quick_model(model) if options.quick else model
        dtype, rates = pick_dtype(options.dtype, options.threads)
        written = read_json(options.out) if options.out.is_file() else {}
        tables = []
        for section in options.sections:
            result = run_section(section, options, sizes, model, dtype)
            result["matmul_rates"] = rates
            written[section] = result
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, written)
            tables.append(section_table(section, result))
    except UserError as error:
        say(str(error))
        return 2
    print("\n\n".join(tables))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
