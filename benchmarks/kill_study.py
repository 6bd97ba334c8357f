"""Kill a study, or run it with a different engine; it must end with the same bytes as an uninterrupted one.

    python benchmarks/kill_study.py --kills 3 [--seed 0] [--work FOLDER]
    python benchmarks/kill_study.py --kills 0 --engine ray [--python PYTHON] [--work FOLDER]

A micro study (tests/study/micro.py; with --small a part of it) runs without interruption in FOLDER/reference.
Then it is run again and gets SIGKILL at random moments (a coin flip decides whether its child processes are
killed too), is restarted each time, and finally runs to its end. results.json, the tables, and every compact
cell without its times must be the same, byte for byte. Prints one JSON line; exits with 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "study"))

from micro import STUDY, write_study

from truestep.rundir import read_json, to_toml


def small(text: str) -> str:
    """Return the study with one seed, four arms and no trials: five child processes instead of about
    thirty."""
    raw = tomllib.loads(text)
    raw |= {"seeds": [1], "secondary": [["sft-rl", "coin"]]}
    raw.pop("tuning")
    raw["controls_off"] |= {"sft-continued": "small", "rejection": "small"}
    raw["arms"] = [arm for arm in raw["arms"] if arm["name"] in ("base", "sft", "sft-rl", "coin")]
    return to_toml(raw)


def launch(python: str, study: Path, out: Path, engine: str) -> subprocess.Popen[bytes]:
    words = [python, "-m", "truestep", "study", str(study), "--out", str(out), "--engine", engine]
    log = out.with_name(f"{out.name}.log").open("ab")
    return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    if (code := process.wait()) != 0:
        raise SystemExit(f"exit code {code}: {out.with_name(f'{out.name}.log').read_text()[-3000:]}")


def fingerprint(out: Path) -> dict[str, str]:
    found = {
        name: (out / name).read_text() for name in ("results.json", "table.md", "table.csv", "table.tex")
    }
    for path in sorted(out.glob("compact/*/*.json")):
        cell = {k: v for k, v in read_json(path).items() if k not in ("provenance", "seconds")}  # when, where
        found[str(path.relative_to(out))] = json.dumps(cell)
    for path in sorted(out.glob("cells/*/run/stages/*/export/model.safetensors")):
        found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="local")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="truestep-study-"))
    study = write_study(work, small(STUDY) if given.small else STUDY)
    reference, other = work / "reference", work / f"other-{given.engine}-{given.kills}-{given.seed}"
    timing = work / "seconds"
    if not (reference / "results.json").exists():
        began = time.monotonic()
        finish(launch(sys.executable, study, reference, "local"), reference)
        timing.write_text(str(time.monotonic() - began))
    took, draw, kills = float(timing.read_text()), random.Random(given.seed), []
    for _ in range(given.kills):
        process = launch(given.python, study, other, given.engine)
        try:
            process.wait(timeout=draw.uniform(5, max(10.0, 0.8 * took)))
            break  # it finished before the kill
        except subprocess.TimeoutExpired:
            alone = draw.random() < 0.5
            done = len(list(other.glob("cells/*/cell.json")))
            os.kill(process.pid, signal.SIGKILL) if alone else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append({"children_too": not alone, "cells_done": done})
            print(kills[-1], file=sys.stderr, flush=True)
    finish(launch(given.python, study, other, given.engine), other)
    expected, got = fingerprint(reference), fingerprint(other)
    bad = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
    print(json.dumps({"kills": kills, "engine": given.engine, "compared": len(expected), "differing": bad}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
