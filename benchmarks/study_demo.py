"""The demo with its controls over three seeds, as declared in docs/studies/demo.md.

    python benchmarks/study_demo.py [--seeds 1 2 3] [--out runs/study-demo] [--workers 2] [--results results/study-demo]

Every cell is an ordinary run of the command line, resumable, on one thread; a finished cell is not done again. The SFT
checkpoint of a seed is trained once and shared by all arms. Writes results.json and a table with provenance.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from truestep.evaluate.compare import compare
from truestep.evaluate.estimate import t_quantile
from truestep.rundir import provenance, read_json, read_jsonl, to_toml, write_atomic, write_json
from truestep.settings import load_settings

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SHARED = ("sft",)  # the stage that all arms have in common


def train(recipe: str, out: Path, seed: int, *overrides: str) -> Path:
    """One cell through the command line; raises with its last words where it fails."""
    command = [sys.executable, "-m", "truestep", "run", str(RECIPES / recipe), "--out", str(out), "--resume"]
    for item in (*common(seed), *overrides):
        command += ["--set", item]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    print(f"done: {out}", flush=True)
    return out


def common(seed: int) -> tuple[str, ...]:
    return (f"seed={seed}", "compute.threads=1")


def share_sft(source: Path, target: Path, resolved: str) -> None:
    """Give an arm the SFT stage and evaluations that another arm of the same seed has made; identities are checked."""
    if target.exists():
        return
    target.mkdir(parents=True)
    shutil.copytree(source / "stages" / "01-sft", target / "stages" / "01-sft")
    for name in ("base", *SHARED):
        shutil.copytree(source / "evaluations" / name, target / "evaluations" / name)
    write_atomic(target / "resolved.toml", resolved)


def stage(run: Path, name: str) -> dict[str, Any]:
    return next(s for s in read_json(run / "summary.json")["stages"] if s["name"] == name)


def equal_steps(flops: float, sft: dict[str, Any]) -> int:
    """Steps of SFT (32 sequences each) that cost as many FLOPs by the paper's formula."""
    return round(flops / (sft["flops_paper"] / sft["steps"]))


def seed_cells(root: Path, seed: int) -> None:
    """All arms of one seed, one after the other: RL first, since the others are given its FLOPs."""
    rl = train("demo.toml", root / f"rl-{seed}", seed)
    steps = equal_steps(stage(rl, "rl")["flops_paper"], stage(rl, "sft"))
    for arm, recipe, key in (
        ("continued", "study-demo-continued.toml", "continued"),
        ("rejection", "study-demo-rejection.toml", "rejection"),
    ):
        target = root / f"{arm}-{seed}"
        own = (f"stages.{key}.steps={steps}", f"stages.{key}.dev.every_steps={max(50, steps // 10)}")
        share_sft(rl, target, to_toml(load_settings(RECIPES / recipe, common(seed) + own).model_dump(mode="json")))
        train(recipe, target, seed, *own)


def samples(run: Path, checkpoint: str) -> list[dict[str, Any]]:
    rows = read_jsonl(run / "evaluations" / checkpoint / "test.samples.jsonl")
    return [row for row in rows if "verdict" in row]


def analyse(root: Path, seeds: list[int]) -> dict[str, Any]:
    arms = {"base": ("rl", "base"), "sft": ("rl", "sft"), "sft→rl": ("rl", "rl"),
            "sft→continued": ("continued", "continued"), "sft→rejection": ("rejection", "rejection")}  # fmt: skip
    table: dict[str, Any] = {}
    for arm, (folder, checkpoint) in arms.items():
        cells = []
        for seed in seeds:
            run = root / f"{folder}-{seed}"
            found = next(s for s in read_json(run / "summary.json")["scores"] if s["checkpoint"] == checkpoint)
            work = [s for s in read_json(run / "summary.json")["stages"] if s["name"] in ("sft", checkpoint)]
            work = [] if arm == "base" else work
            kept = {key: found[key] for key in ("score", "low", "high", "n")}
            cells.append({"seed": seed, **kept,
                          "flops_paper": sum(s["flops_paper"] for s in work),
                          "flops_full": sum(s["flops_full"] for s in work)})  # fmt: skip
        table[arm] = {"cells": cells, **interval([c["score"] for c in cells])}
    contrasts = {}
    for name, (folder, checkpoint) in list(arms.items())[1:]:
        if name == "sft→rl":
            continue
        cells = [
            compare(samples(root / f"{folder}-{s}", checkpoint), samples(root / f"rl-{s}", "rl")).to_json()
            for s in seeds
        ]
        contrasts[f"sft→rl − {name}"] = {"cells": cells, **interval([c["difference"] for c in cells])}
    return {"seeds": seeds, "arms": table, "contrasts": contrasts}


def interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds with a t interval (seeds are the unit; problems are the same in every cell)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": float("-inf"), "high": float("inf")}
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def shown(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def markdown(found: dict[str, Any], stamp: dict[str, Any]) -> str:
    seeds = [f"seed {s}" for s in found["seeds"]]
    machine = (
        f"{stamp['hardware']['cpu']}, {stamp['hardware']['cores']} cores, torch {stamp['versions'].get('torch', '?')}"
    )
    lines = [
        "# The demo study: results",
        "",
        f"Declared in `docs/studies/demo.md`. Commit `{stamp['commit'][:12]}`, "
        f"`python benchmarks/study_demo.py`, {machine}.",
        "",
        "Score in % on 500 held-out problems [95 % over problems]; mean over seeds [95 % t interval over seeds].",
        "",
        row("arm", *seeds, "mean", "FLOPs (paper)", "FLOPs (fuller)"),
        row(*["---"] * (len(seeds) + 4)),
    ]
    for arm, found_arm in found["arms"].items():
        cells = [shown(c["score"], c["low"], c["high"]) for c in found_arm["cells"]]
        work = [f"{statistics.fmean(c[k] for c in found_arm['cells']):.2e}" for k in ("flops_paper", "flops_full")]
        lines.append(row(arm, *cells, shown(found_arm["mean"], found_arm["low"], found_arm["high"]), *work))
    lines += ["", "Paired differences (same problems, same seed), in points:", "", row("contrast", *seeds, "mean"),
              row(*["---"] * (len(seeds) + 2))]  # fmt: skip
    for name, contrast in found["contrasts"].items():
        cells = [shown(c["difference"], c["low"], c["high"], "+") for c in contrast["cells"]]
        lines.append(row(name, *cells, shown(contrast["mean"], contrast["low"], contrast["high"], "+")))
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/study-demo"))
    parser.add_argument("--results", type=Path, default=Path("results/study-demo"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with ThreadPoolExecutor(given.workers) as pool:
        for done in [pool.submit(seed_cells, given.out, seed) for seed in given.seeds]:
            done.result()
    stamp = provenance(given.seeds[0])
    found = analyse(given.out, given.seeds)
    write_json(given.results / "results.json", {**found, "provenance": stamp})
    write_atomic(given.results / "README.md", markdown(found, stamp))
    print(json.dumps({k: v["mean"] for k, v in found["arms"].items()}))
    print(given.results)


if __name__ == "__main__":
    main()
