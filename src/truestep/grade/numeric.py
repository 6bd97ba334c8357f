"""Reads integers, decimals, fractions, mixed numbers and powers in answers exactly, with their units."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from truestep.grade.normal import TEXT_COMMAND
from truestep.grade.units import (
    CURRENCIES,
    NOT_COUNTERS,
    PERCENT,
    WORDS,
    conversion,
    is_unit,
    measure,
    same_unit,
    scale,
    unit_name,
)

MAX_DIGITS = 1_000  # longer numbers are compared as text
MAX_POWER_DIGITS = 20_000  # digits of the value of a power such as 2024^{4046}
ROUNDED_DIGITS = 6  # a decimal with at least this many digits may be the rounded value of a fraction

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"\s*[-+]?\s*{_DECIMAL}\s*"
_EXPONENT = r"(?:\{\s*([-+]?\d{1,5})\s*\}|([-+]?\d{1,5}))"
_UNIT = re.compile(
    rf"\s*(?:{TEXT_COMMAND}\{{([^{{}}]*)\}}|([A-Za-z][A-Za-z ./]*))(\^\{{?-?[0-9]\}}?)?\s*$", re.ASCII
)
_COUNTER = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]{1,4}")
_TEXT_UNIT = re.compile(rf"([^,;=<>]+?)\s*({TEXT_COMMAND}\{{[^{{}}]*\}}(?:\^\{{?[0-9]\}}?)?)\s*", re.ASCII)


_BARE_UNIT = re.compile(
    r"((?=.*(?:\\pi|\\sqrt|\\frac))[^,;=<>]*[\w})])\s((?:(?:square|cubic|"
    r"sq) )?[A-Za-z]{2,})(?:\^\{?([23])\}?)?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number and its unit. ``value`` is the number before its unit. ``places`` counts the digits after the
    decimal point (None if it was not written as a decimal); ``digits`` counts the significant digits."""

    value: Fraction
    places: int | None = None
    digits: int = 0
    unit: str = ""


def _decimal(text: str) -> Number:
    text = re.sub(r"[,\s]", "", text)
    whole, point, rest = text.lstrip("+-").partition(".")
    digits = len((whole + rest).lstrip("0"))
    value = Fraction(int((whole + rest) or "0"), 10 ** len(rest))
    value = -value if text.startswith("-") else value
    return Number(value=value, places=len(rest) if point else None, digits=digits)


def _quotient(match: re.Match[str]) -> Number | None:
    below = _decimal(match[2]).value
    return None if below == 0 else Number(value=_decimal(match[1]).value / below)


def _mixed(match: re.Match[str]) -> Number | None:
    whole, above, below = (int(match[i]) for i in (1, 2, 3))
    return Number(value=whole + Fraction(above, below)) if 0 < above < below else None


def _scientific(match: re.Match[str]) -> Number | None:
    return _scaled(_decimal(match[1]).value, 10, int(match[2] or match[3]))


def _repeating(match: re.Match[str]) -> Number:
    front, block = match[1] + match[2], re.sub(r"\D", "", match[3].replace("\\dot", ""))
    shift, period = 10 ** len(match[2]), 10 ** len(block) - 1
    return Number(value=Fraction(int(front or "0") * period + int(block), shift * period))


def _scaled(front: Fraction, base: int, exponent: int) -> Number | None:
    if base == 0 or abs(exponent) * math.log10(max(base, 10)) > MAX_POWER_DIGITS:
        return None
    return Number(value=front * Fraction(base) ** exponent)


_TIMES = r"(?:\\times|\\cdot|\*|x)"
_DOTS = r"(?:\.\.\.|\\[lc]?dots)"
_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Number | None]], ...] = tuple(
    (re.compile(pattern, re.ASCII), read)
    for pattern, read in (
        (r"(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}", _mixed),
        (r"(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", _mixed),
        (rf"\\frac\{{({_SIGNED})\}}\{{({_SIGNED})\}}", _quotient),
        (rf"({_DECIMAL})\s*/\s*({_DECIMAL})", _quotient),
        (rf"({_DECIMAL})\s*{_TIMES}\s*10\s*\^\s*{_EXPONENT}", _scientific),
        (rf"({_DECIMAL})\s*[eE]()([-+]?\d{{1,5}})(?![\d.])", _scientific),
        (rf"(\d+)\s*\^\s*{_EXPONENT}", lambda m: _scaled(Fraction(1), int(m[1]), int(m[2] or m[3]))),
        (r"(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}?", _repeating),
        (r"(\d*)\.(\d*)\\dot\s*\{?(\d\}?\d*\\dot\s*\{?\d)\}?", _repeating),
        (r"(\d*)\.(\d*)\((\d+)\)", _repeating),
        (rf"(\d*)\.(\d{{0,6}}?)(\d{{1,6}}?)\3{{2,}}\s*{_DOTS}", _repeating),
        (rf"({_DECIMAL})", lambda match: _decimal(match[1])),
    )
)


