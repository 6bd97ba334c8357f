"""Takes the left side off an answer that only names its value: x = 5, P(A) = 1/2, 20 - 2 = 18."""

from __future__ import annotations

import re
from itertools import pairwise

from truestep.grade.numeric import parse_number, same_number
from truestep.grade.structure import brackets, elements

_LEFT_SIDE = re.compile(
    r"(?:m\s?)?(?:\\(?:angle|Delta) )?"
    r"(?:\\?[A-Za-z]+|\\text\s*\{(?!\s?(?i:wrong|incorrect|false|not|half|negative|minus|twice|"
    r"double|square|cube|root|no)\b)[A-Za-z ]{1,40}\}|"
    r"\[[A-Z]{2,6}\])?(?:_\{?\w+\}?)?'?\s?(?:\([\w, ]{1,20}\))?( [A-Z]{1,4})?\s*$"
)
_MEASURED = re.compile(  # the left side of a probability, an expectation or a variance
    r"(?:\\mathbb\{[PE]\}|\\Pr|[PE]|(?:\\(?:text|operatorname|mathrm)\s*\{)?(?:Pr|Var|"
    r"Cov)\}?)\s*[(\[][^()\[\]]{1,60}[)\]]\s*"
    r"=\s*(?=[^=]+$)"
)
_POINTS = re.compile(  # a length or a ratio of named points, areas or volumes: |AB|, V_1:V_2, \frac{NO}{BO}
    r"(?:\\(?:frac|overline|angle|triangle|colon)(?![A-Za-z])|[A-Z](?:_(?:\w|\{\w{1,20}\}))?'?|[|{}:/\s])+$"
)
_ARITHMETIC = re.compile(
    r"(?:[\d\s.+*/^(){}$-]|(?<=\d)!|\\(?:times|cdot|div|frac|sqrt)(?![A-Za-z]))+$", re.ASCII
)


def split_left(text: str) -> tuple[str, str]:
    opening, inside, _ = brackets(text)
    if opening == "(" and "=" in inside and len(elements(inside)) == 1:
        text = inside
    if measured := _MEASURED.match(text):
        return measured[0], text[measured.end() :]
    for relation in (r"\in ", "=", r"\approx "):
        left, _, right = text.partition(relation)
        if relation == "=" and _is_false(text):
            return "", text
        left, right = left.strip(), right_side(right)
        if not left or not right or len(elements(text)) > 1 or left.count("{") != left.count("}"):
            continue
        middle = text.split("=")[-2:-1]  # 9 + 5 = 14, m + n = 9 + 5 = 14
        is_step = middle and (_ARITHMETIC.match(middle[0]) or _LEFT_SIDE.match(middle[0].strip()))
        is_sum = is_step and parse_number(right) is not None
        if re.fullmatch(r"\\?[A-Za-z]+", left) and re.search(
            rf"(?<![A-Za-z\\]){re.escape(left)}(?![A-Za-z])", right
        ):
            continue  # x = 2x says what x is, not 2x
        if is_sum or _LEFT_SIDE.match(left) or _POINTS.match(left):
            return left, right
        if relation == "=" and _LEFT_SIDE.match(right):
            return right, left
    return "", text


def _is_false(text: str) -> bool:
    """Return whether a chain of equalities has two different numbers, such as 4 = 5."""
    numbers = [None if "$" in side else parse_number(side) for side in re.split(r"(?<![<>!\\])=", text)]
    return any(one and other and not same_number(one, other) for one, other in pairwise(numbers))


def right_side(text: str) -> str:
    """Return the last part of a chain of equalities if it is a number, such as 14 in 9 + 5 = 14."""
    last = re.split(r"(?<![<>!\\])=", text)[-1].strip()
    return last if parse_number(last) is not None else text.strip()
