"""Time the demo's steps under load and idle, in this source tree and in another one, in pairs of runs.

    python benchmarks/contention.py --base OTHER_CHECKOUT [--only rl_beside_torch,sft_beside_busy,rl_idle,sft_idle]
                                    [--pairs 5] [--rl-steps 3] [--sft-steps 20] [--out FILE.json]

A pair is one short run of each tree, one directly after the other, in alternating order, with the same
Python, packages and load. Its ratio is the median step time of the base divided by that of this tree. The
load is four processes: torch with two threads each ("torch"), or a loop that does nothing ("busy"). OpenMP's
variables are removed from the environment of all processes. RL starts from a model that the base's SFT stage
has made. Prints each ratio (geometric mean of the pairs, smallest and largest pair) with the smallest ratio
that is required; exits with 1 if a ratio is too small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOADS = {
    "idle": "",
    "busy": "while True: pass",
    "torch": "import torch; torch.set_num_threads(2); a = torch.ones(256, 256)\nwhile True: a @ a",
}
NUM_LOADS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage of the demo and a load. ``bar`` is the smallest allowed ratio of base time to our time."""

    stage: str
    load: str
    bar: float


CASES = {
    "rl_beside_torch": Case(stage="rl", load="torch", bar=2.0),
    "sft_beside_busy": Case(stage="sft", load="busy", bar=1.4),
    "rl_idle": Case(stage="rl", load="idle", bar=1 / 1.03),
    "sft_idle": Case(stage="sft", load="idle", bar=1 / 1.03),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def environment(tree: Path | None) -> dict[str, str]:
    """Return the caller's variables without OpenMP's, and with the source tree that is to be imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    kept.pop("PYTHONPATH", None)
    return kept | ({"PYTHONPATH": str(tree / "src")} if tree else {}) | {"HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def beside(load: str) -> Iterator[None]:
    """Run four processes of that load until the block ends."""
    code = LOADS[load]
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment(None)) for _ in range(NUM_LOADS if code else 0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(tree: Path, stage: str, steps: int, out: Path, model: str = "tiny") -> Path:
    """Train one stage of the demo with that tree's code and recipe, without evaluation; return its folder."""
    settings = (f"stages.{stage}.steps={steps}", f"model.path={model}", "evaluate.data=[]")
    words = [word for item in settings for word in ("--set", item)]
    command = [sys.executable, "-m", "truestep", stage, str(tree / "recipes/demo.toml"), "--out", str(out)]
    done = subprocess.run(
        [*command, *words], env=environment(tree), cwd=out.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {stage}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return next((out / "stages").iterdir())


def step_seconds(tree: Path, stage: str, steps: int, model: str) -> float:
    """Return the median time of a step, without the first step, which loads and allocates."""
    with tempfile.TemporaryDirectory(prefix="contention-") as folder:
        made = train(tree, stage, steps + 1, Path(folder) / "run", model)
        rows = [json.loads(line) for line in (made / "timings.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[1:])


def measure(name: str, options: argparse.Namespace, sft_model: str) -> dict[str, Any]:
    case = CASES[name]
    steps = options.rl_steps if case.stage == "rl" else options.sft_steps
    model = sft_model if case.stage == "rl" else "tiny"
    pairs = []
    for number in range(options.pairs):
        seconds: dict[str, float] = {}
        with beside(case.load):
            for who in ("base", "this") if number % 2 == 0 else ("this", "base"):
                tree = options.base if who == "base" else ROOT
                seconds[who] = step_seconds(tree, case.stage, steps, model)
        pairs.append(seconds)
        say(
            f"{name}  {number + 1}/{options.pairs}: base {seconds['base']:.3f} s, this tree {seconds['this']:.3f} s per step"
        )
    return {"pairs": pairs, "bar": case.bar, **summary([p["base"] / p["this"] for p in pairs])}


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Return the geometric mean of the pairs' ratios, and their range."""
    mean = math.exp(statistics.fmean(math.log(r) for r in ratios))
    return {"ratio": mean, "lowest": min(ratios), "highest": max(ratios)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the demo's steps under load and idle, in two source trees."
    )
    parser.add_argument("--base", type=Path, required=True, help="a different checkout of this repository")
    parser.add_argument(
        "--only", default=",".join(CASES), help="cases to run, comma-separated (default: all)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs for each case (default: 5)")
    parser.add_argument("--rl-steps", type=int, default=3, help="measured RL steps per run (default: 3)")
    parser.add_argument("--sft-steps", type=int, default=20, help="measured SFT steps per run (default: 20)")
    parser.add_argument(
        "--warm-up", type=int, default=150, help="SFT steps for the model that RL starts from"
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    options.base = options.base.absolute()
    options.only = [name for name in options.only.split(",") if name]
    if unknown := [name for name in options.only if name not in CASES]:
        parser.error(f"--only {unknown[0]} is unknown; pass {', '.join(CASES)}")
    if not (options.base / "src/truestep").is_dir():
        parser.error(f"--base {options.base} is not a checkout of truestep; pass the root of one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that the load is stopped
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="contention-model-") as folder:
        model = ""
        if any(CASES[name].stage == "rl" for name in options.only):
            say(f"making the model that RL starts from: {options.warm_up} SFT steps")
            model = str(train(options.base, "sft", options.warm_up, Path(folder) / "sft") / "export")
        for name in options.only:
            found[name] = measure(name, options, model)
    for name, row in found.items():
        verdict = "reached" if row["ratio"] >= row["bar"] else "MISSED"
        print(f"{name:<16} {row['ratio']:.2f} times as fast as the base [{row['lowest']:.2f}, {row['highest']:.2f}] "
              f"in {len(row['pairs'])} pairs; required {row['bar']:.2f}: {verdict}")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["ratio"] >= row["bar"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
