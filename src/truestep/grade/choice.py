"""Multiple choice: which one letter an answer names."""

from __future__ import annotations

import re

from truestep.grade.normal import plain

MAX_LENGTH = 400

_NEGATED = re.compile(
    r"(?:\b(?:not|non|nicht|no|pas|nor|isn't)\b|不是|而非|不选|ليس)\s*(?:\w{2,9}\s){0,2}\(?[A-J]\)?(?![A-Za-z'])|"
    r"\(?(?<![A-Za-z0-9])[A-J]\)? (?:is|was|seems|looks|(?:must|would|could|can|may) be) (?:[a-z]{2,9} )?"
    r"(?:incorrect|wrong|false|not)\b"
)
_LETTER = re.compile(
    r"(?<![A-Za-z0-9\\'=+*/^_|-])(?<![=+*/^-] )(?<![A-Za-z]\()\(?([A-J])\)?(?![A-Za-z0-9'_^(|]|\s*[=+*/^<>]|\s*-\s*\d)"
)
_SPEAKER = re.compile(r"\bI(?= (?:choose|pick|select|think|believe|guess|say|would|will|can|am|go)\b)")
_ARTICLE = re.compile(r"\b[AI](?= (?!or\b|and\b)[a-z])")


def choice_letter(text: str) -> str:
    """The letter that an answer names: "C", "(C) Cecile", "C, not A", "B不是 A"; "" if none or several."""
    text = plain(text[:MAX_LENGTH])
    if "\\" in text:
        return ""  # a formula, in which a letter is a variable
    text = _NEGATED.sub(" ", _SPEAKER.sub(" ", text))
    letters = set(_LETTER.findall(text))
    if len(letters) > 1:
        letters = set(_LETTER.findall(_ARTICLE.sub(" ", text)))
    return letters.pop() if len(letters) == 1 else ""
