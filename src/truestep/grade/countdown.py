"""Countdown: reach a target with every given number exactly once. A small parser with exact fractions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

MAX_LENGTH = 300
MAX_DEPTH = 20

_SPELLINGS = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", "[": "(", "]": ")"}
_TOKEN = re.compile(r"\s*(?:(\d{1,18})(?![\d.])|([-+*/()]))", re.ASCII)


class NotArithmetic(ValueError):
    """The text is no expression of + - * / ( ) and whole numbers."""


def check_countdown(answer: str, numbers: Sequence[int], target: int) -> str:
    """Why an expression does not solve a countdown problem; "" if it does. It may end with "= target"."""
    for spelling, sign in _SPELLINGS.items():
        answer = answer.replace(spelling, sign)
    expression, equals, claimed = answer.partition("=")
    try:
        value, used = evaluate(expression)
        if equals and evaluate(claimed)[0] != target:
            return f"claims another target than {target}"
    except NotArithmetic as error:
        return str(error)
    except ZeroDivisionError:
        return "divides by zero"
    if Counter(used) != Counter(numbers):
        return f"uses {sorted(used)} instead of {sorted(numbers)}"
    return "" if value == target else f"equals {value}, not {target}"


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers it uses. Raises NotArithmetic, ZeroDivisionError."""
    tokens = _tokens(text)
    value, position = _sum(tokens, 0, 0)
    if position != len(tokens):
        raise NotArithmetic(f"unexpected {tokens[position]!r}")
    return value, [int(token) for token in tokens if token.isdigit()]


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"longer than {MAX_LENGTH} characters")
    tokens, position, text = [], 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotArithmetic(f"{text[position]!r} is no arithmetic")
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


def _sum(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    value, position = _product(tokens, position, depth)
    while position < len(tokens) and tokens[position] in "+-":
        other, after = _product(tokens, position + 1, depth)
        value = value + other if tokens[position] == "+" else value - other
        position = after
    return value, position


def _product(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    value, position = _factor(tokens, position, depth)
    while position < len(tokens) and tokens[position] in "*/":
        other, after = _factor(tokens, position + 1, depth)
        value = value * other if tokens[position] == "*" else value / other
        position = after
    return value, position


def _factor(tokens: list[str], position: int, depth: int) -> tuple[Fraction, int]:
    if position >= len(tokens) or depth > MAX_DEPTH:
        raise NotArithmetic("ends too early" if depth <= MAX_DEPTH else f"nested deeper than {MAX_DEPTH}")
    token = tokens[position]
    if token.isdigit():
        return Fraction(int(token)), position + 1
    if token == "-":
        value, position = _factor(tokens, position + 1, depth + 1)
        return -value, position
    if token != "(":
        raise NotArithmetic(f"unexpected {token!r}")
    value, position = _sum(tokens, position + 1, depth + 1)
    if position >= len(tokens) or tokens[position] != ")":
        raise NotArithmetic("a bracket is not closed")
    return value, position + 1
