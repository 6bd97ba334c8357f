"""Kill an evaluation at random moments and resume it; it must end like one that was never killed.

    python benchmarks/kill_evaluate.py [--kills 20] [--seed 0]

The built-in model is evaluated on generated sums, 48 problems x 4 samples. SIGKILL is sent at a random moment
after sampling has begun, until the given number of kills has been sent; then the evaluation may finish.
Prints one JSON line with the kills, the runs, the number of samples recorded at each kill, and the number of
runs whose samples or results differ; exits with 1 if any differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
name = "kill"
[model]
path = "tiny"
tiny = { hidden_size = 128, num_layers = 4, num_heads = 4, intermediate_size = 384 }
[compute]
threads = 1
[data.test]
source = "procedural:addition"
split = "test"
limit = 48
[evaluate]
data = ["test"]
samples_per_problem = 4
pass_at = [1, 4]
sampling = { temperature = 0.6, max_new_tokens = 96, max_running = 8 }
"""


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "truestep", "eval", str(recipe), "--out", str(out), "--resume"]


def hashes(out: Path) -> dict[str, str]:
    names = ("test.samples.jsonl", "test.results.json")
    return {n: hashlib.sha256((out / "evaluations" / "base" / n).read_bytes()).hexdigest() for n in names}


def recorded(out: Path) -> int:
    path = out / "evaluations" / "base" / "test.samples.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def run_and_kill(recipe: Path, out: Path, rng: random.Random, span: float) -> int | None:
    """Return the number of samples recorded at the kill, or None if the evaluation finished first."""
    before = recorded(out)
    process = subprocess.Popen(command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while recorded(out) <= before and process.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, span))
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return recorded(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, marks, runs, differences = random.Random(args.seed), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "kill.toml")
        recipe.write_text(RECIPE)
        began = time.monotonic()
        subprocess.run(command(recipe, Path(folder, "whole")), check=True, capture_output=True)
        span = max(0.2, (time.monotonic() - began) / 8)
        expected = hashes(Path(folder, "whole"))
        while len(marks) < args.kills:
            out = Path(folder, f"run-{runs}")
            while len(marks) < args.kills:
                mark = run_and_kill(recipe, out, rng, span)
                if mark is None:
                    break
                marks.append(mark)
            subprocess.run(command(recipe, out), check=True, capture_output=True)
            differences += hashes(out) != expected
            runs += 1
    print(
        json.dumps({"kills": len(marks), "runs": runs, "recorded_at_kill": marks, "different": differences})
    )
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()
