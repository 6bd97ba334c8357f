"""Right runs of the live guard: how often it accuses one, and how large its noise is.

Every run draws its model, dtype, optimizer, micro-batches, rows, clip, checkpointing and adapters at random, and
takes four real optimizer steps, of which three are watched. Half of the runs have two gloo ranks.
usage: python benchmarks/guard_noise.py [--runs 300] [--seed 0] [--out FILE]"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from truestep.rundir import provenance

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE / "tests" / "guard"))
from faulty_loops import Loop, clip_by, limited, nothing, train  # noqa: E402

ARCHS = ("plain", "llama", "qwen2", "gpt2")


def draw(seed: int) -> tuple[dict[str, Any], Loop, torch.dtype, int]:
    """Return (description, loop, dtype, micro-batches) of a right run."""
    random = np.random.default_rng([seed, 18])
    about: dict[str, Any] = {"seed": seed, "arch": str(random.choice(ARCHS))}
    about["dtype"] = str(random.choice(["float32", "bfloat16", "autocast"]))
    about["optimizer"] = str(random.choice(["adamw", "sgd"]))
    # Plain SGD moves a bfloat16 parameter only at a large rate; smaller updates are lost, which is a finding.
    about["rate"] = float(random.choice([0.003, 0.01])) if about["optimizer"] == "adamw" else 0.5
    if about["dtype"] == "bfloat16":
        about["optimizer"], about["rate"] = "adamw", 0.01
    about |= {"micro": int(random.integers(1, 9)), "rows": int(random.integers(1, 5))}
    about["lora"] = bool(random.random() < 0.25) and about["arch"] != "gpt2"
    about["checkpointing"] = bool(random.random() < 0.3) and about["arch"] != "plain"
    about["clip"] = float(random.choice([0.0, 0.05, 1.0]))
    loop = Loop(
        arch=about["arch"], optimizer=about["optimizer"], rate=about["rate"], rows=about["rows"], lora=about["lora"],
        checkpointing=about["checkpointing"], autocast=about["dtype"] == "autocast", stop=True, seed=seed,
        clip=clip_by(limited(about["clip"])) if about["clip"] else nothing,
        declared={"max_grad_norm": about["clip"]},
    )  # fmt: skip
    return about, loop, torch.bfloat16 if about["dtype"] == "bfloat16" else torch.float32, about["micro"]


def child(asked: Any) -> None:
    torch.set_num_threads(1)
    if asked.ranks > 1:
        store = f"file://{asked.store}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=asked.rank, world_size=asked.ranks
        )
    for seed in range(asked.first, asked.first + asked.runs):
        about, loop, dtype, micro = draw(seed)
        records, _, failure = train(loop, dtype, asked.rank, asked.ranks, micro)
        errors = [abs(w - 1) for r in records for rank in r["weights"] for w in rank]
        told = {
            **about, "ranks": asked.ranks, "failure": failure, "verdicts": [r["verdict"] for r in records],
            "faults": [r["fault"] for r in records if r["fault"]], "notes": sorted({n for r in records for n in r["notes"]}),
            "error": max(errors, default=None), "residual": max((r["residual"] or 0 for r in records), default=None),
            "condition": max((r["condition"] or 0 for r in records), default=None),
        }  # fmt: skip
        if asked.rank == 0:
            print(json.dumps(told), flush=True)


def run(asked: Any, ranks: int, first: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        base = [sys.executable, __file__, "--child", "--ranks", str(ranks), "--first", str(first)]
        base += ["--runs", str(asked.runs), "--store", f"{folder}/store", "--rank"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        started = [subprocess.Popen([*base, str(rank)], **pipes) for rank in range(ranks)]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a child process failed")
    return [json.loads(line) for line in said[0].splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=300, help="of each number of ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    for name, default in (("--ranks", 1), ("--rank", 0), ("--first", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--store", default="")
    asked = parser.parse_args()
    if asked.child:
        child(asked)
        return 0
    rows = [row for ranks in (1, 2) for row in run(asked, ranks, asked.seed + 10**6 * ranks)]
    wrong = [row for row in rows if set(row["verdicts"]) != {"RIGHT"} or row["failure"]]
    table: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "autocast"):
        mine = [row for row in rows if row["dtype"] == dtype]
        table[dtype] = {"runs": len(mine), "wrong": sum(row in wrong for row in mine)}
        for key in ("error", "residual"):
            values = [row[key] for row in mine if row[key] is not None]
            table[dtype][key] = {"median": float(np.median(values)), "largest": max(values)}
        print(dtype, json.dumps(table[dtype]))
    print(
        f"{len(rows)} right runs, {len(wrong)} accused or off; notes: {Counter(n[:24] for r in rows for n in r['notes'])}"
    )
    for row in wrong:
        print(json.dumps(row))
    if asked.out:
        document = {
            "command": f"python benchmarks/guard_noise.py --runs {asked.runs} --seed {asked.seed}",
            "commit": provenance(0)["commit"],
            "torch": torch.__version__,
            "table": table,
            "wrong": wrong,
        }
        asked.out.write_text(json.dumps({**document, "runs": len(rows)}, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
