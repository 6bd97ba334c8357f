"""Units and currencies as they occur in answers."""

from __future__ import annotations

import re
import tomllib
from fractions import Fraction
from pathlib import Path

from truestep.grade.words import VALUES

PERCENT = "%"

_DATA = tomllib.loads(Path(__file__).with_name("units.toml").read_text(encoding="utf-8"))
_SPELLINGS = {
    spelling: name for name, spellings in _DATA["spellings"].items() for spelling in spellings.split()
}
WORDS = frozenset({*_SPELLINGS, *(name + "s" for name in _SPELLINGS), *_DATA["words"].lower().split()})
WORDS -= {"¢", "gm", "buck", "bucks", "deg"}
NOT_UNITS = frozenset(_DATA["not_units"].split())
NOT_LAST = frozenset(_DATA["not_last"].split())
NOT_COUNTERS = frozenset(
    "零一二三四五六七八九十百千万亿半多倍分之以上下左右余折成几约度"
)  # they change a number
FUNCTIONS = frozenset(_DATA["functions"].split())
LETTERS = frozenset("mgshlLNJWVAKC")  # units that a formula would read as variables
CURRENCIES = "$€£¥₹₩₽"
_NOUN = re.compile(r"[^\W\d_]+(?:[-'][^\W\d_]+)*(?:\(e?s\))?")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

_SCALES = {word: Fraction(size) for word, size in _DATA["scales"].items()}
SCALES = "(?:" + "|".join(_SCALES) + ")s?(?![A-Za-z])"  # a pattern for words such as "million"
_SCALE = re.compile(rf"\s*(?:\\text\s*\{{\s*)?({'|'.join(_SCALES)})s?(?![A-Za-z])\s*\}}?", re.IGNORECASE)

Dimensions = tuple[tuple[str, int], ...]  # such as length 1, time -1
Measure = tuple[Fraction, Dimensions]
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TERM = re.compile(
    r"(?P<per>/|per\s)?\s*(?:(?P<squared>square|sq|cubic)\s)?\s*(?P<name>[^\W\d_]+|[$€£¥¢])\s*"
    r"(?:\^\{?\s*(?P<power>-?\d)\s*\}?)?\s*(?:[.*·]|\\cdot)?\s*"
)


def _dimensions(text: str) -> Dimensions:
    terms = re.findall(r"(/?)(\w+)(?:\^(\d))?", text)
    return tuple((name, (-1 if per else 1) * int(power or 1)) for per, name, power in terms)


# name: (size in the first units of its dimensions, the dimensions)
_SIZES: dict[str, Measure] = {
    name: (Fraction(size), _dimensions(key))
    for key, sizes in _DATA["sizes"].items()
    for name, size in sizes.items()
}


def scale(rest: str) -> tuple[Fraction, str]:
    """Return the factor of a word such as "million" after a number, and the text that follows the word."""
    match = _SCALE.match(rest)
    if match and "{" in match[0] and not match[0].endswith("}"):
        return _SCALES[match[1].lower()], r" \text{" + rest[match.end() :]
    return (_SCALES[match[1].lower()], rest[match.end() :]) if match else (Fraction(1), rest)


def is_unit(words: str, *, is_text: bool, is_spaced: bool, letters: bool) -> bool:
    r"""Return whether words after a number can be its unit: known units, and after a space or in ``\text{…}`` up to
    four nouns, none of which changes the number."""
    if re.fullmatch(r"\([A-Za-z ]+\)", words):
        words = words[1:-1]
    if is_text or is_spaced:  # 2/3 of the cake
        words = re.sub(r"^of (?:the|an?|all|his|her|their|its|each|every) (?=[a-z])", "", words)
    parts = re.findall(r"[^ ./]+", words)
    if NOT_UNITS.intersection(part.lower() for part in parts) or (parts and parts[-1].lower() in NOT_LAST):
        return False
    if len(words) == 1 and words.isascii():
        return (words in LETTERS and (is_text or letters)) or (
            is_text and words.isupper() and (is_spaced or words not in "MBQ")
        )
    if all(part.lower() in WORDS or (letters and part in LETTERS) for part in parts) or (
        is_text and measure(words) is not None
    ):
        return True
    return (
        (is_text or is_spaced) and len(parts) <= 4 and all(part in WORDS or _is_noun(part) for part in parts)
    )


def _is_noun(word: str) -> bool:
    """Return whether a word can be a noun or an adjective. It needs a vowel if it is ASCII."""
    if not _NOUN.fullmatch(word) or word.lower() in VALUES or word in FUNCTIONS or word in _ALPHABET:
        return False
    if not word.isascii():
        return not NOT_COUNTERS.intersection(word)
    return len(word) >= 3 and word[1:].islower() and bool(re.search("[aeiouy]", word.lower()))


def unit_name(words: str, power: str = "") -> str:
    """Return one name for all spellings of a unit: "square centimeters" and "cm^2" have the same name."""
    parts = []
    for word in words.replace("/", " per ").split():
        if (low := word.lower()) in ("square", "sq", "cubic"):
            power = "^3" if low == "cubic" else "^2"
            continue
        singular = low[:-1] if low.endswith("s") and len(low) > 1 else low
        if re.fullmatch("M[a-z]|[kKMGT]?[bB]", word):  # Mg is not mg, Mb is not MB
            parts.append(word.replace("K", "k"))
            continue
        parts.append(word if word in _SIZES else _SPELLINGS.get(low) or _SPELLINGS.get(singular) or singular)
    return " ".join(parts) + power


def measure(unit: str) -> Measure | None:
    r"""Return the size of a unit, such as km/h, square feet, m s^{-2} or \frac{m}{s}, in the first units of its
    dimensions, and the power of each dimension; None if a part of it is not known."""
    unit = _FRACTION.sub(r"\1/\2", unit[:80].strip()).replace(r"^{\circ}", "degree").replace(r"\Omega", "ohm")
    size, powers, place = Fraction(1), dict[str, int](), 0
    while place < len(unit):
        term = _TERM.match(unit, place)
        known = _SIZES.get(unit_name(term["name"])) if term else None
        if term is None or known is None:
            return None
        power = int(term["power"] or {"": 1, "cubic": 3}.get(term["squared"] or "", 2))
        power = -power if term["per"] else power
        size *= known[0] ** power
        for dimension, exponent in known[1]:
            powers[dimension] = powers.get(dimension, 0) + exponent * power
        place = term.end()
    return (size, tuple(sorted((d, p) for d, p in powers.items() if p))) if powers else None


def conversion(unit: str, other: str) -> Fraction | None:
    """Return how many of the other unit one unit is; None if they are not known units of the same dimension."""
    left, right = measure(unit), measure(other)
    return left[0] / right[0] if left and right and left[1] == right[1] else None


def same_unit(left: str, right: str) -> bool:
    """Return whether two units mean the same, such as "degree" and "degree C", or "apple" and "red apple"."""
    if (known := measure(left)) is not None and known == measure(right):
        return True
    one, other = set(left.split()), set(right.split())
    changes = (one ^ other) & {"per", "c", "f", *_SIZES}  # miles are not miles per hour, 30° are not 30 °C
    return (one <= other or other <= one) and not changes
