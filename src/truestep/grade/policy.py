"""Strict and lenient grading, for all commands. ``strict`` refuses some correct answers, and ``lenient``
accepts some incorrect ones. The default verdict of ``grade.score`` is between the two."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from truestep.grade.equivalent import decide
from truestep.grade.extract import Extraction, How, gold_answer
from truestep.grade.normal import canonical
from truestep.grade.numeric import parse_number, rounds, split_unit
from truestep.grade.structure import brackets, elements, matrix
from truestep.grade.units import PERCENT
from truestep.records import Problem, Score, Verdict

EXPLICIT: tuple[How, ...] = ("boxed", "marker", "answer_is", "whole")
ROUNDED_DIGITS = 3  # significant digits of a decimal that ``lenient`` accepts as a rounded value

_FRACTION = re.compile(
    r"\\frac\{\s*(\d{1,18})\s*\}\{\s*(\d{1,18})\s*\}|(?<![\d.])(\d{1,18})\s*/\s*(\d{1,18})(?![\d.])"
)


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """The default, strict and lenient verdicts on one completion. ``reason`` explains them."""

    score: Score
    strict: Verdict
    lenient: Verdict
    answer: Extraction
    reason: str


def judgment(problem: Problem, answer: Extraction, score: Score) -> Judgment:
    """Return a score with the strict and the lenient verdict. ``strict`` can only refuse a correct answer,
    and ``lenient`` can only accept an incorrect one. Held by: tests/grade/test_policy.py"""
    gold, verdict = gold_answer(problem.answer), score.verdict or Verdict.UNSCORED
    by_form = problem.checker in ("math", "choice")  # other checkers do not look at the form of an answer
    strict = lenient = verdict
    note = ""
    if verdict is Verdict.CORRECT:
        note = objection(gold, answer.answer, answer.how) if by_form else unmarked(answer.how)
        strict = Verdict.INCORRECT if note else verdict
    elif verdict is Verdict.INCORRECT and answer.answer and by_form and nearly(gold, answer.answer):
        lenient, note = Verdict.CORRECT, "lenient: a rounded value"
    reason = "; ".join(filter(None, (score.reason, note)))
    return Judgment(score=score, strict=strict, lenient=lenient, answer=answer, reason=reason)


def unmarked(how: How) -> str:
    """Return why ``strict`` refuses an answer that the rule ``how`` found; "" if the answer is marked."""
    return "" if how in EXPLICIT else "strict: the answer is not marked as an answer"


def objection(gold: str, found: str, how: How) -> str:
    """Return why ``strict`` refuses a correct answer; "" if it does not. Both answers must be normalized."""
    if refusal := unmarked(how):
        return refusal
    left, right = parse_number(gold), parse_number(found)
    units = [n.unit if n else split_unit(text)[1] for n, text in ((left, gold), (right, found))]
    if (left is None) == (right is None) and units[0] != units[1]:
        return "strict: the units are not the same"
    if _is_reducible(found) and not _is_reducible(gold):
        return "strict: a fraction is not in lowest terms"
    ours, theirs = (brackets(text) for text in (gold, found))
    if (ours[0], ours[2]) != (theirs[0], theirs[2]):
        return "strict: different brackets"
    pairs = list(zip(elements(ours[1]), elements(theirs[1]), strict=False))
    if len(pairs) > 1 and not ours[0] and any(decide(a, b).equal is False for a, b in pairs):
        return "strict: different order"
    return ""


def nearly(gold: str, found: str) -> bool:
    """Return whether an incorrect answer is the gold answer with every part rounded to at least three
    significant digits, or unchanged."""
    rows = matrix(gold), matrix(found)
    if rows[0] is not None and rows[1] is not None:
        if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
            return False
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
    if (left.unit == PERCENT) != (right.unit == PERCENT):
        left, right = (
            replace(n, value=n.value / 100, places=None) if n.unit == PERCENT else n for n in (left, right)
        )
    return left.value == right.value or rounds(left, right, ROUNDED_DIGITS)


def _is_reducible(text: str) -> bool:
    pairs = [(int(a or c), int(b or d)) for a, b, c, d in _FRACTION.findall(text)]
    return any(math.gcd(above, below) > 1 or below == 1 for above, below in pairs)
