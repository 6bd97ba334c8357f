"""The child process that does algebra: ``python -m truestep.grade.symbolic SECONDS MEMORY_MB``.

It reads one JSON object a line, {"id", "gold", "found"}, and answers {"id", "equal", "note"}. Its first line says that
it is warm. It may be killed at any moment: it keeps nothing. Limits: the CPU time of each comparison (so that an orphan
ends too), the address space on top of what the libraries take, and no writing to files at all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

OUT_OF_MEMORY = "memory"


def main() -> int:
    seconds, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    try:
        compare = _comparison()
    except ImportError as error:
        _say(replies, {"missing": str(error.name)})
        return 3
    compare(r"\frac{x^2-1}{x-1}", "x+1")  # imports and compiles what is done on first use
    _limit(resource.RLIMIT_AS, _memory("VmSize") + memory_mb * 2**20)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    floor = _memory("VmSize") + memory_mb * 2**20 - max(memory_mb // 4, 3) * 2**20
    _say(replies, {"ready": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + 1, keep_hard=True)
        equal, note = False, ""
        try:
            equal, note = compare(request["gold"], request["found"])
        except MemoryError:
            note = OUT_OF_MEMORY
        # The algebra swallows a MemoryError and answers "different": a peak close to the limit is read as one.
        if not equal and _memory("VmPeak") > floor:
            note = OUT_OF_MEMORY
        _say(replies, {"id": request["id"], "equal": equal, "note": note})
        if note == OUT_OF_MEMORY:
            return 0
    return 0


def _comparison() -> Callable[[str, str], tuple[bool, str]]:
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    reading = [LatexExtractionConfig(boxed_match_priority=-1)]

    def read(text: str) -> list[Any]:
        # One formula, all of it or nothing: no hunting for a piece of the text that can be read.
        return list(
            parse(
                f"${text}$", reading, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
            )
        )

    def compare(gold: str, found: str) -> tuple[bool, str]:
        left, right = read(gold), read(found)
        if not left or not right:
            return (
                False,
                f"the {'answer' if left else 'gold answer'} is no formula that could be read: compared as text",
            )
        if len(left) == len(right) == 1 and _clearly_different(left[0], right[0]):
            return False, "compared by value"
        return bool(verify(left, right, timeout_seconds=None)), "compared by algebra"

    return compare


def _clearly_different(left: Any, right: Any) -> bool:
    """Whether two formulas without variables have values far apart: no proof that they are equal need be sought."""
    from sympy import Expr, UnevaluatedExpr  # type: ignore[import-untyped]

    if not (isinstance(left, Expr) and isinstance(right, Expr)) or left.free_symbols or right.free_symbols:
        return False
    if left.has(UnevaluatedExpr) or right.has(UnevaluatedExpr):  # a percentage, which may be meant without its sign
        return False
    try:
        x, y = complex(left.evalf(20)), complex(right.evalf(20))
    except (TypeError, ValueError, ArithmeticError, NotImplementedError, AttributeError, RecursionError):
        return False  # no value to be had: the algebra decides
    return abs(x - y) > 1e-4 * max(1.0, abs(x), abs(y))


def _say(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _limit(kind: int, value: int, *, keep_hard: bool = False) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, hard if keep_hard else value))
    except (ValueError, OSError):  # a system that does not know this limit: the parent's clock still holds
        return


def _memory(field: str) -> int:
    """Bytes of address space now (VmSize) or at most so far (VmPeak); 1 GiB where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field)), 2**30)
    except OSError:
        return 2**30


if __name__ == "__main__":
    sys.exit(main())
