"""Throughput of the grader and of math-verify on the same pairs, the same number of processes, interleaved.

    python benchmarks/grade_bench.py PAIRS.jsonl --processes 2 --rounds 3

math-verify runs as its documentation shows (parse, verify, its own time limits) in a process pool. Both are warm:
processes are started and libraries imported before the clock starts. Prints JSON: wall-clock seconds, and seconds of
processor time of all processes, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from truestep.grade.equivalent import decide
from truestep.grade.extract import extract_answer, gold_answer
from truestep.grade.pairs import PATIENCE, Pair, read_pairs
from truestep.grade.pool import processor_seconds
from truestep.grade.score import Grader
from truestep.records import Message, Problem


def theirs(pair: tuple[str, str]) -> bool:
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    gold, pred = pair
    is_latex = any(mark in gold for mark in ("$", r"\boxed", r"\(", r"\["))
    return bool(verify(parse(gold if is_latex else f"${gold}$"), parse(pred)))


def work(children: Iterable[int]) -> float:
    """Processor seconds so far: this process, its living children, and those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(processor_seconds, children))


def seconds_of_theirs(pool: ProcessPoolExecutor, pairs: list[Pair]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    begin, worked = time.perf_counter(), work(pool._processes)
    list(pool.map(theirs, [(p.gold, p.pred) for p in pairs], chunksize=1))
    return time.perf_counter() - begin, work(pool._processes) - worked


def seconds_of_ours(grader: Grader, pairs: list[Pair]) -> tuple[float, float]:
    message = (Message(role="user", content=""),)
    begin, worked = time.perf_counter(), work(grader.pool.process_ids)
    grader.score_many([(Problem(id=p.id, messages=message, answer=p.gold), p.pred) for p in pairs])
    return time.perf_counter() - begin, work(grader.pool.process_ids) - worked


def needs_algebra(pair: Pair) -> bool:
    found = extract_answer(pair.pred).answer
    decision = decide(gold_answer(pair.gold), found)
    return bool(found) and decision.equal is None and not decision.refused


def ratio(pool: ProcessPoolExecutor, grader: Grader, pairs: list[Pair], rounds: int) -> dict[str, Any]:
    ours, other = [], []
    for number in range(rounds):
        for measure in (("ours", "theirs"), ("theirs", "ours"))[number % 2]:
            if measure == "ours":
                ours.append(seconds_of_ours(grader, pairs))
            else:
                other.append(seconds_of_theirs(pool, pairs))
    result: dict[str, Any] = {"pairs": len(pairs)}
    for place, clock in enumerate(("wall", "processor")):
        ratios = [b[place] / a[place] for a, b in zip(ours, other, strict=True)]
        result[clock] = {
            "seconds_truestep": [round(each[place], 2) for each in ours],
            "seconds_math_verify": [round(each[place], 2) for each in other],
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_smallest": round(min(ratios), 2),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=0, help="so many pairs, drawn with seed 0 [default: all]")
    options = parser.parse_args()
    pairs = [pair for pair in read_pairs(options.pairs) if pair.kind != "choice"]
    pairs = random.Random(0).sample(pairs, options.sample) if options.sample else pairs
    slow = [pair for pair in pairs if needs_algebra(pair)]
    with ProcessPoolExecutor(options.processes) as pool, Grader(workers=options.processes, patience=PATIENCE) as grader:
        seconds_of_theirs(pool, pairs[:20])
        seconds_of_ours(grader, slow[:4])
        grader.pool.warm()
        result = {
            "python": sys.version.split()[0],
            "processes": options.processes,
            "fast_path_share": round(1 - len(slow) / len(pairs), 4),
            "all": ratio(pool, grader, pairs, options.rounds),
            "slow_path": ratio(pool, grader, slow, options.rounds),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
