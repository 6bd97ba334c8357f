"""Multiple choice: which one letter an answer names."""

from __future__ import annotations

import re

from truestep.grade.normal import plain

MAX_LENGTH = 400

_NEGATED = re.compile(
    r"(?:\b(?:not|non|nicht|no|pas|nor|isn't)\b|不是|而非|不选|ليس)\s*(?:\w{2,9}\s){0,2}\(?[A-J]\)?(?![A-Za-z'])"
)
_LETTER = re.compile(r"(?<![A-Za-z\\'=+*/^_-])(?<![=+*/^-] )\(?([A-J])\)?(?![A-Za-z'_^(]|\s*[=+*/^<>])")
_ARTICLE = re.compile(r"\bA(?= (?!or\b|and\b)[a-z])")


def choice_letter(text: str) -> str:
    """The letter that an answer names: "C", "(C) Cecile", "C, not A", "B不是 A"; "" where it names none or several."""
    text = plain(text[:MAX_LENGTH])
    text = _NEGATED.sub(" ", text)
    letters = set(_LETTER.findall(text))
    if len(letters) > 1:
        letters = set(_LETTER.findall(_ARTICLE.sub(" ", text)))
    if len(letters) == 1:
        return letters.pop()
    return ""
