"""Runs training loops of the frameworks with the live guard and without it, and writes results/guard_frameworks.json.

    python benchmarks/guard_frameworks.py [--only TEXT] [--add] [--python NAME=PATH ...]

Environments: ``now`` (peft, TRL and the newest DeepSpeed), ``deepspeed-0.18.9``, ``transformers-4.45.2``,
``openrlhf-0.10.2``, ``llamafactory-0.9.5``, ``axolotl-0.19.0`` and ``liger-0.8.5``; truestep builds and caches those
that no PATH is given for, and the loops of one that cannot be built are left out with the reason. Loops of torch,
accelerate and transformers run in this environment. Every loop must give the same bits with the guard and without it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "tests" / "guard" / "framework_run.py"
REQUIREMENTS = {
    "now": "trl==1.16.0+peft==0.19.0+deepspeed==0.19.8",
    "deepspeed-0.18.9": "deepspeed==0.18.9+transformers==5.19.0",
    "transformers-4.45.2": "transformers==4.45.2+pydantic==2.14.4",
    "openrlhf-0.10.2": "openrlhf==0.10.2",
    "llamafactory-0.9.5": "llamafactory==0.9.5",
    "axolotl-0.19.0": "axolotl==0.19.0",
    "liger-0.8.5": "liger-kernel==0.8.5+triton==3.9.0+transformers==5.19.0",
}
LIMIT = 1200.0  # seconds for one child
Result = dict[str, Any]
sys.path[:0] = [str(RUN.parent), str(Path(__file__).resolve().parent)]


def plan() -> list[tuple[str, str, int, list[str]]]:
    """Return (environment, modules, ranks, loops) of every group of children."""
    import framework_fsdp1  # noqa: F401
    import framework_loops  # noqa: F401
    import framework_more  # noqa: F401
    from framework_run import LOOPS

    own = dict(LOOPS)
    import guard_loops  # noqa: F401
    import guard_loops_tuners  # noqa: F401

    others = {name: about for name, (_, about) in LOOPS.items() if name not in own}
    groups: list[tuple[str, str, int, list[str]]] = []
    for ranks in (1, 2):
        here = [name for name, (_, about) in own.items() if about.get("ranks", 1) == ranks]
        now = [name for name, about in others.items() if about.get("ranks", 1) == ranks]
        groups.append(("", "framework_loops,framework_more,framework_fsdp1", ranks, here))
        for kind in ("peft", "trl", "deepspeed"):
            groups.append(("now", "guard_loops", ranks, [n for n in now if n.startswith(kind)]))
        older = [n for n in now if n.startswith("deepspeed")]
        groups.append(("deepspeed-0.18.9", "guard_loops", ranks, older))
    groups.append(("transformers-4.45.2", "guard_loops", 1, ["transformers_4_45"]))
    groups.append(("openrlhf-0.10.2", "guard_loops", 1, ["openrlhf_sft"]))
    for environment in ("llamafactory-0.9.5", "axolotl-0.19.0", "liger-0.8.5"):
        names = [n for n in others if n.startswith(environment.partition("-")[0])]
        # For an adapter, axolotl changes classes of transformers, so each of its loops runs in a separate process.
        for own in [[n] for n in names] if environment.startswith("axolotl") else [names]:
            groups.append((environment, "guard_loops_tuners", 1, own))
    return [group for group in groups if group[3]]


def interpreter(name: str, given: dict[str, str]) -> str:
    """Return the Python of an environment, or an empty text if it cannot be built."""
    if not name:
        return sys.executable
    if name in given:
        return given[name]
    from truestep.audit.environments import virtual

    try:
        return str(virtual.build(REQUIREMENTS[name], say=lambda line: print(line, file=sys.stderr)))
    except virtual.BuildFailed as error:
        print(f"{name:20} left out: {error}")
        return ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(python: str, modules: str, ranks: int, names: list[str]) -> list[list[Result]]:
    """Return each loop's result on each rank."""
    shared = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")]),
    }
    if ranks > 1:
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(ranks))
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **sizes}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        children = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            log = (Path(folder) / f"log.{rank}").open("w")
            command = [python, str(RUN), modules, str(out), *names]
            environment = {**os.environ, **shared, **own}
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        for child in children:
            try:
                child.wait(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                child.kill()
        lines = [Path(f"{out}.{r}").read_text().splitlines() if Path(f"{out}.{r}").exists() else []
                 for r in range(ranks)]  # fmt: skip
        done = [[json.loads(line) for line in each] for each in zip(*lines, strict=False)]
        if len(done) < len(names):
            print((Path(folder) / "log.0").read_text()[-2000:], file=sys.stderr)
            done.append([{"name": names[len(done)], "crash": "the process ended or was too slow"}] * ranks)
        return done


def row(environment: str, ranks: list[Result]) -> Result:
    """Return one row of the results. A clean loop is one whose wanted verdict is not FAULT."""
    first = ranks[0]
    records = first.get("records", [])
    wanted, code = first.get("verdict", "RIGHT"), first.get("code", "")
    if environment == "deepspeed-0.18.9" and first["name"].startswith("deepspeed_2_offload"):
        wanted, code = "FAULT", "kept"
    faults = [r for r in records if r["verdict"] == "FAULT"]
    is_clean = wanted != "FAULT"
    return {
        "loop": first["name"], "environment": environment or "development", "versions": first.get("versions", {}),
        "dtype": first.get("dtype", "float32"), "ranks": len(ranks), "crash": first.get("crash", ""),
        "bit_equal": all(r.get("bit_equal", False) for r in ranks), "failure": first.get("failure", ""),
        "wanted": wanted, "verdicts": [r["verdict"] for r in records],
        "codes": sorted({c for r in faults for c in r["codes"]}),
        "first_finding": faults[0]["step"] if faults else None, "fault": faults[0]["fault"] if faults else "",
        "false_alarms": len(faults) if is_clean else sum(not set(r["codes"]) <= set(code.split()) for r in faults),
        "missed": 0 if is_clean else sum(r["verdict"] != "FAULT" for r in records[first.get("at", 1) - 1 :]),
        "tokens_read": sum(bool(r["token_weights"]) for r in records), "watched": len(records),
        "largest_residual": max((r["residual"] for r in records if r["residual"] is not None), default=None),
        "weights": records[0]["weights"] if records else [], "notes": records[0]["notes"] if records else [],
        "guard_seconds": [r["seconds"] for r in records],
    }  # fmt: skip


def shown(one: Result) -> str:
    state = one["crash"] or one["failure"] or ("same bits" if one["bit_equal"] else "OTHER BITS")
    verdicts = ",".join(dict.fromkeys(one["verdicts"]))
    found = f"{'+'.join(one['codes'])} at {one['first_finding']}" if one["codes"] else ""
    bad = (
        f"{one['false_alarms']} false, {one['missed']} missed" if one["false_alarms"] or one["missed"] else ""
    )
    residual = "" if one["largest_residual"] is None else f"{one['largest_residual']:.0e}"
    tokens = f"{one['tokens_read']}/{one['watched']}"
    return (
        f"{one['environment']:20} {one['loop']:34} {one['ranks']} {one['dtype']:9} {state[:60]:10} {verdicts:15} "
        f"{residual:6} {tokens:4} {found} {bad}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", default="", help="loops or environments whose name contains this")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows in the file of loops that did not run"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "guard_frameworks.json")
    options = parser.parse_args()
    given = dict(text.split("=", 1) for text in options.python)
    rows: list[Result] = []
    for environment, modules, ranks, names in plan():
        chosen = [n for n in names if options.only in n or options.only in (environment or "development")]
        if not chosen:
            continue
        if not (python := interpreter(environment, given)):
            continue
        for found in run(python, modules, ranks, chosen):
            rows.append(row(environment, found))
            print(shown(rows[-1]), flush=True)
    if options.add:
        ran = {(r["loop"], r["environment"]) for r in rows}
        before = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        rows = [r for r in before if (r["loop"], r["environment"]) not in ran] + rows
    clean = [r for r in rows if r["wanted"] != "FAULT"]
    summary = {
        "loops": len(rows), "clean_loops": len(clean), "clean_steps": sum(r["watched"] for r in clean),
        "false_alarms": sum(r["false_alarms"] for r in rows), "missed": sum(r["missed"] for r in rows),
        "other_bits": sum(not r["bit_equal"] for r in rows), "crashes": sum(bool(r["crash"]) for r in rows),
    }  # fmt: skip
    print(" · ".join(f"{k.replace('_', ' ')} {v}" for k, v in summary.items()))
    options.out.parent.mkdir(exist_ok=True)
    text = json.dumps(
        {"command": " ".join(["python", "benchmarks/guard_frameworks.py"]), **summary, "rows": rows}
    )
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
