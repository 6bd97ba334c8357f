"""Runs the processes that do algebra, as ``python -m truestep.grade.symbolic DESCRIPTOR SECONDS MEMORY_MB``.

The first process imports the algebra, reports on the socket DESCRIPTOR that it is ready, and forks a worker
for each socket that is sent to it. A worker reads one JSON object per line, {"id", "gold", "found"}, and
answers {"id", "equal", "note"}. It may be killed at any moment, because it stores nothing. The CPU time of
each comparison is limited, so that an orphan also ends. The address space that a worker may use in addition
to that of the libraries is limited too. A worker cannot write files at all."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

OUT_OF_MEMORY = "memory"
PRIMES = (3, 5, 2, 7, 11, 13, 17, 19)
Compare = Callable[[str, str], tuple[bool, str]]


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    seconds, memory_mb = float(sys.argv[2]), int(sys.argv[3])
    try:
        compare = _comparison()
    except ImportError as error:
        _say(control, {"missing": str(error.name)})
        return 3
    compare(r"\frac{x^2-1}{x-1}", "x+1")  # the first use imports and compiles code
    gc.collect()
    gc.freeze()  # so that a garbage collection in a worker does not copy shared memory
    _say(control, {"ready": os.getpid()})
    while True:
        line, descriptors, _, _ = socket.recv_fds(control, 1 << 12, 1)  # one request of a few bytes
        if not line:
            return 0
        request = json.loads(line)
        if "reap" in request:
            status = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
            _say(control, {"id": request["id"], "status": status})
            continue
        pid = os.fork()
        if pid == 0:
            try:
                control.close()
                _work(socket.socket(fileno=descriptors[0]), compare, seconds, memory_mb)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(descriptors[0])
        _say(control, {"id": request["id"], "pid": pid})


def _work(channel: socket.socket, compare: Compare, seconds: float, memory_mb: int) -> None:
    _limit(resource.RLIMIT_AS, _memory("VmSize") + memory_mb * 2**20)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    floor = _memory("VmSize") + memory_mb * 2**20 - max(memory_mb // 4, 3) * 2**20
    for line in channel.makefile("r", encoding="ascii"):
        request = json.loads(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds) + 1, keep_hard=True)
        equal, note = False, ""
        try:
            equal, note = compare(request["gold"], request["found"])
        except MemoryError:
            note = OUT_OF_MEMORY
        # The algebra turns a MemoryError into "different", so a peak near the limit counts as out of memory.
        if not equal and _memory("VmPeak") > floor:
            note = OUT_OF_MEMORY
        _say(channel, {"id": request["id"], "equal": equal, "note": note})
        if note == OUT_OF_MEMORY:
            return


def _comparison() -> Compare:
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    reading = [LatexExtractionConfig(boxed_match_priority=-1)]

    @lru_cache(maxsize=64)  # the same gold answer is compared with many completions
    def read(text: str) -> list[Any]:
        # The whole text must be one formula; it is not searched for a readable part.
        how: dict[str, Any] = {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
        return list(parse(f"${text}$", reading, parsing_timeout=None, **how))

    def compare(gold: str, found: str) -> tuple[bool, str]:
        left, right = read(gold), read(found)
        if not left or not right:
            which = "answer" if left else "gold answer"
            return False, f"the {which} is not a readable formula: compared as text"
        if len(left) == len(right) == 1 and _clearly_different(left[0], right[0]):
            return False, "compared by value"
        return bool(verify(left, right, timeout_seconds=None)), "compared by algebra"

    return compare


def _clearly_different(left: Any, right: Any) -> bool:
    """Return whether the values of two formulas are far apart, so that no proof is needed. If there are
    variables, each has a different prime as its value, which every assumption on the variables allows."""
    from sympy import Expr, Symbol, UnevaluatedExpr  # type: ignore[import-untyped]

    if any(isinstance(s, Symbol) or not isinstance(s, Expr) or s.has(UnevaluatedExpr) for s in (left, right)):
        return False  # an UnevaluatedExpr is a percentage, perhaps meant without its sign
    variables = left.free_symbols | right.free_symbols
    if variables and not (_is_elementary(left) and _is_elementary(right)):
        return False
    names = sorted({variable.name for variable in variables})
    if len(names) > len(PRIMES):
        return False
    values = {variable: PRIMES[names.index(variable.name)] for variable in variables}
    try:
        x, y = (complex(side.evalf(20, subs=values) if values else side.evalf(20)) for side in (left, right))
    except (TypeError, ValueError, ArithmeticError, NotImplementedError, AttributeError, RecursionError):
        return False  # no value can be computed, so the algebra decides
    return abs(x - y) > 1e-4 * max(1.0, abs(x), abs(y))


def _is_elementary(formula: Any) -> bool:
    """Return whether a formula contains only numbers, variables, powers and elementary functions, but no
    sum, limit or f(x)."""
    import sympy

    simple = (sympy.Number, sympy.NumberSymbol, sympy.Symbol, sympy.Add, sympy.Mul, sympy.Pow)
    functions = (sympy.Abs, sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tan)
    return all(isinstance(part, (*simple, *functions)) for part in sympy.preorder_traversal(formula))


def _say(channel: socket.socket, reply: dict[str, Any]) -> None:
    channel.sendall(json.dumps(reply).encode("ascii") + b"\n")


def _limit(kind: int, value: int, *, keep_hard: bool = False) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, hard if keep_hard else value))
    except (ValueError, OSError):  # on a system without this limit, the parent's clock limit still applies
        return


def _memory(field: str) -> int:
    """Return the bytes of address space, now (VmSize) or at the peak so far (VmPeak); 1 GiB if unknown."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field)), 2**30)
    except OSError:
        return 2**30


if __name__ == "__main__":
    sys.exit(main())
