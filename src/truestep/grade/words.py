"""Reads numbers in English and Chinese words, times of day and dates."""

from __future__ import annotations

import re
from fractions import Fraction

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
VALUES = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
          "ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000}  # fmt: skip
_WORD = "|".join(sorted({*VALUES, *_LARGE, *_PARTS, "halve", "hundred"}, key=len, reverse=True))
SPELLED = re.compile(
    rf"(?:(?:{_WORD})s?(?![A-Za-z])(?:[\s-]+(?:and\s+(?=(?:{_WORD})s?\b))?)?)+", re.IGNORECASE
)

_HAN = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_HAN_SMALL, _HAN_LARGE = (
    {"十": 10, "百": 100, "千": 1000},
    {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8},
)
HAN = re.compile("[" + "".join([*_HAN, *_HAN_SMALL, *_HAN_LARGE]) + "]+")

_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?\s*(?:([ap])\.?\s?m\.?)?$", re.IGNORECASE | re.ASCII)
_NAMED_TIMES = {"noon": "12:00 pm", "midnight": "12:00 am"}
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH = re.compile(
    "|".join(rf"(?:{m[:3]}{'t?' if m[:3] == 'sep' else ''}\.?|{m})(?![A-Za-z])" for m in _MONTHS),
    re.IGNORECASE,
)
_DATE = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)?(?: of)?\s#|#\s(\d{1,2})(?:st|nd|rd|th)?)(?:,?\s(\d{4}))?", re.ASCII
)
_ISO = re.compile(r"(\d{4})-(\d{2})-(\d{2})", re.ASCII)


def spelled_number(text: str) -> Fraction | None:
    """Return the number that English or Chinese words mean, such as "three hundred and five", "one half" or
    "五万"; None for any other text."""
    text = text.strip()
    if HAN.fullmatch(text):
        return _han(text)
    words = [word for word in re.split(r"[\s-]+", text.lower()) if word]
    if not words or len(words) > 12:
        return None
    if (
        below := _PARTS.get(words[-1]) or _PARTS.get(re.sub("ves$", "f", words[-1].removesuffix("s")))
    ) is not None:
        above = _whole(words[:-1]) if words[:-1] not in ([], ["a"]) else 1
        return Fraction(above, below) if above and above < below else None
    number = _whole(words)
    return None if number is None else Fraction(number)


def _whole(words: list[str]) -> int | None:
    """Return the whole number that English words mean; each part must be smaller than the one before it."""
    total, part, last, scale = 0, 0, 1000, 10**15
    for word, before in zip(words, ["and", *words], strict=False):
        if word in VALUES and VALUES[word] < last:
            part, last = part + VALUES[word], 10 if VALUES[word] >= 20 else 0
        elif word == "hundred" and 0 < part < 100:
            part, last = 100 * part, 100
        elif word in _LARGE and part > 0 and _LARGE[word] < scale:
            total, part, last, scale = total + part * _LARGE[word], 0, 1000, _LARGE[word]
        elif word != "and" or before not in ("hundred", *_LARGE) or word == words[-1]:
            return None
    return total + part if (words and words[-1] != "zero") or words == ["zero"] else None


def _han(text: str) -> Fraction | None:
    if len(text) > 1 and not set(text) - set(_HAN):  # a sequence of digits, such as 二〇二四
        return Fraction(int("".join(str(_HAN[c]) for c in text)))
    total = part = digit = 0
    last, scale = 10**4, 10**9
    for character in text:
        if character in _HAN:
            if digit:
                return None
            digit = _HAN[character]
        elif (small := _HAN_SMALL.get(character, 0)) and small < last:
            part, digit, last = part + (digit or 1) * small, 0, small
        elif (large := _HAN_LARGE.get(character, 0)) and large < scale and part + digit:
            total, part, digit, last, scale = total + (part + digit) * large, 0, 0, 10**4, large
        else:
            return None
    return Fraction(total + part + digit)


def same_time(gold: str, found: str) -> bool | None:
    """Return whether two times of day agree (am or pm may be left out); None if either is not a time."""
    left, right = (_TIME.match(_NAMED_TIMES.get(text.lower(), text)) for text in (gold, found))
    if (
        left is None
        or right is None
        or not (left[3] or right[3])
        or not all(m[2] or m[3] for m in (left, right))
    ):
        return None
    if _minutes(left) == _minutes(right):
        return True
    has_bare = not (left[3] and right[3])
    return has_bare and left.group(1, 2) == right.group(1, 2) and int(left[1]) <= 12


def _minutes(match: re.Match[str]) -> int:
    hour = int(match[1]) % 12 + (12 if match[3].lower() == "p" else 0) if match[3] else int(match[1])
    return 60 * hour + int(match[2] or 0)


def same_date(gold: str, found: str) -> bool | None:
    """Return whether two dates with the name of the month, or in the form 2024-03-05, are the same day; None
    if either is not such a date. 3/5/2024 is not read, because it has two meanings."""
    left, right = _date(gold), _date(found)
    return None if left is None or right is None else left == right


def _date(text: str) -> tuple[int, int, int] | None:
    if iso := _ISO.fullmatch(text):
        return int(iso[1]), int(iso[2]), int(iso[3])
    if len(text) > 40 or (month := _MONTH.search(text)) is None:
        return None
    match = _DATE.fullmatch(text[: month.start()] + "#" + text[month.end() :])
    number = 1 + [m[:3] for m in _MONTHS].index(month[0][:3].lower())
    return (int(match[3] or 0), number, int(match[1] or match[2])) if match else None
