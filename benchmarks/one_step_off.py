"""Time steps of RL with vLLM in sequence (``rollout_ahead`` = 0) and one step off (1), on two pinned cores.

    TRUESTEP_VLLM_PYTHON=PYTHON python benchmarks/one_step_off.py [--steps 30] [--repeats 2] [--out FILE.json]

In both arms, the vLLM server is pinned to one core and the trainer to another. The same recipe runs in both arms,
in alternating order; the first steps and the last step of each run are left out. In the arm in sequence, a step
takes the time of the rollout plus that of the training. One step off, it cannot take less than the larger of the
two. Prints the median over steps of each time, with a bootstrap interval of 95 %, and how much of the possible saving was reached:

    (sequence − one step off) ÷ (sequence − max(rollout, training)).

The two cores must be free. With a load average of more than --most-load at the start, nothing is run (exit code 3).
The load before and after every run is in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = 5  # the first steps of a run: vLLM and the kernels warm up, and step 0 is sampled in sequence
DRAWS = 2000
# vLLM's build for processors: one thread, 1 GiB of cache. The affinity is that of the process.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

# An untrained model does not stop early, so every step samples the same number of tokens.
RECIPE = """
name = "one-step-off"
[model]
path = "tiny"
tiny = {{ hidden_size = {hidden}, num_layers = 4, num_heads = 4, intermediate_size = {intermediate} }}
[compute]
threads = 1
[data.train]
source = "procedural:addition"
limit = 400
[[stages]]
kind = "rl"
name = "rl"
data = "train"
steps = {steps}
prompts_per_step = {prompts}
samples_per_prompt = 8
updates_per_rollout = 2
tokens_per_microbatch = 4096
save_every = 100000
reward = "random"
engine = "vllm"
method_options = {{ correction = "truncate" }}
rollout_ahead = {ahead}
optimizer = {{ lr = 1e-5 }}
sampling = {{ max_new_tokens = {tokens}, max_running = 64 }}
[vllm]
options = ["--enforce-eager", "--block-size", "32"]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each arm")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument(
        "--cores", default="", help="TRAINER,SERVER; by default two that this process may use"
    )
    parser.add_argument("--most-load", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/one_step_off.json")
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    if load > asked.most_load:
        print(
            f"the load average is {load:.1f}, more than {asked.most_load:g}: nothing is measured",
            file=sys.stderr,
        )
        return 3
    cores = [int(c) for c in asked.cores.split(",")] if asked.cores else sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("two cores are needed", file=sys.stderr)
        return 3
    runs = []
    with tempfile.TemporaryDirectory(prefix="truestep-one-step-off-") as folder:
        for number in range(asked.repeats):
            for ahead in (0, 1) if number % 2 == 0 else (1, 0):
                runs.append(measure(asked, ahead, cores[0], cores[1], Path(folder) / f"{number}-{ahead}"))
                last = runs[-1]
                middle = statistics.median(step["seconds"] for step in last["steps"])
                print(
                    f"rollout_ahead = {ahead}: median step {middle:.3f} s (load {last['load']})", flush=True
                )
    made = {"settings": settings_of(asked), "machine": machine(cores), "runs": runs, **judged(runs)}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: made[key] for key in ("sequence", "one_step_off", "saving_reached")}, indent=1))
    return 0


def measure(asked: argparse.Namespace, ahead: int, trainer: int, server: int, folder: Path) -> dict[str, Any]:
    """Run one arm, and return the times of its steps after the first ones."""
    folder.mkdir(parents=True)
    recipe, python = folder / "recipe.toml", folder / "python"
    recipe.write_text(
        RECIPE.format(
            hidden=asked.hidden, intermediate=3 * asked.hidden, steps=asked.steps, prompts=asked.prompts, ahead=ahead,
            tokens=asked.tokens,
        )
    )  # fmt: skip
    own = os.environ.get("TRUESTEP_VLLM_PYTHON", sys.executable)
    python.write_text(f'#!/bin/sh\nexec taskset -c {server} {shlex.quote(own)} "$@"\n')
    python.chmod(0o755)
    before = os.getloadavg()[0]
    environment = {**os.environ, **SMALL, "TRUESTEP_VLLM_PYTHON": str(python)}
    command = ["taskset", "-c", str(trainer), sys.executable, "-m", "truestep", "run", str(recipe)]
    done = subprocess.run(
        [*command, "--out", str(folder / "run")], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    stage = folder / "run/stages/01-rl"
    times, metrics = (
        [json.loads(line) for line in (stage / name).open()] for name in ("timings.jsonl", "metrics.jsonl")
    )
    ages = [row.get("rl/sampling/staleness", 0.0) for row in metrics]
    assert ages == [float(ahead and step > 0) for step in range(asked.steps)], ages
    names = ("step", "seconds", "rollout_seconds", "train_seconds")
    # The last step is left out too, because nothing is sampled while it trains.
    steps = [{name: row[name] for name in names} for row in times[LEFT_OUT:-1]]
    return {"rollout_ahead": ahead, "load": [round(before, 2), round(os.getloadavg()[0], 2)], "steps": steps}


def judged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the medians of both arms with intervals, and the share of the possible saving that was reached."""
    arms = {ahead: [s for r in runs if r["rollout_ahead"] == ahead for s in r["steps"]] for ahead in (0, 1)}

    def times(steps: Sequence[Mapping[str, float]], name: str) -> float:
        return statistics.median(step[name] for step in steps)

    def larger(steps: Sequence[Mapping[str, float]]) -> float:
        return max(times(steps, "rollout_seconds"), times(steps, "train_seconds"))

    def saving(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> float:
        whole = times(first, "seconds")
        return (whole - times(second, "seconds")) / (whole - larger(first))

    names = ("seconds", "rollout_seconds", "train_seconds")
    return {
        "sequence": {
            **{name: interval(lambda s, name=name: times(s, name), arms[0]) for name in names},
            "larger_of_both": interval(larger, arms[0]),
        },
        "one_step_off": {name: interval(lambda s, name=name: times(s, name), arms[1]) for name in names},
        "saving_reached": interval(saving, arms[0], arms[1]),
    }


def interval(statistic: Callable[..., float], *samples: Sequence[Any]) -> dict[str, float]:
    """Return the value of a statistic and its percentile bootstrap interval of 95 %, over steps."""
    draw = random.Random(0)
    drawn = sorted(statistic(*[draw.choices(s, k=len(s)) for s in samples]) for _ in range(DRAWS))
    low, high = drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1]
    return {"value": round(statistic(*samples), 4), "low": round(low, 4), "high": round(high, 4)}


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(asked).items() if key not in ("out", "most_load", "cores")}


def machine(cores: Sequence[int]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"commit": commit, "cores": list(cores[:2]), "cpus": os.cpu_count()}


if __name__ == "__main__":
    raise SystemExit(main())
