"""Compare the throughput of the grader and of math-verify on the same pairs, with interleaved runs.

    python benchmarks/grade_bench.py PAIRS.jsonl --processes 2 --rounds 3

Both use the same number of processes. math-verify runs as its documentation shows (parse, verify, its own
time limits) in a process pool. Each measurement uses new processes, and the two take turns at going first.
Prints JSON with wall-clock seconds and with seconds of processor time, which other work on the machine hardly
changes. "pairs" is measured in processes that have started and have imported their libraries, "start" is that
start, and "cold" is both together. "all" has all pairs, and "slow_path" only the pairs that need algebra.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from truestep.evaluate.pair_rows import read_pairs
from truestep.grade.equivalent import decide, questions
from truestep.grade.extract import extract_answer, gold_answer
from truestep.grade.formula import symbolic_form
from truestep.grade.pairs import Pair
from truestep.grade.rational import same_formula
from truestep.grade.score import Grader
from truestep.records import Message, Problem


def theirs(pair: tuple[str, str]) -> bool:
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    gold, pred = pair
    is_latex = any(mark in gold for mark in ("$", r"\boxed", r"\(", r"\["))
    return bool(verify(parse(gold if is_latex else f"${gold}$"), parse(pred)))


def work(children: Iterable[int]) -> float:
    """Return the processor seconds of this process, its ended children and the given living children."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(seconds_of, children))


def seconds_of(pid: int) -> float:
    """Return the processor seconds of a process and of its ended children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Clock:
    """Wall-clock and processor seconds between two laps."""

    def __init__(self, children: Callable[[], Iterable[int]]) -> None:
        self._children, self._last = children, (time.perf_counter(), work(()))

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), work(self._children())
        passed, self._last = (now[0] - self._last[0], now[1] - self._last[1]), now
        return passed


def measure_theirs(pairs: list[Pair], processes: int, warm: bool) -> list[tuple[float, float]]:
    """Return the laps of one run: the start, if the processes are warmed up first, and the pairs."""
    laps = []
    with ProcessPoolExecutor(processes) as pool:
        clock = Clock(lambda: list(pool._processes or ()))
        if warm:
            list(pool.map(theirs, [("x+1", "$1+x$")] * processes))
            laps.append(clock.lap())
        list(pool.map(theirs, [(p.gold, p.pred) for p in pairs], chunksize=1))
        return [*laps, clock.lap()]


def measure_ours(pairs: list[Pair], processes: int, warm: bool) -> list[tuple[float, float]]:
    message, laps = (Message(role="user", content=""),), []
    with Grader(workers=processes) as grader:
        clock = Clock(lambda: grader.pool.process_ids)
        if warm:
            grader.pool.warm()
            laps.append(clock.lap())
        grader.score_many([(Problem(id=p.id, messages=message, answer=p.gold), p.pred) for p in pairs])
        return [*laps, clock.lap()]


def needs_algebra(pair: Pair) -> bool:
    found = extract_answer(pair.pred).answer
    decision = decide(gold_answer(pair.gold), found)
    if not found or decision.equal is not None or decision.reason:
        return False
    parts = questions(gold_answer(pair.gold), found)
    return any(same_formula(symbolic_form(a), symbolic_form(b)) is None for a, b in parts)


def compare(pairs: list[Pair], processes: int, rounds: int) -> dict[str, Any]:
    """Return seconds and ratios for one list of pairs: of the start, of the pairs after it, and of both in a
    cold run."""
    ours: list[dict[str, tuple[float, float]]] = []
    other: list[dict[str, tuple[float, float]]] = []
    for number in range(rounds):
        for measure, found in ((measure_ours, ours), (measure_theirs, other))[:: 1 if number % 2 else -1]:
            start, warm = measure(pairs, processes, True)
            found.append({"start": start, "pairs": warm, "cold": measure(pairs, processes, False)[0]})
    result: dict[str, Any] = {"pairs": len(pairs)}
    for part in ("start", "pairs", "cold"):
        result[part] = {}
        for place, clock in enumerate(("wall", "processor")):
            ratios = [b[part][place] / a[part][place] for a, b in zip(ours, other, strict=True)]
            result[part][clock] = {
                "seconds_truestep": [round(each[part][place], 2) for each in ours],
                "seconds_math_verify": [round(each[part][place], 2) for each in other],
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_smallest": round(min(ratios), 2),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sample", type=int, default=0, help="number of pairs, drawn with seed 0 (default: all)"
    )
    options = parser.parse_args()
    pairs = [pair for pair in read_pairs(options.pairs) if pair.kind != "choice"]
    pairs = random.Random(0).sample(pairs, options.sample) if options.sample else pairs
    slow = [pair for pair in pairs if needs_algebra(pair)]
    result = {
        "python": sys.version.split()[0],
        "processes": options.processes,
        "fast_path_share": round(1 - len(slow) / len(pairs), 4),
        "all": compare(pairs, options.processes, options.rounds),
        "slow_path": compare(slow, options.processes, options.rounds),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
