"""Reads quantities in several units, such as 2 h 30 min, 5'3", 45°30' or 3 dollars 25 cents, exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from truestep.grade.normal import plain
from truestep.grade.numeric import parse_number
from truestep.grade.units import Dimensions, measure
from truestep.grade.words import HAN, SPELLED, spelled_number

MAX_LENGTH = 120
_MARKS = {"'": ("ft", "arcmin"), '"': ("in", "arcsec")}
_PIECE = re.compile(
    r"(?P<number>\d[\d,]*(?:\.\d+)?(?:\s+\d+\s*/\s*\d+|\s*/\s*\d+|\s*\\frac\{\d+\}\{\d+\})?|"
    r"\\frac\{\d+\}\{\d+\})"
    r"(?:\s*(?:\\times|\\cdot)\s*10\^(?:\{-?\d{1,3}\}|\d))?\s*"
    r"(?P<unit>'{1,2}|\"|(?:(?!and\b)[^\d,'\"\s\\^]|\\(?:frac|cdot|Omega)(?![a-z])|\^(?:\{\\circ\}|"
    r"\{?-?\d\}?)|\s)+)"
    r"\s*(?:,|and\b)?\s*",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A value in the first units of its dimensions. ``first`` is the size of the first unit as written; ``parts``
    counts the numbers of which it is the sum."""

    value: Fraction
    dimensions: Dimensions
    first: Fraction
    parts: int


def quantity(text: str) -> Quantity | None:
    """Return the quantity that a normalized answer is; None for a number without a unit and any other text."""
    text = plain(text)
    if len(text) > MAX_LENGTH:
        return None
    text = with_digits(text)
    sign, text = (-1, text[1:].strip()) if text[:1] == "-" else (1, text)
    if text[:1] == "$":
        text = re.sub(r"^\$\s*(\d[\d,.]*)", r"\1 $", text)
    total, sizes, place, last = Fraction(0), list[Fraction](), 0, ""
    dimensions: Dimensions = ()
    while place < len(text):
        piece = _PIECE.match(text, place)
        number = parse_number(text[place : piece.start("unit")]) if piece else None
        if piece is None or number is None or number.unit:
            return None
        unit = piece["unit"].strip().replace("''", '"')
        marks = _MARKS.get(unit)
        last = marks[last in ("degree", "arcmin")] if marks else unit.replace(r"^{\circ}", "degree")
        size = measure(last)
        if size is None or (sizes and (size[1] != dimensions or size[0] >= sizes[-1])):
            return None  # the units of a sum become smaller
        total, dimensions = total + number.value * size[0], size[1]
        sizes.append(size[0])
        place = piece.end()
    is_one_mark = len(sizes) == 1 and last in ("ft", "in") and text[-1] in "'\""
    if not sizes or is_one_mark:
        return None
    return Quantity(value=sign * total, dimensions=dimensions, first=sizes[0], parts=len(sizes))


def same_quantity(gold: str, found: str) -> bool | None:
    """Return whether two quantities are exactly equal, in any units. Return None if neither is a sum and both
    are not known units, or if there is only one unit, which may have been left out."""
    left, right = quantity(gold), quantity(found)
    if left is not None and right is not None:
        return left.dimensions == right.dimensions and left.value == right.value
    known, other = (left, found) if left else (right, gold)
    if known is None or known.parts == 1 or known.dimensions != (("money", 1),):
        return None
    number = parse_number(other)  # 3.25 and $3.25 are 3 dollars 25 cents
    return number is not None and number.unit in ("", "$") and number.value * known.first == known.value


def with_digits(text: str) -> str:
    """Return a text with digits for the numbers in words in it, if it begins with such a number: "two hours thirty
    minutes" becomes "2 hours 30 minutes"."""

    def digits(match: re.Match[str]) -> str:
        number = spelled_number(re.sub(r"[\s-]+$", "", match[0]))
        end = match[0][len(match[0].rstrip(" -")) :]
        if number is None:
            return match[0]
        return (
            str(number)
            if number.denominator == 1
            else rf"\frac{{{number.numerator}}}{{{number.denominator}}}"
        ) + end

    text = re.sub(
        r"\ban? (?=(?:hundred|thousand|million|billion|dozen|half|third|quarter|fourth|fifth|eighth|"
        r"tenth)\b)",
        "one ",
        text,
    )
    text = re.sub(r"\b(\w+) and (?:a|one) half\b", r"\1 1/2", text)
    return re.sub(rf"(?<![A-Za-z\d])(?:{SPELLED.pattern})|{HAN.pattern}", digits, text, flags=re.IGNORECASE)
