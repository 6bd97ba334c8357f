"""Units, currencies, number words and times of day as they occur in answers."""

from __future__ import annotations

import re
import tomllib
from fractions import Fraction
from pathlib import Path

from truestep.grade.normal import plain

PERCENT = "%"

_DATA = tomllib.loads(Path(__file__).with_name("units.toml").read_text(encoding="utf-8"))
# name: (dimension, size in the dimension's first unit); the names are those that ``unit_name`` returns
_SIZES = {name: (dimension, Fraction(size))
          for dimension, sizes in _DATA["sizes"].items() for name, size in sizes.items()}  # fmt: skip
_SPELLINGS = {
    spelling: name for name, spellings in _DATA["spellings"].items() for spelling in spellings.split()
}
WORDS = frozenset({*_SPELLINGS, *(name + "s" for name in _SPELLINGS), *_DATA["words"].lower().split()})
WORDS -= {"¢", "gm", "buck", "bucks", "deg"}
NOT_UNITS = frozenset(_DATA["not_units"].split())
FUNCTIONS = frozenset(_DATA["functions"].split())
LETTERS = frozenset("mgshlLNJWVAKC")  # units that a formula would read as variables
CURRENCIES = "$€£¥"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

_SCALES: dict[str, int] = _DATA["scales"]
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


def is_unit(words: str, *, is_text: bool, is_spaced: bool, letters: bool) -> bool:
    r"""Return whether words after a number can be its unit: any text in ``\text{…}`` that
    does not change the number; otherwise known units, and after a space nouns."""
    parts = re.findall(r"[^ ./]+", words)
    if NOT_UNITS.intersection(part.lower() for part in parts) or re.search(r"\d", words):
        return False
    if len(words) == 1:
        return (words in LETTERS and (is_text or letters)) or (is_text and words.isupper())
    is_noun = is_spaced and len(parts) <= 3 and all(map(_is_noun, parts))
    return is_text or is_noun or all(part.lower() in WORDS for part in parts)


def _is_noun(word: str) -> bool:
    is_word = len(word) >= 3 and word[1:].islower() and re.search("[aeiouy]", word) and word not in _ALPHABET
    return bool(is_word) and word not in FUNCTIONS and word.lower() not in _VALUES


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


def conversion(unit: str, other: str) -> Fraction | None:
    """Return how many of the other unit one unit is; None if they are not units of the same dimension."""
    sizes = [_SIZES.get(name.partition("^")[0]) for name in (unit, other)]
    powers = [name.partition("^")[2] or "1" for name in (unit, other)]
    if sizes[0] is None or sizes[1] is None or sizes[0][0] != sizes[1][0] or powers[0] != powers[1]:
        return None
    return (sizes[0][1] / sizes[1][1]) ** int(powers[0])


def same_unit(left: str, right: str) -> bool:
    """Return whether two units mean the same, such as "degree" and "degree C", or "apple" and "red apple"."""
    one, other = set(left.split()), set(right.split())
    changes = (one ^ other) & {"per", "c", "f", *_SIZES}  # miles are not miles per hour, 30° are not 30 °C
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
