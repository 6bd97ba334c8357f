"""Throughput of the grader and of math-verify on the same pairs, the same number of processes, interleaved.

    python benchmarks/grade_bench.py PAIRS.jsonl --processes 2 --rounds 3

math-verify runs as its documentation shows (parse, verify, its own time limits) in a process pool. Both are warm:
processes are started and libraries imported before the clock starts. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from truestep.grade.equivalent import decide
from truestep.grade.extract import extract_answer, gold_answer
from truestep.grade.pairs import Pair, read_pairs
from truestep.grade.score import Grader
from truestep.records import Message, Problem


def theirs(pair: tuple[str, str]) -> bool:
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    gold, pred = pair
    is_latex = any(mark in gold for mark in ("$", r"\boxed", r"\(", r"\["))
    return bool(verify(parse(gold if is_latex else f"${gold}$"), parse(pred)))


def seconds_of_theirs(pool: ProcessPoolExecutor, pairs: list[Pair]) -> tuple[float, list[bool]]:
    begin = time.perf_counter()
    said = list(pool.map(theirs, [(p.gold, p.pred) for p in pairs], chunksize=1))
    return time.perf_counter() - begin, said


def seconds_of_ours(grader: Grader, pairs: list[Pair]) -> tuple[float, list[str]]:
    message = (Message(role="user", content=""),)
    begin = time.perf_counter()
    scores = grader.score_many([(Problem(id=p.id, messages=message, answer=p.gold), p.pred) for p in pairs])
    return time.perf_counter() - begin, [score.verdict.value for score in scores]


def needs_algebra(pair: Pair) -> bool:
    found = extract_answer(pair.pred).answer
    return bool(found) and decide(gold_answer(pair.gold), found).equal is None


def ratio(pool: ProcessPoolExecutor, grader: Grader, pairs: list[Pair], rounds: int) -> dict[str, Any]:
    ours, other = [], []
    for number in range(rounds):
        for measure in (("ours", "theirs"), ("theirs", "ours"))[number % 2]:
            if measure == "ours":
                ours.append(seconds_of_ours(grader, pairs)[0])
            else:
                other.append(seconds_of_theirs(pool, pairs)[0])
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return {
        "pairs": len(pairs),
        "seconds_truestep": [round(s, 2) for s in ours],
        "seconds_math_verify": [round(s, 2) for s in other],
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_smallest": round(min(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pairs = [pair for pair in read_pairs(options.pairs) if pair.kind != "choice"]
    slow = [pair for pair in pairs if needs_algebra(pair)]
    with ProcessPoolExecutor(options.processes) as pool, Grader(workers=options.processes) as grader:
        seconds_of_theirs(pool, pairs[:20])
        seconds_of_ours(grader, slow[:4])
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
