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
import re
import resource
import socket
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

OUT_OF_MEMORY = "memory"
UNREADABLE = "unreadable: the answer is not a formula"
UNREADABLE_GOLD = "the gold answer is not a readable formula: compared as text"
DIGITS = 50  # digits that two equal constants have in common
ROUNDED_DIGITS = 6  # as in grade.numeric, which is not imported into the processes
WARM_UP = (
    (r"\frac{x^2-1}{x-1}", "x+1"), ("x=2y+1", "x+y^2=1"), (r"[0,1) \cup (2,\infty)", "[0,2]"), (r"f(x)", r"a_{1} x^{2}"),
    (r"\sin(2x)", r"2\sin(x)\cos(x)"), (r"1, -\sqrt{2}", r"\{1, 2\}"), (r"\sum_{k=1}^{n} k", r"\sqrt[3]{2}"),
)  # fmt: skip
PRIMES = (3, 5, 2, 7, 11, 13, 17, 19)
# Names that the parser reads as √-1, as e, or as the small letter.
_CAPITAL = re.compile(
    r"(?<![A-Za-z\\_{])([IE])(?![A-Za-z_])|\\(Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega)(?![A-Za-z])"
)
# Marks that the parser drops, and letters with a meaning of their own: f', A^T, f^{-1}(x). They become names.
_PRIME = re.compile(r"(\\?[A-Za-z]+)(?:_(\w|\{\w{1,9}\}))?((?:'|\^\{?(?:\\prime\s*)+\}?)+)")
_TRANSPOSED = re.compile(
    r"\^(?:\{\s*(?:\\(?:top|intercal)|\\?(?:text|mathrm)?\{?T\}?)\s*\}|\\(?:top|intercal)(?![a-z])|"
    r"T(?![A-Za-z]))"
)
_INVERSE = re.compile(r"(?<![A-Za-z\\])([fghFGT])\^(?:(\d)|\{(-?\d+)\})\s*(?=\()")
_DOTS = re.compile(r"\\[lc]?dots(?![a-z])|\.{3}")
_DROPPED = re.compile(r"['\"]|\\mathrm\{th\}")
_DECIMAL = re.compile(r"-?\d*\.(\d+)", re.ASCII)
Compare = Callable[[str, str], tuple[bool, str]]


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    seconds, memory_mb = float(sys.argv[2]), int(sys.argv[3])
    try:
        compare = _comparison()
    except ImportError as error:
        _say(control, {"missing": str(error.name)})
        return 3
    for gold, found in WARM_UP:  # the first use imports code, and the parser learns its grammar as it reads
        compare(gold, found)
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
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from sympy import Expr, I, simplify  # type: ignore[import-untyped]

    # Units are our own rules' business, and letters of different case are different variables.
    cleaned = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
    cased = ConversionConfig(lowercase_symbols=False)

    @lru_cache(maxsize=64)  # the same gold answer is compared with many completions
    def read(text: str, is_real: bool) -> Any:
        text = _PRIME.sub(_primed, text)
        text = _INVERSE.sub(lambda m: f"{m[1]}_{{power{(m[2] or m[3]).replace('-', 'm')}}}", text)
        text = _TRANSPOSED.sub(r"^{t_{transposed}}", text)
        text = _DOTS.sub(" x_{dots} ", text)
        if _DROPPED.search(text):
            return None
        text = normalize_latex(_CAPITAL.sub(lambda m: f"x_{{{m[1] or m[2]}}}", text), cleaned)
        try:
            made = latex2sympy(text, is_real=is_real, normalization_config=None, conversion_config=cased)
            return made.xreplace({s: I for s in made.free_symbols if s.name == "i"})
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 (the parser raises it for text that it cannot read)
            return None

    def compare(gold: str, found: str) -> tuple[bool, str]:
        is_real = not (should_treat_as_complex(gold) or should_treat_as_complex(found))
        left, right = read(gold, is_real), read(found, is_real)  # else x would be two different symbols
        if left is None or right is None:
            return False, UNREADABLE_GOLD if left is None else UNREADABLE
        if _is_equation(left) != _is_equation(right) and (isinstance(left, Expr) or isinstance(right, Expr)):
            return False, "an equation is not compared with a formula"
        for rounded, text, other in ((right, found, left), (left, gold, right)):
            if getattr(rounded, "is_Float", False) and (decimal := _DECIMAL.fullmatch(text)):
                return _rounds(Fraction(text), len(decimal[1]), other), "compared with the decimal"
        if (equal := _same_constant(left, right)) is not None:
            return equal, "compared by value"
        if _clearly_different(left, right):
            return False, "compared by value"
        if getattr(left, "is_Symbol", False) and getattr(right, "is_Symbol", False):
            return left == right, "compared by algebra"
        if isinstance(left, Expr) and isinstance(right, Expr) and (left.is_Symbol or right.is_Symbol):
            return bool(simplify(left - right) == 0), "compared by algebra"
        equal = bool(verify(left, right, timeout_seconds=None)) or _same_where_real(left, right)
        return equal and not _are_unsolvable(left, right), "compared by algebra"

    return compare


