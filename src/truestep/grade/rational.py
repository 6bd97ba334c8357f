"""Compares rational functions exactly. They consist of +, -, *, /, whole powers and square roots of numbers.

A formula becomes a quotient of polynomials in its variables, π and the square roots of primes, which are
independent over the rationals. The coefficients are rational. Two formulas are equal if they have the same
coefficients after cross-multiplication. A formula is not decided here if it is ambiguous (1/2x, a mixed
number, f(x)), too large, or has any other form."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache

MAX_LENGTH = 300  # characters in a formula
MAX_TERMS = 120  # terms in a polynomial
MAX_POWER = 24
MAX_BITS = 2_000  # bits in a coefficient
MAX_RADICAND = 10**6
MAX_DEPTH = 20
LETTERS = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega|"
    "Gamma|Delta|Theta|Lambda|Phi|Psi|Omega|hbar|pi"
)
_TOKEN = re.compile(  # a power without braces has one digit: x^23 is x^2 3
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>(?:[A-Za-z]|\\(?:" + LETTERS + r")(?![A-Za-z]))"
    r"(?:_(?:[A-Za-z0-9]|\{\\?[A-Za-z0-9]{1,12}\s?\}))?)|\^\s*(?P<power>\d(?!\d|\.\d)|\{\s*-?\s*\d{1,3}\s*\})"
    r"|(?P<sign>\\(?:frac|sqrt|cdot|times|div)(?![A-Za-z])|[-+*/(){}]))",
    re.ASCII,
)
_RELATION = re.compile(r"([^=<>]*?)(?:(=|<|>|\\[lg]eq(?![A-Za-z]))(.*))?$", re.DOTALL)
_INDEX_LAST = re.compile(r"([A-Za-z])\^(\d|\{-?\d+\})(_(?:\w|\{\w+\}))", re.ASCII)  # v^2_0 means v_0^2

Monomial = tuple[tuple[str, int], ...]
Polynomial = dict[Monomial, Fraction]
Quotient = tuple[Polynomial, Polynomial]
# "" and the value, or a relation sign and the quotient that has this relation to 0
Formula = tuple[str, Quotient]
ONE: Polynomial = {(): Fraction(1)}
Token = tuple[str, str]  # what it is ("number", "name", "power" or the sign itself), and its text


class _NotRead(Exception):
    """Error for a formula that is not a rational function, is ambiguous, or is too large."""


def same_formula(gold: str, found: str) -> bool | None:
    """Return whether two formulas or two relations are equivalent; None if undecided. Relations are
    equivalent if one is the other times a number. Others are undecided, because solutions are not
    compared."""
    if re.fullmatch(r"[A-Za-z\s]*", gold) or re.fullmatch(r"[A-Za-z\s]*", found):  # a word is not a product
        return None
    try:
        left, right = _read(gold), _read(found)
        if left[0] != right[0]:
            return None
        ours, theirs = _times(left[1][0], right[1][1]), _times(right[1][0], left[1][1])
    except _NotRead:
        return None
    if left[0]:
        ratios = {ours[term] / theirs[term] for term in ours} if ours.keys() == theirs.keys() else set()
        return True if len(ratios) == 1 and (left[0] == "=" or min(ratios) > 0) else None
    if ours == theirs:
        return True
    text = gold + found
    names = {name for polynomial in (*left[1], *right[1]) for term in polynomial for name, _ in term}
    # A rounded value, √-1, or e + π, about which nothing is known.
    is_open = "." in text or "i" in names or {"e", r"\pi"} <= names
    is_name = any(re.fullmatch(r"\s*\\?[A-Za-z]+(?:_\S{1,20})?\s*", side) for side in (gold, found))
    return None if is_open or is_name else False


def _add(left: Quotient, right: Quotient) -> Quotient:
    total = dict(_times(left[0], right[1]))
    for term, factor in _times(right[0], left[1]).items():
        total[term] = total.get(term, Fraction(0)) + factor
    return {term: factor for term, factor in total.items() if factor}, _times(left[1], right[1])


def _negative(quotient: Quotient) -> Quotient:
    return {term: -factor for term, factor in quotient[0].items()}, quotient[1]


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for ours, factor in left.items():
        for theirs, other in right.items():
            term, value = _term(ours, theirs, factor * other)
            product[term] = product.get(term, Fraction(0)) + value
        if len(product) > MAX_TERMS:
            raise _NotRead
    if any(max(f.numerator.bit_length(), f.denominator.bit_length()) > MAX_BITS for f in product.values()):
        raise _NotRead
    return {term: factor for term, factor in product.items() if factor}


def _term(left: Monomial, right: Monomial, factor: Fraction) -> tuple[Monomial, Fraction]:
    powers = dict(left)
    for name, power in right:
        powers[name] = powers.get(name, 0) + power
    for name in [name for name, power in powers.items() if name[0] == "√" and power > 1]:
        factor *= int(name[1:]) ** (powers[name] // 2)
        powers[name] %= 2
    return tuple(sorted((name, power) for name, power in powers.items() if power)), factor


def _divide(left: Quotient, right: Quotient) -> Quotient:
    if not right[0]:
        raise _NotRead
    return _times(left[0], right[1]), _times(left[1], right[0])


def _power(base: Quotient, exponent: int) -> Quotient:
    if abs(exponent) > MAX_POWER or (not base[0] and exponent <= 0):
        raise _NotRead
    above, below = ONE, ONE
    for _ in range(abs(exponent)):
        above, below = _times(above, base[0]), _times(below, base[1])
    return (above, below) if exponent >= 0 else (below, above)


def _root(quotient: Quotient) -> Quotient:
    """Return the square root of a positive rational number, as a rational number times roots of primes."""
    above, below = quotient
    if above.keys() != {()} or below.keys() != {()}:
        raise _NotRead
    value = above[()] / below[()]
    number, whole = value.numerator * value.denominator, Fraction(1, value.denominator)
    free: list[int] = []
    if not 0 < number <= MAX_RADICAND:
        raise _NotRead
    for divisor in range(2, math.isqrt(number) + 1):
        while number % (divisor * divisor) == 0:
            number, whole = number // divisor**2, whole * divisor
        if number % divisor == 0:
            number, free = number // divisor, [*free, divisor]
    free += [number] if number > 1 else []
    return {tuple(sorted((f"√{prime}", 1) for prime in free)): whole}, ONE


@lru_cache(maxsize=256)
def _read(text: str) -> Formula:
    """Read a formula or a relation. A relation becomes the difference of its sides (= 0, > 0 or ≥ 0)."""
    left, sign, right = _RELATION.match(text[: MAX_LENGTH + 1]).groups()  # type: ignore[union-attr]
    if len(text) > MAX_LENGTH:
        raise _NotRead
    if not sign:
        return "", _read_side(left)
    greater, less = (right, left) if sign in ("<", r"\leq") else (left, right)
    kind = {"<": ">", r"\leq": r"\geq"}.get(sign, sign)
    return kind, _add(_read_side(greater), _negative(_read_side(less)))


def _read_side(text: str) -> Quotient:
    tokens: list[Token] = []
    place, text = 0, _INDEX_LAST.sub(r"\1\3^\2", text.rstrip())
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or (match["name"] or "")[:1] == "d":  # a differential
            raise _NotRead
        tokens.append((match["sign"] or str(match.lastgroup), match[str(match.lastgroup)]))
        place = match.end()
    tokens.reverse()  # the next token is the last entry
    found = _sum(tokens, 0)
    if tokens:
        raise _NotRead
    return found


def _next(tokens: list[Token]) -> str:
    return tokens[-1][0] if tokens else ""


def _sum(tokens: list[Token], depth: int) -> Quotient:
    if depth > MAX_DEPTH:
        raise _NotRead
    total: Quotient | None = None
    while total is None or _next(tokens) in ("+", "-"):
        sign = tokens.pop()[0] if _next(tokens) in ("+", "-") else ""
        term = _product(tokens, depth)
        term = _negative(term) if sign == "-" else term
        total = term if total is None else _add(total, term)
    return total


def _product(tokens: list[Token], depth: int) -> Quotient:
    value, last = _factor(tokens, depth)
    divided = False
    while kind := _next(tokens):
        if kind in (r"\cdot", r"\times", "*", "/", r"\div"):
            tokens.pop()
        elif divided or kind not in ("name", "(", r"\frac", r"\sqrt"):
            break  # 1/2x may be x/2 or 1/(2x)
        elif (kind == r"\frac" and last == "number") or (kind == "(" and last == "name"):
            raise _NotRead  # 3\frac12 may be a mixed number, f(x) the value of a function
        factor, last = _factor(tokens, depth)
        if kind in ("/", r"\div"):
            value, divided = _divide(value, factor), True
        else:
            value = _times(value[0], factor[0]), _times(value[1], factor[1])
    return value


def _factor(tokens: list[Token], depth: int) -> tuple[Quotient, str]:
    """Read a base with its exponent. Also return the kind of the base, or "power" if it has an exponent."""
    kind = _next(tokens)
    base = _base(tokens, depth)
    if _next(tokens) != "power":
        return base, kind
    exponent = int(re.sub(r"[{}\s]", "", tokens.pop()[1]))
    if _next(tokens) == "power":
        raise _NotRead
    return _power(base, exponent), "power"


def _base(tokens: list[Token], depth: int) -> Quotient:
    kind = _next(tokens)
    if kind == "number":
        value = Fraction(tokens.pop()[1])
        return {(): value} if value else {}, ONE
    if kind == "name":
        return {((re.sub(r"[{}\s]", "", tokens.pop()[1]), 1),): Fraction(1)}, ONE
    if kind in ("(", "{"):
        return _group(tokens, kind, depth)
    if kind == r"\sqrt":
        tokens.pop()
        return _root(_group(tokens, "{", depth))
    if kind == r"\frac":
        tokens.pop()
        above = _group(tokens, "{", depth)
        return _divide(above, _group(tokens, "{", depth))
    raise _NotRead


def _group(tokens: list[Token], opening: str, depth: int) -> Quotient:
    if _next(tokens) != opening:
        raise _NotRead
    tokens.pop()
    inside = _sum(tokens, depth + 1)
    if _next(tokens) != {"(": ")", "{": "}"}[opening]:
        raise _NotRead
    tokens.pop()
    return inside
