"""Flip bits of files that a command reads again, and kill commands at random moments; no result may differ.

    python benchmarks/damage.py --flips 500 --kills 200 [--seed 0] [--work FOLDER] [--only PART] [--out JSON]

FOLDER gets a tiny run (whole, and interrupted in RL), evaluations and a study. Every trial runs one command of
the table below on a copy, in a process that is forked after all imports. A flip changes one random bit of one
file. It is *refused* (exit code other than 0 and one line), *harmless* (exit code 0 and the outputs of an
undamaged folder, because the damage was repaired or never read), *silent* (exit code 0, other outputs) or a
*crash* (a traceback). A kill sends SIGKILL to all processes of the command after a random time; then the same
command must end with the outputs of a command that was never killed, and leave no unfinished file.

Trials are recorded in FOLDER/trials.jsonl; a second call with the same FOLDER and seed does only what is
missing. Prints one JSON object; exits with 1 if a trial is silent, a crash or different.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "contract"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "study"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import torch
from kill_study import small
from micro import STUDY, write_study
from tiny_runs import EVALUATION, write_recipe

import truestep.cli.study as study_command
import truestep.pipeline.run
import truestep.report.html
from truestep import signals
from truestep.cli.main import main as truestep
from truestep.rundir import UNFINISHED

PATIENCE = 300.0  # seconds after which a command counts as hung
TIMES = ("seconds", "provenance", "sha256")  # what differs between two runs in JSON files
WRITTEN = (".log", ".lock", "trials.jsonl")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command on a copy of a folder. ``files`` are what it reads again; ``outputs`` must not depend on
    damage. All are patterns relative to the trial's folder. A weight of 0 means that the command has no such
    trial."""

    name: str
    folder: str
    words: Sequence[str]
    files: Sequence[str]
    outputs: Sequence[str]
    flips: float = 1.0
    kills: float = 1.0
    before_kill: str = ""  # the folder of a killed command, if it is another one
    prepare: Callable[[Path], None] = field(default=lambda trial: None)


RUN = ("run/stages/*/metrics.jsonl", "run/stages/*/rollouts.jsonl", "run/stages/*/export/*", "run/stages/*/done.json",
       "run/evaluations/**/*.json*", "run/summary.json", "run/resolved.toml")  # fmt: skip
READ = (
    "run/resolved.toml",
    "run/summary.json",
    "run/provenance.json",
    "run/stages/**/*",
    "run/evaluations/**/*",
)
EVAL = ("eval/evaluations/**/*.json*", "eval/summary.json")


def _no_cells(trial: Path) -> None:
    """Leave the runs of a study's cells, from which their results are then made again."""
    for path in trial.glob("study/cells/*/cell.json"):
        path.unlink()


COMMANDS = (
    Command(name="resume", folder="half", words=["run", "recipe/run.toml", "--out", "run", "--resume"],
            files=READ, outputs=RUN, flips=3.0, kills=3.0, before_kill="new"),
    Command(name="resume of a finished run", folder="whole", files=READ, outputs=RUN, flips=1.0,
            words=["run", "recipe/run.toml", "--out", "run", "--resume"], kills=0.5),
    Command(name="eval", folder="evaluate", files=("model/*",), outputs=EVAL,
            words=["eval", "recipe/eval.toml", "--out", "eval", "--resume"]),
    Command(name="resume of an evaluation", folder="evaluated", outputs=EVAL,
            files=("eval/*.*", "eval/evaluations/**/*", "cache/*"),
            words=["eval", "recipe/eval.toml", "--out", "eval", "--resume"]),
    Command(name="report", folder="whole", files=READ, outputs=("run/report.html",), words=["report", "run"]),
    Command(name="report of an evaluation", folder="evaluated", outputs=("eval/report.html",), words=["report", "eval"],
            files=("eval/resolved.toml", "eval/summary.json", "eval/provenance.json", "eval/evaluations/**/*")),
    Command(name="eval compare", folder="whole", files=("run/evaluations/**/*",), outputs=("said",), kills=0.2,
            words=["eval", "compare", "run/evaluations/sft", "run/evaluations/rl"]),
    Command(name="eval export", folder="whole", files=("run/evaluations/**/*", "run/*.json"), outputs=("exported/**/*",), kills=0.5,
            words=["eval", "export", "run", "--out", "exported"]),
    Command(name="eval import", folder="whole", files=("run/evaluations/rl/*",), outputs=("imported/evaluations/**/*",), kills=0.0,
            words=["eval", "import", "run/evaluations/rl/test.samples.jsonl", "--out", "imported"], flips=0.5),
    Command(name="study", folder="study", outputs=("study/results.json", "study/table.*", "study/compact/*/*.json"), flips=0.4,
            files=("study/cells/*/cell.json", "study/base/identity", "study/cells/*/run/stages/*/done.json"), kills=0.3,
            words=["study", "recipe/study.toml", "--out", "study"], before_kill="no-study"),
    Command(name="study from its runs", folder="study", prepare=_no_cells, kills=0.0, flips=0.4,
            outputs=("study/results.json", "study/table.*", "study/compact/*/*.json"),
            files=("study/cells/*/run/**/*",), words=["study", "recipe/study.toml", "--out", "study"]),
    Command(name="report of a study", folder="study", outputs=("study/report.html", "study/table.*"), words=["report", "study"],
            files=("study/results.json", "study/provenance.json", "study/compact/*/*.json"), kills=0.5),
)  # fmt: skip


