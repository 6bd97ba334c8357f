"""Change the code that computes numbers at random places, and count the changes that no test detects.

    python benchmarks/mutate.py [--mutants 200] [--minutes 300] [--jobs 2] [--list] [--only TEXT]

The mutants are drawn once from all that the operators can make, with the last commit that touched tests/ as
the seed. Each is applied in a copy of the tree and tested with the tests that run its line (whole files, if an
import, a fixture or a child process runs it), in one pytest process, which stops at the first failure.
Results are lines in runs/mutate/SEED.jsonl; after Ctrl-C, the same command continues. Exits with 1 if more
than 8 % survive. benchmarks/mutate_equivalent.json is a list, made by hand, of mutants that change nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from coverage import Coverage
from mutants import Mutant, Sites, is_another_program, mutated

from truestep.evaluate.interval import beta_quantile

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/truestep"
TARGETS = ("train", "objective", "rollout", "evaluate", "grade/policy.py", "audit/measure")
EQUIVALENT = ROOT / "benchmarks/mutate_equivalent.json"
NOT_JUDGES = ("tests/architecture/",)  # they check the text of the source, not what it does
FIRST = "tests/golden/test_golden.py"  # detects most changes of a number at once
LARGEST_SHARE = 0.08
RUNNING: set[subprocess.Popen[str]] = set()
STOPPED = threading.Event()


def draw(seed: str, count: int) -> tuple[list[Mutant], int]:
    """Draw ``count`` different mutants of the targets; also return the number of mutants to draw from."""
    paths = [ROOT / PACKAGE / target for target in TARGETS]
    sources = {str(p.relative_to(ROOT)): p.read_bytes()
               for t in paths for p in (sorted(t.rglob("*.py")) if t.is_dir() else [t])}  # fmt: skip
    every = [mutant for file, source in sorted(sources.items()) for mutant in Sites(file, source).found]
    random.Random(seed).shuffle(every)
    drawn = (mutant for mutant in every if is_another_program(sources[mutant.file], mutant))
    return list(islice(drawn, count)), len(every)


def copied(folder: Path) -> Path:
    """Copy the tracked files of the tree, as they are now, to a new folder."""
    for name in subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "-z"], text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def end(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    RUNNING.discard(child)


def pytest_in(folder: Path, files: list[str], seconds: float, *, trace: str = "") -> tuple[int | None, str]:
    """Run these files' fast tests; return the exit code (None: out of time) and output. No child survives."""
    how = ["-m", "coverage", "run", f"--rcfile={trace}"] if trace else []
    words = [
        sys.executable,
        *how,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--timeout=600",  # of one test, beside other work
        "-m",
        "not slow and not gpu",
        *files,
    ]
    path = os.pathsep.join([str(folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        limited = [
            "sh",
            "-c",
            'ulimit -v 33554432; exec "$@"',
            "sh",
            *words,
        ]  # KiB, because a mutant may allocate without end
        child = subprocess.Popen(limited, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                 start_new_session=True)  # fmt: skip
        RUNNING.add(child)
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
        output.seek(0)
        return code, output.read()


def reach_of(folder: Path, test: str) -> dict[str, Any]:
    """Return the lines that a test file runs, with the test functions that run each, and its time. A line that an
    import or a child process runs belongs to no function: "" stands for the whole file."""
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "rc"
        config.write_text(f"[run]\nparallel = true\ndata_file = {scratch}/data\nsource = {folder / PACKAGE}\n"
                          "patch = subprocess\nsigterm = true\ndynamic_context = test_function\n")  # fmt: skip
        began = time.monotonic()
        code, _ = pytest_in(folder, [test], 1800, trace=str(config))
        seconds = time.monotonic() - began
        made = Coverage(config_file=str(config))
        made.combine(strict=False)
        data = made.get_data()
        wanted = tuple(str(folder / PACKAGE / target) for target in TARGETS)
        lines: dict[str, dict[int, list[str]]] = {}
        for file in data.measured_files():
            if file.startswith(wanted):
                found = data.contexts_by_lineno(file)
                lines[str(Path(file).relative_to(folder))] = {
                    line: sorted({name.rpartition(".")[2] for name in names}) for line, names in found.items()
                }
    return {"test": test, "passes": code == 0, "seconds": seconds, "lines": lines}


def judges(mutant: Mutant, reach: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the test files that run the mutant's lines, each with the functions that do (none: the whole file):
    the golden runs, then the others, fastest first."""
    first, last = mutant.reach
    found = []
    for row in reach:
        lines = row["lines"].get(mutant.file, {})
        names = {name for n, functions in lines.items() if first <= int(n) <= last for name in functions}
        if row["passes"] and names:
            found.append({**row, "functions": [] if "" in names else sorted(names)})
    return sorted(found, key=lambda r: (r["test"] != FIRST, r["seconds"]))


def words_of(judge: dict[str, Any]) -> list[str]:
    return [f"{judge['test']}::{name}" for name in judge["functions"]] or [judge["test"]]


def judge(mutant: Mutant, folder: Path, reach: list[dict[str, Any]]) -> dict[str, Any]:
    """Apply the mutant in the copy, run its tests, and put the file back."""
    chosen = judges(mutant, reach)
    row = {**asdict(mutant), "name": mutant.name, "tests": len(chosen), "outcome": "survived", "by": ""}
    began, path = time.monotonic(), folder / mutant.file
    if chosen:
        source = path.read_bytes()
        path.write_bytes(mutated(source, mutant))
        try:
            seconds = 120 + 3 * sum(r["seconds"] for r in chosen)
            code, text = pytest_in(folder, [word for r in chosen for word in words_of(r)], seconds)
            if code in (4, 5):  # pytest does not know one of the functions: run the whole files
                code, text = pytest_in(folder, [r["test"] for r in chosen], seconds)
        finally:
            path.write_bytes(source)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
        row["outcome"] = "timeout" if code is None else "survived" if code == 0 else "killed"
        row["by"] = (
            failed[0]
            if failed
            else ""
            if code == 0
            else text.strip().splitlines()[-1][:200]
            if text.strip()
            else ""
        )
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Log:
    """Writes the results of several threads, one line each, and keeps the copies in which they work."""

    def __init__(self, path: Path, jobs: int, folder: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.free = [copied(folder / str(i)) for i in range(jobs)]

    def work(self, run: Any, stop: float) -> None:
        if time.monotonic() > stop or STOPPED.is_set():
            return
        with self.lock:
            copy = self.free.pop()
        row = run(copy)
        with self.lock:
            self.free.append(copy)
            if STOPPED.is_set():
                return
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                row.get("outcome", "reach"),
                row.get("name", row.get("test")),
                row.get("by", ""),
                row["seconds"],
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=300, help="do not start a mutant after this time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only drawn mutants whose name contains this text")
    parser.add_argument(
        "--tests", default="", help="use only test files that match this pattern (to try it out)"
    )
    parser.add_argument("--list", action="store_true", help="only print the drawn mutants")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also if it was started in the background
        signal.signal(number, signal.default_int_handler)
    seed = subprocess.check_output(
        ["git", "-C", str(ROOT), "log", "-1", "--format=%H", "--", "tests"], text=True
    ).strip()
    drawn, total = draw(seed, given.mutants)
    drawn = [mutant for mutant in drawn if given.only in mutant.name]
    print(f"{len(drawn)} of about {total} mutants, seed {seed}")
    if given.list:
        print("\n".join(f"{m.file}:{m.line} {m.operator}: {m.was!r} → {m.now!r}" for m in drawn))
        return 0
    out = ROOT / "runs/mutate"
    out.mkdir(parents=True, exist_ok=True)
    reach_path, path = out / f"{seed[:12]}.reach.jsonl", out / f"{seed[:12]}.jsonl"
    stop = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        logs = Log(reach_path, given.jobs, Path(folder))
        known = {row["test"] for row in rows_of(reach_path)}
        tests = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py"))
        tests = [
            t for t in tests if not t.startswith(NOT_JUDGES) and t not in known and re.search(given.tests, t)
        ]
        try:
            list(pool.map(lambda test: logs.work(lambda copy: reach_of(copy, test), stop), tests))
            reach = rows_of(reach_path)
            if len(reach) < len(known) + len(tests):
                print(
                    "out of time while finding the tests that run each line; run the same command to continue"
                )
                return 1
            logs.path = path
            known = {row["name"] for row in rows_of(path)}
            left = [m for m in drawn if m.name not in known]
            list(pool.map(lambda m: logs.work(lambda copy: judge(m, copy, reach), stop), left))
        except KeyboardInterrupt:
            STOPPED.set()
            for child in list(RUNNING):
                end(child)
            print("stopped; finished mutants are kept; run the same command to continue")
            return 130
    return summary(
        [row for row in rows_of(path) if row["name"] in {m.name for m in drawn}], reach, len(drawn)
    )


def summary(rows: list[dict[str, Any]], reach: list[dict[str, Any]], wanted: int) -> int:
    """Print the surviving share with its 95 % interval (Clopper-Pearson), and every survivor."""
    same = {(e["file"], e["was"], e["now"]): e["reason"] for e in json.loads(EQUIVALENT.read_text())}
    counted = [row for row in rows if (row["file"], changed_lines(row)[0], changed_lines(row)[1]) not in same]
    survivors = [row for row in counted if row["outcome"] == "survived"]
    num, bad = len(counted), len(survivors)
    for row in survivors:
        was, now = changed_lines(row)
        print(
            f"\n{row['file']}:{row['line']} ({row['operator']}; {row['tests']} test files run it)\n- {was}\n+ {now}"
        )
    failing = [r["test"] for r in reach if not r["passes"]]
    if failing:
        print(f"\ntest files not used, because they fail without a mutant: {', '.join(failing)}")
    low = beta_quantile(0.025, bad, num - bad + 1) if bad else 0.0
    high = beta_quantile(0.975, bad + 1, num - bad) if bad < num else 1.0
    print(f"\n{len(rows)} of {wanted} mutants tested, {len(rows) - num} of them equivalent; {bad} of {num} survive: "
          f"{bad / max(1, num):.1%} (95 % interval {low:.1%} to {high:.1%})")  # fmt: skip
    return int(bad > LARGEST_SHARE * num)


def changed_lines(row: dict[str, Any]) -> tuple[str, str]:
    """Return the changed line, before and after the change, without its indentation."""
    source = (ROOT / row["file"]).read_bytes()
    first = source.rfind(b"\n", 0, row["start"]) + 1
    tail = source.find(b"\n", row["end"])
    before, after = source[first : row["start"]], source[row["end"] : tail if tail >= 0 else len(source)]
    texts = [(before + middle.encode() + after).decode() for middle in (row["was"], row["now"].rstrip("\n"))]
    return " ".join(texts[0].split()), " ".join(texts[1].split())


if __name__ == "__main__":
    raise SystemExit(main())
