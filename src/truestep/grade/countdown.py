"""Checks answers to countdown problems, which must use every given number exactly once to reach a target. It
parses expressions and computes with exact fractions."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

MAX_LENGTH = 300
MAX_DEPTH = 20

_SPELLINGS = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", "[": "(", "]": ")"}
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_TOKEN = re.compile(r"\s*(?:(\d{1,18})(?![\d.])|([-+*/()]))", re.ASCII)


class NotArithmetic(ValueError):
    """Error for a text that is not an expression of + - * / ( ) and whole numbers."""


def check_countdown(answer: str, numbers: Sequence[int], target: int) -> str:
    """Return why an expression does not solve a countdown problem; "" if it does. The expression may end with
    "= target"."""
    for spelling, sign in _SPELLINGS.items():
        answer = answer.replace(spelling, sign)
    expression, equals, claimed = answer.partition("=")
    try:
        value, used = evaluate(expression)
        if equals and evaluate(claimed)[0] != target:
            return f"claims a different target than {target}"
    except NotArithmetic as error:
        return str(error)
    except ZeroDivisionError:
        return "divides by zero"
    if Counter(used) != Counter(numbers):
        return f"uses {sorted(used)} instead of {sorted(numbers)}"
    return "" if value == target else f"equals {value}, not {target}"


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Return the exact value of an expression and the numbers that it uses. Raises NotArithmetic or
    ZeroDivisionError."""
    tokens = _tokens(text)
    numbers = [int(token) for token in tokens if token.isdigit()]
    tokens.reverse()  # the last entry is the next token
    value = _chain(tokens, 0)
    if tokens:
        raise NotArithmetic(f"unexpected {tokens[-1]!r}")
    return value, numbers


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"longer than {MAX_LENGTH} characters")
    tokens, position, text = [], 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotArithmetic(f"{text[position]!r} is not arithmetic")
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


def _chain(tokens: list[str], depth: int, signs: str = "+-") -> Fraction:
    """Evaluate a sum of products from left to right or, if ``signs`` is "*/", a product of factors."""

    def part() -> Fraction:
        return _chain(tokens, depth, "*/") if signs == "+-" else _factor(tokens, depth)

    value = part()
    while tokens and tokens[-1] in signs:
        operation = _OPERATIONS[tokens.pop()]
        value = operation(value, part())
    return value


def _factor(tokens: list[str], depth: int) -> Fraction:
    if not tokens or depth > MAX_DEPTH:
        raise NotArithmetic("ends too early" if depth <= MAX_DEPTH else f"nested deeper than {MAX_DEPTH}")
    token = tokens.pop()
    if token.isdigit():
        return Fraction(int(token))
    if token == "-":
        return -_factor(tokens, depth + 1)
    if token != "(":
        raise NotArithmetic(f"unexpected {token!r}")
    value = _chain(tokens, depth + 1)
    if not tokens or tokens.pop() != ")":
        raise NotArithmetic("a bracket is not closed")
    return value
