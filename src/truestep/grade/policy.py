"""Where careful people differ: what a strict reader refuses of right answers, a lenient one accepts of wrong
ones.

The verdict itself (``grade.score``) is the default between the two."""

from __future__ import annotations

import math
import re

from truestep.grade.equivalent import decide
from truestep.grade.extract import How
from truestep.grade.normal import canonical
from truestep.grade.numeric import parse_number, rounds
from truestep.grade.structure import brackets, elements, matrix

EXPLICIT: tuple[How, ...] = ("boxed", "marker", "answer_is", "whole")
ROUNDED_DIGITS = 3  # significant ones, of a decimal that a lenient reader takes for what it rounds

_FRACTION = re.compile(
    r"\\frac\{\s*(\d{1,18})\s*\}\{\s*(\d{1,18})\s*\}|(?<![\d.])(\d{1,18})\s*/\s*(\d{1,18})(?![\d.])"
)


def objection(gold: str, found: str, how: How) -> str:
    """Why a strict reader refuses an answer that is right: "" where it does not. Both answers are
    normalised."""
    if how not in EXPLICIT:
        return "strict: the answer is not marked as one"
    left, right = parse_number(gold), parse_number(found)
    if left is not None and right is not None and left.unit != right.unit:
        return "strict: the units are not the same"
    if _is_reducible(found) and not _is_reducible(gold):
        return "strict: a fraction is not in lowest terms"
    ours, theirs = (brackets(text) for text in (gold, found))
    if (ours[0], ours[2]) != (theirs[0], theirs[2]):
        return "strict: other brackets"
    pairs = list(zip(elements(ours[1]), elements(theirs[1]), strict=False))
    if len(pairs) > 1 and not ours[0] and any(decide(a, b).equal is False for a, b in pairs):
        return "strict: another order"
    return ""


def nearly(gold: str, found: str) -> bool:
    """Whether an answer that is wrong rounds the gold one, all of its parts to three significant digits or
    more."""
    rows = matrix(gold), matrix(found)
    if rows[0] is not None and rows[1] is not None:
        parts = [[entry for row in side for entry in row] for side in rows if side is not None]
    else:
        ours, theirs = brackets(gold), brackets(found)
        if ours[::2] != theirs[::2]:
            return False
        parts = [elements(ours[1]), elements(theirs[1])]
    return len(parts[0]) == len(parts[1]) and all(_near(a, b) for a, b in zip(*parts, strict=True))


def _near(gold: str, found: str) -> bool:
    if canonical(gold) == canonical(found):
        return True
    left, right = parse_number(gold), parse_number(found)
    if left is None or right is None or (left.unit and right.unit and left.unit != right.unit):
        return False
    return left.value == right.value or rounds(left, right, ROUNDED_DIGITS)


def _is_reducible(text: str) -> bool:
    pairs = [(int(a or c), int(b or d)) for a, b, c, d in _FRACTION.findall(text)]
    return any(math.gcd(above, below) > 1 or below == 1 for above, below in pairs)
