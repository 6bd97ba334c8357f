"""Finds characters that a text of a row should not have: control characters, and LaTeX that JSON has eaten."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from truestep.data.rows import Row, RowError

# The rest of a LaTeX command whose backslash and first letter JSON has read as a control character.
_EATEN_LINE = re.compile(
    r"\n(?:abla|atural|eq|earrow|ewline|ewcommand|geq|gtr|leq|oindent|onumber|ormalsize|ot|otin|subseteq|supseteq|warrow)(?![a-z])"
)
_EATEN = (
    r"\t(?:ext(?:bf|it|rm|sf|tt|sc|up|md|sl|normal|color)?\s*\{|extstyle|(?:frac|anh)(?![a-z])|binom|imes|heta|herefore|hick(?:approx|sim|space)|hinspace"
    r"|riangle|ilde|oprule|wohead)|\r(?:ight|(?:ho|angle|ceil|floor|brac[ek]|[vV]ert|hd|m|oot|ule|ef|times|elax)(?![a-z]))"
)
# A rest that is also a word or a variable: eaten only in a formula, in an answer, or directly after {, (, ^, _, $.
_PERHAPS_EATEN = re.compile(
    r"\t(?:an|ag|au|iny|o|op|t)(?![A-Za-z])|\n(?:e|eg|exists|i|less|mid|parallel|prec|sim|u)(?![A-Za-z])"
)
_IN_FORMULA = re.compile(r"\$+[^$]+\$+|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_OPENED = re.compile(r"(?:[{(^_]|(?<!\$)\$)\Z")
_ANSWERS = ("answer", "reward_model.ground_truth", "gold")
_UNPRINTABLE = re.compile(rf"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|{_EATEN}")
_EATEN_OUTPUT = re.compile(rf"[\ud800-\udfff]|[\b\f](?=[A-Za-z])|{_EATEN}")
_ESCAPES = {"\b": r"\b", "\f": r"\f", "\t": r"\t", "\r": r"\r", "\n": r"\n"}


def check_characters(row: Row) -> None:
    """Raise RowError for a control character or a lone surrogate in any text of a row."""
    left: list[tuple[str, Any]] = []
    parts: Iterable[tuple[str, Any]] = row.items()
    while True:  # not recursive, because a row may be nested deeply
        for field, value in parts:
            if isinstance(value, str):
                if not value.isprintable() and (found := _control_character(field, value)):
                    raise RowError(field, _unprintable(value, found))
            elif isinstance(value, dict | list):
                left.append((field, value))
        if not left:
            return
        field, value = left.pop()
        named = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [
            (f"{field}.{key}" if isinstance(value, dict) else f"{field}[{key}]", part) for key, part in named
        ]


def check_text(field: str, text: Any) -> None:
    """Raise RowError for a NUL character or a lone surrogate in a text of no problem, such as a page of a book, in
    which other control characters are ordinary."""
    if isinstance(text, str) and not text.isprintable() and (found := re.search("[\0\ud800-\udfff]", text)):
        raise RowError(field, _unprintable(text, found))


def check_output(field: str, text: str) -> None:
    """Raise RowError if a model's output has a lone surrogate or a LaTeX command that JSON has eaten. Control
    characters may be what the model wrote."""
    if not text.isprintable() and (found := _EATEN_OUTPUT.search(text)):
        raise RowError(field, _unprintable(text, found))


def _control_character(field: str, text: str) -> re.Match[str] | None:
    """Return the first control character or lone surrogate that is not an ordinary tab or line break."""
    found = None if text.replace("\n", "").isprintable() else _UNPRINTABLE.search(text)
    perhaps = (m for m in _PERHAPS_EATEN.finditer(text) if _is_eaten(field, text, m))
    return found or _EATEN_LINE.search(text) or next(perhaps, None)


def _is_eaten(field: str, text: str, found: re.Match[str]) -> bool:
    """Return whether a tab or line break before a short word is the beginning of a LaTeX command. A line break in
    a formula, or in an answer of several lines, is ordinary."""
    at = found.start()
    if _OPENED.search(text, max(0, at - 2), at) or (field in _ANSWERS and not at):
        return True
    formulas = (span.span() for span in _IN_FORMULA.finditer(text))
    return text[at] == "\t" and (field in _ANSWERS or any(start < at < end for start, end in formulas))


def _unprintable(text: str, found: re.Match[str]) -> str:
    at, code = found.start(), ord(found[0][0])
    if 0xD800 <= code < 0xE000:
        return f"expected text, got the lone surrogate U+{code:04X} at character {at + 1}"
    name = "a NUL character" if code == 0 else f"the control character U+{code:04X}"
    fault = f"expected text, got {name} at character {at + 1}"
    escape, rest = _ESCAPES.get(text[at], ""), re.match(r"[A-Za-z]+", text[at + 1 :])
    if not escape or not rest:
        return f"{fault}; remove it"
    command = f"{escape}{rest[0][:20]}"
    return rf"{fault}: JSON has read {command} as {escape} and text; write \{command}, or write the file with a JSON library"