def _primed(match: re.Match[str]) -> str:
    """Return a name with its index and its number of primes as one index: f'_1 and f_1^{\\prime} are f_{1prime1}."""
    primes = match[3].count("'") + match[3].count("prime")
    return f"{match[1]}_{{{(match[2] or '').strip('{}')}prime{primes}}}"


def _clearly_different(left: Any, right: Any) -> bool:
    """Return whether the values of two formulas are far apart, so that no proof is needed. If there are
    variables, each has a different prime as its value, which every assumption on the variables allows."""
    from sympy import Expr, Symbol, UnevaluatedExpr

    if any(isinstance(s, Symbol) or not isinstance(s, Expr) or s.has(UnevaluatedExpr) for s in (left, right)):
        return False  # an UnevaluatedExpr is a percentage, perhaps meant without its sign
    variables = sorted(left.free_symbols | right.free_symbols, key=str)
    if len(variables) > len(PRIMES) or not (_is_elementary(left) and _is_elementary(right)):
        return False
    values = dict(zip(variables, PRIMES, strict=False))
    x, y = (_constant(side.subs(values)) for side in (left, right))
    return x is not None and y is not None and bool(abs(x - y) > 1e-4 * max(1.0, abs(x), abs(y)))


def _same_where_real(left: Any, right: Any) -> bool:
    """Return whether two formulas with roots or logarithms are equal for all values of the variables for which both
    are real, such as ln(xy) and ln x + ln y, but not √(x²) and x. It is proved for positive variables, and tried
    for the other signs."""
    from sympy import Expr, Pow, Symbol, expand_log, log, simplify

    if any(isinstance(side, Symbol) or not isinstance(side, Expr) for side in (left, right)):
        return False
    variables = sorted(left.free_symbols | right.free_symbols, key=str)
    if not 1 <= len(variables) <= 4 or not (_is_elementary(left) and _is_elementary(right)):
        return False
    if not (left + right).has(log) and all(p.exp.is_integer for p in (left + right).atoms(Pow)):
        return False
    positive = {v: Symbol(v.name, positive=True) for v in variables}
    if simplify(expand_log((left - right).xreplace(positive).doit())) != 0:
        return False
    for signs in product((1, -1), repeat=len(variables)):
        values = {v: sign * prime for v, sign, prime in zip(variables, signs, PRIMES, strict=False)}
        x, y = (_constant(side.subs(values)) for side in (left, right))
        if x is not None and y is not None and x.is_real and y.is_real and abs(x - y) > 1e-9 * max(1, abs(x)):
            return False
    return True


def _are_unsolvable(left: Any, right: Any) -> bool:
    """Return whether two relations are only equal because neither has a solution, such as sin x = 5 and 2^x = 0."""
    from sympy import simplify, solve
    from sympy.core.relational import Relational  # type: ignore[import-untyped]

    if not (isinstance(left, Relational) and isinstance(right, Relational)) or solve(
        left, *left.free_symbols
    ):
        return False
    differences = [side.lhs - side.rhs for side in (left, right)]
    return not any(simplify(differences[0] - sign * differences[1]) == 0 for sign in (1, -1))


def _is_equation(formula: Any) -> bool:
    return any(base.__name__ in ("Equality", "And") for base in type(formula).__mro__)


def _rounds(decimal: Fraction, places: int, exact: Any) -> bool:
    """Return whether a decimal is a constant, or agrees with it in all its digits, of which it has at least six
    significant ones; the last may be rounded or cut off."""
    value = _constant(exact)
    if value is None or not value.is_real:
        return False
    digits = abs(decimal.numerator * 10**places // decimal.denominator)
    off = (abs(value) - abs(decimal)) * 10**places
    is_close = -0.5 <= off < 1 if len(str(digits)) >= ROUNDED_DIGITS else abs(off) < 10**-DIGITS
    return bool(is_close and (value < 0) == (decimal < 0))


def _same_constant(left: Any, right: Any) -> bool | None:
    """Return whether two formulas without variables have the same value, in 50 digits; None for others. A
    decimal in a formula is exact."""
    x, y = _constant(left), _constant(right)
    if x is None or y is None:
        return None
    if x.is_Rational and y.is_Rational:
        return bool(x == y)
    return bool(abs(x - y) <= 10**-DIGITS * max(abs(x), abs(y)))


def _constant(formula: Any) -> Any:
    """Return the value of a formula without variables, exactly if it is rational, otherwise with 60 digits;
    None if it has no value."""
    from sympy import Expr, Float, Rational, UnevaluatedExpr, zoo
    from sympy.core.relational import Relational

    if not isinstance(formula, Expr) or formula.has(UnevaluatedExpr) or isinstance(formula, Relational):
        return None  # an UnevaluatedExpr is a percentage, perhaps meant without its sign
    exact = formula.xreplace({f: Rational(str(f)) for f in formula.atoms(Float)})
    if exact.free_symbols:
        return None
    try:
        exact = exact.doit()
        if exact.is_Rational:
            return exact
        value = exact.evalf(DIGITS + 10, maxn=4 * DIGITS)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError, AttributeError, RecursionError):
        return None
    is_number = value.is_number and value.is_finite and not value.has(zoo)
    return value if is_number and all(part.is_Number for part in value.as_real_imag()) else None


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