def fork(words: Sequence[str], folder: Path, stop_at: float = 0.0) -> tuple[int, str]:
    """Run a command in a forked process; return its exit code (minus the signal) and its stderr. ``stop_at``
    is the number of seconds after which all of its processes are killed; 0 for none."""
    log = folder / "trial.log"
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            os.environ["TRUESTEP_CACHE"] = str(folder / "cache")
            study_command.trainer_verdict = lambda: "left out"  # 20 s, and it reads none of these files
            for number, path in ((1, folder / "said"), (2, log)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            sys.argv = ["truestep", *words]
            truestep()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + (stop_at or PATIENCE)
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its child processes too
    if not done:
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def outputs_of(command: Command, trial: Path) -> dict[str, str]:
    """Return hashes of the outputs, and the names of unfinished files."""
    found = {}
    for path in sorted({p for pattern in command.outputs for p in trial.glob(pattern) if p.is_file()}):
        data = path.read_bytes()
        if path.suffix == ".json" and path.name != "truestep_export.json":
            with contextlib.suppress(ValueError):
                data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
        if path.name == "README.md":  # of an export; has the commit and the command
            continue
        found[str(path.relative_to(trial))] = hashlib.sha256(data).hexdigest()
    for path in trial.rglob("*"):
        if path.name.endswith(UNFINISHED):
            found[f"unfinished {path.relative_to(trial)}"] = ""
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _timeless(v)
            for k, v in value.items()
            if k not in TIMES and not (k == "files" and "ledger_after" in value)
        }
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def fresh(work: Path, folder: str) -> Path:
    """Return WORK/trial, a copy of a prepared folder. All trials have the same path, as pages show it."""
    trial = work / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(work / folder, trial, symlinks=True)
    return trial


def prepare(work: Path) -> None:
    """Make the folders that the commands work on."""
    new = work / "new"
    write_recipe(new / "recipe")
    text = (new / "recipe/run.toml").read_text()
    dev = 'dev = { data = "dev", every_steps = 2, select_best = true }\noptimizer = { lr = 5e-3 }'
    text = text.replace("optimizer = { lr = 5e-3 }", dev)
    (new / "recipe/run.toml").write_text(text + '\n[data.dev]\nsource = "dev.jsonl"\n')
    shutil.copy(new / "recipe/train.jsonl", new / "recipe/dev.jsonl")
    write_study(new / "recipe", small(STUDY))
    words = COMMANDS[0].words
    trial = fresh(work, "new")
    check(fork(words, trial), "run")
    shutil.copytree(trial, work / "whole", symlinks=True)
    _interrupted(words, fresh(work, "new"), work / "half")
    trial = fresh(work, "new")
    shutil.copytree(work / "whole/run/stages/02-rl/export", trial / "model")
    (trial / "recipe/eval.toml").write_text(EVALUATION.format(model="../model"))
    shutil.copytree(trial, work / "evaluate")
    evaluation = next(c for c in COMMANDS if c.name == "eval")
    check(fork(evaluation.words, trial), "eval")
    shutil.copytree(trial, work / "evaluated")
    trial = fresh(work, "new")
    shutil.copytree(trial, work / "no-study")
    study = next(c for c in COMMANDS if c.name == "study")
    check(fork(study.words, trial), "study")
    shutil.copytree(trial, work / "study", symlinks=True)


def _interrupted(words: Sequence[str], trial: Path, into: Path) -> None:
    """Run until the RL stage has saved its second checkpoint, then stop as after SIGTERM."""

    class Alarm:
        def __bool__(self) -> bool:
            return len(list(trial.glob("run/stages/02-rl/checkpoints/step_*"))) >= 2

        def __getitem__(self, index: int) -> int:
            return signal.SIGTERM

        def clear(self) -> None:
            pass

    signals._pending, kept = Alarm(), signals._pending  # type: ignore[assignment]
    code, said = fork(words, trial)
    signals._pending = kept
    if code != 143:
        raise SystemExit(f"the run was not interrupted: exit code {code}\n{said[-2000:]}")
    shutil.copytree(trial, into, symlinks=True)


