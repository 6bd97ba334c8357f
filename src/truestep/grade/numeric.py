"""Numbers as they are written in answers, read exactly: integers, decimals, fractions, mixed numbers, powers, units."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from truestep.grade.normal import TEXT_COMMAND

MAX_DIGITS = 1_000  # longer numbers are compared as text
MAX_POWER_DIGITS = 20_000  # of the value of a written power such as 2024^{4046}
ROUNDED_DIGITS = 6  # a decimal of at least so many digits may stand for a fraction that it rounds
PERCENT = "%"

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"\s*[-+]?\s*{_DECIMAL}\s*"
_EXPONENT = r"(?:\{\s*([-+]?\d{1,5})\s*\}|([-+]?\d{1,5}))"
UNIT_WORDS = frozenset({
    "dollars", "dollar", "cents", "cent", "euros", "pounds", "pound", "degrees", "degree", "radians", "rad",
    "percent", "pct", "units", "unit", "inches", "inch", "in", "feet", "foot", "ft", "yards", "yard", "miles",
    "mile", "mph", "km", "cm", "mm", "nm", "meters", "meter", "metres", "metre", "grams", "gram", "kg", "mg",
    "liters", "liter", "litres", "ml", "hours", "hour", "hrs", "minutes", "minute", "min", "seconds", "second",
    "sec", "days", "day", "weeks", "week", "months", "month", "years", "year", "people", "students", "square",
    "cubic", "per",
})  # fmt: skip
_UNIT = re.compile(rf"\s*(?:{TEXT_COMMAND}\{{([^{{}}]*)\}}|([A-Za-z][A-Za-z ./]*))(\^\{{?[0-9]\}}?)?\s*$", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Number:
    """``value`` as written, before its unit. ``places`` counts the digits after the decimal point, None where the
    number was not written as a decimal; ``digits`` the significant ones."""

    value: Fraction
    places: int | None = None
    digits: int = 0
    unit: str = ""


def _clean(text: str) -> str:
    return re.sub(r"[,\s]", "", text)


def _decimal(text: str) -> Number:
    text = _clean(text)
    whole, point, rest = text.lstrip("+-").partition(".")
    digits = len((whole + rest).lstrip("0"))
    value = Fraction(int((whole + rest) or "0"), 10 ** len(rest))
    return Number(value=-value if text.startswith("-") else value, places=len(rest) if point else None, digits=digits)


def _quotient(match: re.Match[str]) -> Number | None:
    below = _decimal(match[2]).value
    return None if below == 0 else Number(value=_decimal(match[1]).value / below)


def _mixed(match: re.Match[str]) -> Number | None:
    whole, above, below = (int(match[i]) for i in (1, 2, 3))
    return Number(value=whole + Fraction(above, below)) if 0 < above < below else None


def _scientific(match: re.Match[str]) -> Number | None:
    front = _decimal(match[1] or "1").value
    return _scaled(front, 10, int(match[2] or match[3]))


def _power(match: re.Match[str]) -> Number | None:
    return _scaled(Fraction(1), int(_clean(match[1])), int(match[2] or match[3]))


def _scaled(front: Fraction, base: int, exponent: int) -> Number | None:
    if base == 0 or abs(exponent) * math.log10(max(base, 10)) > MAX_POWER_DIGITS:
        return None
    return Number(value=front * Fraction(base) ** exponent)


_TIMES = r"(?:\\times|\\cdot|\*|x)"
_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Number | None]], ...] = tuple(
    (re.compile(pattern, re.ASCII), read)
    for pattern, read in (
        (r"(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}", _mixed),
        (r"(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", _mixed),
        (rf"\\frac\{{({_SIGNED})\}}\{{({_SIGNED})\}}", _quotient),
        (rf"({_DECIMAL})\s*/\s*({_DECIMAL})", _quotient),
        (rf"({_DECIMAL})\s*{_TIMES}\s*10\s*\^\s*{_EXPONENT}", _scientific),
        (rf"({_DECIMAL})\s*[eE]()([-+]?\d{{1,5}})(?![\d.])", _scientific),
        (rf"(\d+)\s*\^\s*{_EXPONENT}", _power),
        (rf"({_DECIMAL})", lambda match: _decimal(match[1])),
    )
)


def parse_number(text: str) -> Number | None:
    """The number that a normalised answer is, with its unit; None where it is anything else, or more than that."""
    text, sign = text.strip(), 1
    if len(text) > MAX_DIGITS + 100 or re.search(rf"\d{{{MAX_DIGITS}}}", text):
        return None
    for _ in range(6):  # signs, currency and brackets around the whole
        if text[:1] in ("-", "+"):
            sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
            if text[:1] in ("-", "+"):
                return None
        elif text[:1] in ("$", "€", "£", "¥"):
            text = text[1:].strip()
        elif (text[:1], text[-1:]) in (("(", ")"), ("{", "}")) and not re.search(r"[(){}]", text[1:-1]):
            text = text[1:-1].strip()
        else:
            break
    for pattern, read in _FORMS:
        if match := pattern.match(text):
            unit = _unit(text[match.end() :])
            number = read(match) if unit is not None else None
            if number is not None:
                return Number(value=sign * number.value, places=number.places, digits=number.digits, unit=unit or "")
    return None


def _unit(rest: str) -> str | None:
    """The unit that follows a number ("" for none), or None where what follows is not a unit: 4t is not 4."""
    rest = rest.strip().rstrip("$€£ ")
    if not rest:
        return ""
    if rest in ("%", "$%", r"^{\circ}"):
        return PERCENT if "%" in rest else "degree"
    match = _UNIT.match(rest)
    if match is None:
        return None
    words = (match[1] if match[1] is not None else match[2]).strip().lower()
    if re.search(r"\b(?:and|or|not)\b", words):
        return None
    if match[1] is None and not all(word in UNIT_WORDS for word in re.split(r"[ ./]+", words) if word):
        return None
    if words in ("percent", "pct", "percentage", "%"):
        return PERCENT
    return " ".join(word.rstrip("s") or word for word in words.split()) + re.sub(r"[{}]", "", match[3] or "")


def same_number(gold: Number, found: Number) -> bool:
    """Whether two numbers as written are the same answer.

    Exact, with three allowances: a decimal of at least six digits may round a fraction; a unit may be left out, but not
    be another one; a percent sign may be left out where the bare number, being at least 1, cannot be the fraction.
    """
    left, right = gold.value, found.value
    if gold.unit == PERCENT or found.unit == PERCENT:
        one_bare = gold.unit != found.unit
        if one_bare and {gold.unit, found.unit} != {PERCENT, ""}:
            return False
        if not one_bare or (left == right and abs(left) >= 1):
            return left == right
        left, right = (n.value / (100 if n.unit == PERCENT else 1) for n in (gold, found))
        return left == right
    if gold.unit and found.unit and gold.unit != found.unit:
        return False
    return left == right or _rounds(gold, found) or _rounds(found, gold)


def _rounds(decimal: Number, exact: Number) -> bool:
    if decimal.places is None or exact.places is not None or decimal.digits < ROUNDED_DIGITS:
        return False
    return decimal.value == round(exact.value, decimal.places)
