"""Kill a run at random moments and resume it, repeatedly; it must end like a run that was never killed.

    python benchmarks/kill.py --kills 100 [--stage sft|rl|both] [--seed 0] [--keep FOLDER]

One tiny SFT→RL run is not interrupted. Then runs in new folders get SIGKILL at random moments and are resumed
with ``--resume`` until they finish; new runs are started until the given number of kills is reached. Every
finished run must have the same bytes: exported model, optimizer state, metrics of each stage, evaluation
samples. Prints when the kills happened, and one JSON line; exits with 1 if anything differs.

Start-up (importing torch and transformers) takes longer than the training of such a tiny run, so four of five
kills are drawn from the time after training has begun, and the fifth from the time before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

RECIPE = """
name = "kill"
[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 2, num_heads = 2, intermediate_size = 64 }
[compute]
threads = 1
[data.demonstrations]
source = "procedural:addition"
limit = 40
options = { digits = 1 }
[data.test]
source = "procedural:addition"
split = "test"
limit = 8
options = { digits = 1 }
[[stages]]
kind = "sft"
data = "demonstrations"
steps = 200
sequences_per_step = 16
tokens_per_microbatch = 200
save_every = 4
optimizer = { lr = 1e-2, schedule = "cosine", warmup_fraction = 0.1 }
[[stages]]
kind = "rl"
data = "demonstrations"
steps = 20
prompts_per_step = 4
samples_per_prompt = 4
tokens_per_microbatch = 200
save_every = 2
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 24 }
[evaluate]
data = ["test"]
sampling = { temperature = 0.6, max_new_tokens = 24 }
"""
STEPS = {"sft": 200, "rl": 20}
FOLDERS = {"sft": "01-sft", "rl": "02-rl"}
PATIENCE = 600.0  # seconds after which a launch that neither trains nor ends counts as hung
SHARE_BEFORE_TRAINING = 0.2


@dataclass(kw_only=True)
class Tally:
    """Counts of what has happened so far."""

    kills: int = 0
    runs: int = 0
    mismatches: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)
    steps: dict[str, list[int]] = field(default_factory=lambda: {"sft": [], "rl": []})


def launch(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "truestep", "run", str(recipe), "--out", str(folder)]
    words += ["--resume"] if (folder / "resolved.toml").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log_of(folder).open("wb") as log:
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.stderr")


def training_began(folder: Path) -> bool:
    """Return whether the current launch has reached a stage, which it prints on stderr."""
    return bool(re.search(rb"^(sft|rl) \((sft|rl)\): ", log_of(folder).read_bytes(), re.MULTILINE))


def wait_for_training(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not training_began(folder):
        if time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"hung: {log_of(folder).read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


def place(folder: Path) -> tuple[str, str, int]:
    """Return what the process was doing when it died, the stage, and the logged steps, from its files."""
    said = re.findall(r"^(evaluate|sft \(|rl \()", log_of(folder).read_text(errors="replace"), re.MULTILINE)
    if not said:
        return "start-up", "", 0
    if said[-1] == "evaluate":
        return "evaluation", "", 0
    stage = said[-1].split()[0]
    home = folder / "stages" / FOLDERS[stage]
    log = home / "metrics.jsonl"
    logged = log.read_bytes().count(b"\n") if log.exists() else 0
    if any(home.glob("checkpoints/*.tmp-*")) or any(home.glob("checkpoints/*.aside")):
        return f"{stage}: writing a checkpoint", stage, logged
    if (home / "done.json").exists():
        return f"{stage}: after its end", stage, logged
    if any(home.glob("export*")) or logged == STEPS[stage]:
        return f"{stage}: last checkpoint and export", stage, logged
    return f"{stage}: training", stage, logged


def fingerprint(folder: Path) -> dict[str, str]:
    """Return hashes of all files that must not depend on the kills. Temporary files of killed writers are
    also listed, so that they count as differences."""
    names = [*folder.glob("stages/*/metrics.jsonl"), *folder.glob("stages/*/rollouts.jsonl")]
    names += [
        *folder.glob("stages/*/export/model.safetensors"),
        *folder.glob("evaluations/*/*.samples.jsonl"),
    ]
    for home in folder.glob("stages/*"):
        latest = (home / "checkpoints/latest").read_text().strip()
        names += sorted((home / "checkpoints" / latest).glob("*.safetensors"))
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
    leftovers = [p for p in folder.rglob("*") if ".tmp-" in p.name or p.name.endswith(".aside")]
    return found | {f"leftover {p.relative_to(folder)}": "" for p in leftovers}


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    code = process.wait(timeout=PATIENCE)
    if code != 0:
        raise SystemExit(f"exit code {code}: {log_of(folder).read_text(errors='replace')[-3000:]}")


def killed_run(
    recipe: Path, folder: Path, tally: Tally, budget: int, times: tuple[float, float], draw: random.Random
) -> None:
    """Do one run from beginning to end, with up to ``budget`` kills. ``times`` are the longest waits before and
    during training."""
    before, after = times
    given = 0
    while True:
        process = launch(recipe, folder)
        if given == budget:
            finish(process, folder)
            return
        if draw.random() < SHARE_BEFORE_TRAINING:
            delay = draw.uniform(0, before)
        else:
            wait_for_training(process, folder)
            delay = draw.uniform(0, after)
        try:
            code = process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        if code != -signal.SIGKILL:
            finish(process, folder)  # it finished before the kill
            return
        given += 1
        tally.kills += 1
        what, stage, step = place(folder)
        tally.where[what] += 1
        if stage:
            tally.steps[stage].append(step)
        print(
            f"kill {tally.kills} (run {tally.runs + 1}): {what}{f', step {step}' if stage else ''}",
            file=sys.stderr,
        )


def begin(folder: Path, reference: Path, stage: str) -> None:
    """For ``--stage rl``, give the new run a finished SFT stage, so that only RL is killed."""
    if stage == "rl":
        folder.mkdir()
        shutil.copy(reference / "resolved.toml", folder)
        shutil.copytree(reference / "stages/01-sft", folder / "stages/01-sft")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stage", choices=["sft", "rl", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder, and keep it")
    given = parser.parse_args()
    work = given.keep or Path(tempfile.mkdtemp(prefix="truestep-kill-"))
    work.mkdir(parents=True, exist_ok=True)
    recipe, draw, tally, began = work / "kill.toml", random.Random(given.seed), Tally(), time.monotonic()
    head, cut, tail = RECIPE.partition('[[stages]]\nkind = "rl"')
    without_rl = head + "[evaluate]" + tail.partition("[evaluate]")[2]
    recipe.write_text(without_rl if given.stage == "sft" else head + cut + tail)
    reference = work / "reference"
    process = launch(recipe, reference)
    start = time.monotonic()
    wait_for_training(process, reference)
    until_training = time.monotonic() - start
    finish(process, reference)
    training = time.monotonic() - start - until_training
    expected = fingerprint(reference)
    rows = [
        json.loads(x)
        for p in reference.glob("stages/02-rl/metrics.jsonl")
        for x in p.read_text().splitlines()
    ]
    learned = sum(row["rl/grad_norm"] > 0 for row in rows)
    print(f"uninterrupted: {until_training:.1f} s until training, {training:.1f} s of training, {len(expected)} hashes, "
          f"{learned} of {len(rows)} RL steps with a gradient", file=sys.stderr)  # fmt: skip
    while tally.kills < given.kills:
        folder = work / f"run-{tally.runs:03d}"
        begin(folder, reference, given.stage)
        # The longest wait is a third of the training time: a few kills per run, and each launch still makes
        # progress.
        killed_run(recipe, folder, tally, given.kills - tally.kills, (until_training, training / 3), draw)
        tally.runs += 1
        got = fingerprint(folder)
        bad = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
        tally.mismatches += [f"{folder.name}: {k}" for k in bad]
        if not bad and given.keep is None:
            shutil.rmtree(folder)
    for what, count in sorted(tally.where.items()):
        print(f"{count:4d}  {what}", file=sys.stderr)
    print(
        json.dumps(
            {
                "kills": tally.kills,
                "runs": tally.runs,
                "mismatches": len(tally.mismatches),
                "seconds": round(time.monotonic() - began, 1),
                "where": dict(sorted(tally.where.items())),
                "steps": {stage: sorted(steps) for stage, steps in tally.steps.items()},
                "differing": tally.mismatches[:20],
                "hashes": len(expected),
            }
        )
    )
    if given.keep is None and not tally.mismatches:
        shutil.rmtree(work)
    sys.exit(1 if tally.mismatches else 0)


if __name__ == "__main__":
    main()