def check(ended: tuple[int, str], what: str) -> None:
    if ended[0] != 0:
        raise SystemExit(f"{what}: exit code {ended[0]}\n{ended[1][-3000:]}")


def reference(work: Path, command: Command, kill: bool) -> tuple[dict[str, str], float]:
    """Return the outputs of the command on an intact folder, and how long it took."""
    trial = fresh(work, (kill and command.before_kill) or command.folder)
    command.prepare(trial)
    began = time.monotonic()
    check(fork(command.words, trial), command.name)
    return outputs_of(command, trial), time.monotonic() - began


def flipped(work: Path, command: Command, expected: dict[str, str], draw: random.Random) -> dict[str, Any]:
    trial = fresh(work, command.folder)
    command.prepare(trial)
    files = sorted(
        {p for pattern in command.files for p in trial.glob(pattern) if p.is_file() and p.stat().st_size}
    )
    path = draw.choice([p for p in files if not p.name.endswith(WRITTEN) and p.name != "report.html"])
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # exports that two runs of a study share are hard-linked
    path.write_bytes(data)
    code, said = fork(command.words, trial)
    lines = said.strip().splitlines()
    found = {"file": str(path.relative_to(trial)), "bit": bit, "code": code}
    if "Traceback (most recent" in said or code in (70, -signal.SIGKILL):
        return found | {"result": "crash", "said": "\n".join(lines[-6:])}
    if code:
        return found | {"result": "refused", "said": lines[-1] if lines else ""}
    got = outputs_of(command, trial)
    differing = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
    return found | {"result": "silent" if differing else "harmless", "differing": differing[:5]}


def killed(
    work: Path, command: Command, expected: dict[str, str], seconds: float, draw: random.Random
) -> dict[str, Any]:
    trial = fresh(work, command.before_kill or command.folder)
    command.prepare(trial)
    after = draw.uniform(0, 1.1 * seconds)
    first, _ = fork(command.words, trial, stop_at=after)
    code, said = fork(command.words, trial)
    found = {"after": round(after, 2), "killed": first == -signal.SIGKILL, "code": code}
    if code:
        return found | {"result": "different", "said": "\n".join(said.strip().splitlines()[-4:])}
    got = outputs_of(command, trial)
    differing = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
    return found | {"result": "different" if differing else "same", "differing": differing[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="", help="commands whose name contains this text")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = (given.work or Path(tempfile.mkdtemp(prefix="truestep-damage-"))).resolve()
    if not (work / "study").is_dir():
        shutil.rmtree(work, ignore_errors=True)
        prepare(work)
    log = work / "trials.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["command"], row["kind"], row["number"], row["seed"]) for row in rows}
    for kind, total in (("flip", given.flips), ("kill", given.kills)):
        weights = {c.name: c.flips if kind == "flip" else c.kills for c in COMMANDS}
        for command in COMMANDS:
            num = -(-int(total * weights[command.name] * 1000) // int(sum(weights.values()) * 1000))
            wanted = [n for n in range(num) if (command.name, kind, n, given.seed) not in done]
            if not wanted or given.only not in command.name:
                continue
            expected, seconds = reference(work, command, kind == "kill")
            for number in wanted:
                draw, began = random.Random(f"{given.seed}/{kind}/{command.name}/{number}"), time.monotonic()
                one = (
                    flipped(work, command, expected, draw)
                    if kind == "flip"
                    else killed(work, command, expected, seconds, draw)
                )
                row = {"command": command.name, "kind": kind, "number": number, "seed": given.seed, **one}
                rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
                with log.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                if one["result"] in ("silent", "crash", "different"):
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report(rows, given.out)


def report(rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    counts = {
        kind: {
            command: dict(Counter(r["result"] for r in rows if (r["kind"], r["command"]) == (kind, command)))
            for command in dict.fromkeys(r["command"] for r in rows if r["kind"] == kind)
        }
        for kind in ("flip", "kill")
    }
    totals = {kind: dict(Counter(r["result"] for r in rows if r["kind"] == kind)) for kind in counts}
    num_killed = sum(r["kind"] == "kill" and r["killed"] for r in rows)
    bad = [r for r in rows if r["result"] in ("silent", "crash", "different")]
    document = {"totals": totals, "killed_before_the_end": num_killed, "commands": counts, "bad": bad}
    text = json.dumps(document, indent=1)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
