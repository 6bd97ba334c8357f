"""Units, currencies, number words and times of day as they occur in answers."""

from __future__ import annotations

import re
from fractions import Fraction

from truestep.grade.normal import plain

PERCENT = "%"

# name: (dimension, size in the dimension's first unit); the names are those that ``unit_name`` returns
_SIZES: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, sizes in {
        "length": {"m": "1", "km": "1000", "cm": "1/100", "mm": "1/1000", "nm": "1/1000000000"},
        "imperial length": {"in": "1", "ft": "12", "yd": "36", "mi": "63360"},
        "mass": {"g": "1", "kg": "1000", "mg": "1/1000"},
        "imperial mass": {"lb": "16", "oz": "1"},
        "time": {"s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
        "volume": {"l": "1", "ml": "1/1000"},
        "money": {"$": "1", "cent": "1/100"},
    }.items()
    for name, size in sizes.items()
}
_SPELLINGS = {
    spelling: name
    for name, spellings in {
        "m": "meter metre", "km": "kilometer kilometre kms", "cm": "centimeter centimetre cms",
        "mm": "millimeter", "in": "inch inches", "ft": "foot feet", "yd": "yard yds", "mi": "mile",
        "g": "gram gm", "kg": "kilogram kgs", "mg": "milligram", "lb": "pound lbs", "oz": "ounce",
        "s": "second sec secs", "min": "minute mins", "h": "hour hr hrs", "l": "liter litre",
        "ml": "milliliter millilitre", "$": "dollar usd bucks buck", "cent": "¢", "€": "euro eur",
        "£": "gbp", "degree": "deg degrees", "rad": "radian",
    }.items()
    for spelling in spellings.split()
}  # fmt: skip
_MORE = (
    "dollars cents cent euros percent pct unit units ft mph kph km cm mm nm kg mg ml min days day weeks week "
    "months month years year people students square cubic sq per in yuan yen"
)
WORDS = frozenset({*_SPELLINGS, *(name + "s" for name in _SPELLINGS), *_MORE.split()})
WORDS -= {"¢", "gm", "buck", "bucks", "deg"}
LETTERS = frozenset("mgshlLNJWVAKC")  # units that a formula would read as variables
CURRENCIES = "$€£¥"

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s*(?:\\text\s*\{{\s*)?({'|'.join(_SCALES)})s?(?![A-Za-z])\s*\}}?", re.IGNORECASE)
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_TIME = re.compile(r"(\d{1,2}):(\d{2})\s*(?:([ap])\.?\s?m\.?)?$", re.IGNORECASE | re.ASCII)


def scale(rest: str) -> tuple[int, str]:
    """Return the factor of a word such as "million" after a number, and the text that follows the word."""
    match = _SCALE.match(rest)
    return (_SCALES[match[1].lower()], rest[match.end() :]) if match else (1, rest)


def unit_name(words: str, power: str = "") -> str:
    """Return one name for all spellings of a unit: "square centimeters" and "cm^2" have the same name."""
    parts = []
    for word in words.lower().split():
        if word in ("square", "sq", "cubic"):
            power = "^3" if word == "cubic" else "^2"
            continue
        singular = word[:-1] if word.endswith("s") and len(word) > 1 else word
        parts.append(_SPELLINGS.get(word) or _SPELLINGS.get(singular) or singular)
    return " ".join(parts) + power


def in_common(left: tuple[Fraction, str], right: tuple[Fraction, str]) -> bool:
    """Return whether two (value, unit) pairs with different units are the same quantity."""
    sizes = [_SIZES.get(unit.partition("^")[0]) for _, unit in (left, right)]
    powers = [unit.partition("^")[2] or "1" for _, unit in (left, right)]
    if sizes[0] is None or sizes[1] is None or sizes[0][0] != sizes[1][0] or powers[0] != powers[1]:
        return False
    power = int(powers[0])
    return left[0] * sizes[0][1] ** power == right[0] * sizes[1][1] ** power


def same_unit(left: str, right: str) -> bool:
    """Return whether two units mean the same, such as "degree" and "degree C", or "apple" and "red apple"."""
    one, other = set(left.split()), set(right.split())
    changes = (one ^ other) & {"per", *_SIZES}  # miles are not miles per hour
    return (one <= other or other <= one) and not changes


def spelled_number(text: str) -> int | None:
    """Return the number that a few English words mean, such as "forty-two" or "three hundred", or None."""
    total, last = 0, 1000
    for word in text.lower().replace("-", " ").split()[:4]:
        if word in ("hundred", "thousand") and 0 < total < 100:
            total, last = total * _SCALES[word], _SCALES[word]
        elif word in _VALUES and (value := _VALUES[word]) < last:
            total, last = total + value, 10 if value >= 20 else 0
        else:
            return None
    return total if text.split() and len(text.split()) <= 4 else None


def same_time(gold: str, found: str) -> bool | None:
    """Return whether two times of day agree (am or pm may be left out); None if either is not a time."""
    left, right = _TIME.match(plain(gold)), _TIME.match(plain(found))
    if left is None or right is None or not (left[3] or right[3]):
        return None
    if _minutes(left) == _minutes(right):
        return True
    has_bare = not (left[3] and right[3])
    return has_bare and left.group(1, 2) == right.group(1, 2) and int(left[1]) <= 12


def _minutes(match: re.Match[str]) -> int:
    hour = int(match[1]) % 12 + (12 if match[3].lower() == "p" else 0) if match[3] else int(match[1])
    return 60 * hour + int(match[2])
