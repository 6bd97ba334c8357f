"""Grade pairs of answers that mean different things, and pairs that mean the same, of 40 families.

    python benchmarks/grade_meanings.py [--each 1400] [--seed 0] [--workers 2] [--json FILE]

The pairs are made by tests/grade/meanings.py. No different pair may be accepted by ``strict``, and at most one
in 2,000 by the default verdict; otherwise the exit code is 1. Every accepted different pair and the refused equal
ones are printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from truestep.grade.pairs import Pair, grade_pairs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/grade"))
from meanings import FAMILIES, cases

SHARE = 1 / 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--each", type=int, default=1400, help="pairs of different meanings per family (default: 1400)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes that do algebra (default: 2)")
    parser.add_argument("--json", type=Path, help="file for the counts of each family")
    options = parser.parse_args()
    made = cases(options.seed, options.each)
    pairs = [Pair(id=str(i), gold=c.gold, pred=c.text, kind=c.kind) for i, c in enumerate(made)]
    samples = grade_pairs(pairs, workers=options.workers)["samples"]
    counts: dict[str, Counter[str]] = {family.__name__: Counter() for family in FAMILIES}
    for case, sample in zip(made, samples, strict=True):
        kind = "same" if case.same else "different"
        counts[case.family].update([kind, f"{kind} {sample['verdict']}", f"{kind} strict {sample['strict']}"])
        if (sample["verdict"] == "correct") != case.same:
            print(
                f"{case.family}: {kind}: {case.gold!r} {case.text!r}: {sample['verdict']} ({sample['reason']})"
            )
    total: Counter[str] = sum(counts.values(), Counter())
    result: dict[str, Any] = {"seed": options.seed, "total": total, "families": counts}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    strict, default = total["different strict correct"], total["different correct"]
    print(f"{total['different']:,} different pairs: {default} accepted, {strict} by strict; "
          f"{total['same']:,} equal pairs: {total['same correct']:,} accepted")  # fmt: skip
    return int(strict > 0 or default > SHARE * total["different"])


if __name__ == "__main__":
    sys.exit(main())
