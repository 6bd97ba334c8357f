"""Compares numbers in other bases than ten: 204_5, FF_{16}, 0b101."""

from __future__ import annotations

import re

from truestep.grade.normal import canonical
from truestep.grade.words import spelled_number

_BASED = re.compile(r"([0-9A-Za-z]{1,200})(?:_\{?(\d{1,2})\}?)?", re.ASCII)
_NO_BASE = re.compile(r"\d+_(?:[A-Za-z]|\{[^{}]*[A-Za-z][^{}]*\})", re.ASCII)
_PREFIXED = re.compile(
    r"^(?:0([bBoOxX])([0-9A-Fa-f]+)$|\((\w{1,200})\)_(?=\d|\{))", re.ASCII
)  # 0b101, (101)_2
_INDEX_WORD = re.compile(r"_\{?([a-z]{3,8})\}?$")


def same_base(gold: str, found: str) -> bool | None:
    """Compare numbers with their base as index. For a gold 204_5, 204 is the same; for a gold 7, 111_2 is."""
    left, right = (
        _BASED.fullmatch(_PREFIXED.sub(_index_of, _INDEX_WORD.sub(_index, canonical(text))))
        for text in (gold, found)
    )
    if any(_NO_BASE.fullmatch(_INDEX_WORD.sub(_index, canonical(text))) for text in (gold, found)):
        return False  # not the same text
    if left is None or right is None or not (left[2] or right[2]):
        return None
    if any(match[2] and not _is_numeral(match) for match in (left, right)):
        return False if left[1][0].isdigit() and right[1][0].isdigit() else None
    if not right[2] or left[2] == right[2]:
        return left[1].lstrip("0").lower() == right[1].lstrip("0").lower()
    values = [_value_in_base(match[1], int(match[2] or 10)) for match in (left, right)]
    return not left[2] and values[0] is not None and values[0] == values[1]


def _is_numeral(match: re.Match[str]) -> bool:
    """Return whether a text with an index is a number in that base, and not a variable with an index: 204_5, FF_16,
    but not 25_3, x_1 or A_16."""
    is_known = bool(match[2]) and _value_in_base(match[1], int(match[2])) is not None
    return is_known and (match[1][0].isdigit() or len(match[1]) > 1)


def _index_of(prefixed: re.Match[str]) -> str:
    return (
        f"{prefixed[2]}_{ {'b': 2, 'o': 8, 'x': 16}[prefixed[1].lower()] }"
        if prefixed[1]
        else f"{prefixed[3]}_"
    )


def _index(match: re.Match[str]) -> str:
    number = spelled_number(match[1])
    return match[0] if number is None else f"_{number}"


def _value_in_base(digits: str, base: int) -> int | None:
    return int(digits, base) if 2 <= base <= 36 and all(int(d, 36) < base for d in digits) else None