def parse_number(text: str, *, letters: bool = False) -> Number | None:
    """Return the number and its unit if a normalized answer is only a number; otherwise None. If ``letters``
    is True (because the other answer has a unit), a bare letter may be a unit, so that 5 m is five meters."""
    text, sign, unit = text.strip(), 1, ""
    if len(text) > MAX_DIGITS + 100 or (len(text) >= MAX_DIGITS and re.search(rf"\d{{{MAX_DIGITS}}}", text)):
        return None
    for _ in range(6):  # signs, currency and brackets around the whole number
        if text[:1] in ("-", "+"):
            sign, text = (-sign if text[0] == "-" else sign), text[1:].strip()
            if text[:1] in ("-", "+"):
                return None
        elif text[:1] in tuple(CURRENCIES):
            unit, text = text[0], text[1:].strip()
        elif text[:1] + text[-1:] in ("()", "{}") and text[0] not in text[1:] and text[-1] not in text[:-1]:
            if "," in text and re.fullmatch(r"\(\s*-?\d{1,3},\d{3}\s*\)", text):
                return None  # a pair
            text = text[1:-1].strip()
        else:
            break
    for pattern, read in _FORMS:
        if match := pattern.match(text):
            factor, rest = scale(text[match.end() :])
            if unit and factor == 1 and (short := re.match(r"([kKMBT])(?![A-Za-z])", rest)):  # $1.2M
                factor, rest = Fraction(1000 ** ("kMBT".index(short[1].replace("K", "k")) + 1)), rest[1:]
            after = _unit(rest, letters=letters)
            number = read(match) if after is not None else None
            if number is not None:
                value = sign * number.value * factor
                places = number.places if factor == 1 else None
                return Number(value=value, places=places, digits=number.digits, unit=after or unit)
    return None


def _unit(rest: str, *, letters: bool) -> str | None:
    """Return the unit that follows a number ("" for none), or None if the rest is not a unit, as in 4t."""
    is_spaced, rest = rest[:1].isspace(), rest.strip()
    if rest.endswith(tuple(CURRENCIES)):
        rest = rest.rstrip(CURRENCIES + " ") or rest[-1]
    if not rest or rest in CURRENCIES:
        return rest
    if rest in ("%", "$%", r"^{\circ}"):
        return PERCENT if "%" in rest else "degree"
    if degrees := re.match(r"\^\{\\circ\}\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])\s*\}?$", rest):
        return f"degree {degrees[1].lower()}"
    rest = re.sub(r"^/\s?(?=[A-Za-z])", "per ", rest)  # $18/day
    match = _UNIT.match(rest)
    if match is None and letters and is_spaced and r"\cdot" in rest and measure(rest) is not None:  # N·m
        return unit_name(rest)
    if match is None:
        is_counter = _COUNTER.fullmatch(rest) and not NOT_COUNTERS.intersection(rest)
        return unit_name(rest) if is_counter else None
    words = match[1] if match[1] is not None else match[2]
    is_spaced, words = is_spaced or words[:1].isspace(), words.strip()
    if (power := re.fullmatch(r"(\S+) (squared|cubed)", words)) and conversion(power[1], "m") is not None:
        words = {"squared": "square ", "cubed": "cubic "}[power[2]] + power[1]
    if not is_unit(words, is_text=match[1] is not None, is_spaced=is_spaced, letters=letters and is_spaced):
        return None
    if words.lower() in ("percent", "pct", "percentage", "%"):
        return PERCENT
    return unit_name(words, re.sub(r"[{}]", "", match[3] or ""))


def split_unit(text: str) -> tuple[str, str]:
    r"""Return a formula and the unit in ``\text{…}`` after it ("" if there is none): 2\sqrt{3} and cm."""
    match = _TEXT_UNIT.fullmatch(text)
    if match is None and (bare := _BARE_UNIT.fullmatch(text)):  # 2√3 cm
        names = bare[2].lower().split()
        return (bare[1], unit_name(bare[2], bare[3] or "")) if all(n in WORDS for n in names) else (text, "")
    unit = _unit(match[2], letters=False) if match and re.search(r"[\w})]$", match[1].strip()) else None
    return (match[1].strip(), unit) if match and unit else (text, "")


def same_number(gold: Number, found: Number) -> bool:
    """Return whether two numbers as written are the same answer. The comparison is exact, with three
    allowances. A decimal of at least six digits may round a fraction. A unit may be left out or converted,
    but not replaced by a different one. A percent sign may be left out if the bare number is at least 1,
    because it then cannot be the fraction."""
    left, right = gold.value, found.value
    if PERCENT in (units := {gold.unit, found.unit}):
        if "" in units and not (left == right and abs(left) >= 1):
            left, right = (n.value / (100 if n.unit == PERCENT else 1) for n in (gold, found))
        return units <= {PERCENT, ""} and left == right
    if gold.unit and found.unit and not same_unit(gold.unit, found.unit):
        factor = conversion(gold.unit, found.unit)
        return factor is not None and left * factor == right
    has_exact = gold.places is None or found.places is None
    return left == right or (has_exact and rounds(gold, found, ROUNDED_DIGITS))


def european(text: str) -> Number | None:
    """Read a number with a decimal comma or with points between its thousands, if the only other reading is a
    list. For example, 1.234.567 and 1.234,56 and 0,5 and 1,22 are read, but 1,5 and 1,234 are not."""
    sign, digits = text[: text.startswith("-")], text.removeprefix("-")
    digits = re.sub(r"(?<=\d) (?=\d{3}(?:[ ,]|$))", ".", digits)
    if re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", digits, re.ASCII):
        digits = digits.replace(".", "")
    elif re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|0,\d+|\d+,(?:\d\d|\d{4,})(?<!000)", digits, re.ASCII):
        digits = digits.replace(".", "").replace(",", ".")
    else:
        return None
    return _decimal(sign + digits)


def rounds(one: Number, other: Number, digits: int) -> bool:
    """Return whether one number rounds the other to a decimal of ``digits`` or more significant digits."""
    return any(
        a.places is not None and a.digits >= digits and a.value == round(b.value, a.places)
        for a, b in ((one, other), (other, one))
    )
