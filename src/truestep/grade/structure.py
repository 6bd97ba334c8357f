"""Reads brackets, lists, regions of the number line, assignments and matrices in answers, without algebra."""

from __future__ import annotations

import re

from truestep.grade.normal import TEXT_COMMAND, canonical
from truestep.grade.numeric import parse_number

OPEN, CLOSE = {"(": ")", "[": "]", "{": "}"}, ")]}"

_JOINING_TEXT = re.compile(TEXT_COMMAND + r"\{([^{}]*\b(?:and|or)\b[^{}]*)\}")
_SEPARATOR = re.compile(
    rf"[(\[{{)\]}}]|[,;]|{TEXT_COMMAND}\{{\s*(?:and|or)\s*\}}|(?<![A-Za-z\\])(?:and|or)(?![a-z])|"
    r"\\(?:land|lor|wedge|vee)(?![A-Za-z])"
)
_RELATION = re.compile(r"(\\leq(?![A-Za-z])|\\geq(?![A-Za-z])|<|>)")
_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w\}?)?|\\[a-z]{2,7}(?:_\{?\w\}?)?")
_NAMES = re.compile(r"\(\s*([A-Za-z](?:\s*,\s*[A-Za-z]){1,5})\s*\)\s*=(?!=)")
_ASSIGNMENT = re.compile(r"([A-Za-z](?:_\{?\w{1,3}\}?)?)\s*=\s*([^=<>]+)")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)


def elements(text: str) -> list[str]:
    """Split a text at its top-level commas, semicolons, "and" and "or"."""
    text = _JOINING_TEXT.sub(r" \1 ", text)
    if not re.search(r"[,;]|and|or|\\wedge|\\vee", text) or parse_number(text) is not None:
        return [text]
    parts, start, depth = [], 0, 0
    for match in _SEPARATOR.finditer(text):
        token = match[0]
        if token in OPEN or token in CLOSE:
            depth += 1 if token in OPEN else -1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def brackets(text: str) -> tuple[str, str, str]:
    r"""Return the brackets around a whole text, and their content. The two brackets of an interval may
    differ. ``\{ \}`` is a set; braces without backslashes only group in LaTeX."""
    text = text.strip()
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    bare = "{" + text[2:-2] + "}" if is_set else text
    if bare[:1] not in OPEN or bare[-1:] not in CLOSE or len(bare) < 2:
        return "", text, ""
    depth = 0
    for position, character in enumerate(bare):
        depth += (character in OPEN) - (character in CLOSE)
        if depth == 0 and position < len(bare) - 1:
            return "", text, ""
    if bare[0] == "{" and bare[-1] == "}" and not is_set:
        return "", bare[1:-1], ""
    return bare[0], bare[1:-1], bare[-1]


# A part of the line: its low and high end as text, and whether each end belongs to it.
Stretch = tuple[str, str, bool, bool]


def region(text: str) -> tuple[list[Stretch], bool] | None:
    r"""Return the region of the number line that a text describes, and whether the text contains relations. A
    region may be ``a < x \leq b``, an interval, ``\mathbb{R}`` or a union. Return None for other texts."""
    text = re.sub(r"^\s*\\?[A-Za-z]+\s*\\in(?![A-Za-z])\s*", "", text.strip())
    set_builder = r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid|\||:)(.*)\\\}"
    text = builder[2] if (builder := re.fullmatch(set_builder, text)) else text
    if re.fullmatch(r"\\(?:mathbb|mathbf|Bbb)\s*\{?\s*R\s*\}?", text.strip()):
        return [_stretch(r"-\infty", r"\infty")], False
    is_relation = bool(_RELATION.search(text))
    joint = rf"\\cup(?![A-Za-z])|{TEXT_COMMAND}\{{\s*or\s*\}}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])"
    parts = re.split(joint if is_relation else r"\\cup(?![A-Za-z])", text)
    found = [_from_relation(part) if is_relation else _from_interval(part) for part in parts[:20]]
    stretches = [part for part in found if part is not None]
    return (stretches, is_relation) if len(stretches) == len(parts) else None


def _stretch(low: str, high: str, has_low: bool = False, has_high: bool = False) -> Stretch:
    low, high = (re.sub(r"\+\s*(?=\\infty)", "", end.strip()) for end in (low, high))
    return low, high, has_low, has_high


def _from_interval(text: str) -> Stretch | None:
    left, inside, right = brackets(text)
    ends = elements(inside)
    if left not in ("(", "[") or right not in (")", "]") or len(ends) != 2 or brackets(inside)[0]:
        return None
    return _stretch(ends[0], ends[1], left == "[", right == "]")


def _from_relation(text: str) -> Stretch | None:
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) not in (3, 5):
        return None
    is_falling = parts[1] in (">", r"\geq")
    parts = parts[::-1] if is_falling else parts  # read from the smaller side
    strict, weak = (">", r"\geq") if is_falling else ("<", r"\leq")
    terms, signs = parts[::2], parts[1::2]
    if not {*signs} <= {strict, weak}:
        return None
    closed = [sign == weak for sign in signs]
    if len(terms) == 3:
        low, middle, high = terms
        is_stretch = _VARIABLE.fullmatch(middle) and _is_end(low) and _is_end(high)
        return _stretch(low, high, *closed) if is_stretch else None
    low, high = terms
    if _VARIABLE.fullmatch(low) and _is_end(high) and not _is_end(low):
        return _stretch(r"-\infty", high, False, closed[0])
    if _VARIABLE.fullmatch(high) and _is_end(low) and not _is_end(high):
        return _stretch(low, r"\infty", closed[0], False)
    return None


def _is_end(text: str) -> bool:
    """Return whether a text has no variable, so that it can be an end of an interval."""
    constants = r"\\(?:frac|sqrt|pi|infty|ln|log|cdot|times)(?![A-Za-z])|(?<![A-Za-z])[e](?![A-Za-z])"
    bare = re.sub(constants, "", text)
    return bool(text) and not re.search(r"[A-Za-z,]", bare)


def as_tuples(text: str) -> str | None:
    """Return assignments as tuples in alphabetical order of names; p=5, q=2; p=7, q=2 becomes (5,2), (7,2).
    Return None unless the text consists of complete groups of assignments to the same two to six names."""
    found = [_ASSIGNMENT.fullmatch(part) for part in elements(text)]
    if len(found) < 2 or len(found) > 60 or None in found:
        return None
    pairs = [(canonical(match[1]), match[2].strip()) for match in found if match is not None]
    names = list(dict.fromkeys(name for name, _ in pairs))
    size = len(names)
    groups = [dict(pairs[i : i + size]) for i in range(0, len(pairs), size)]
    if not 2 <= size <= 6 or any(sorted(group) != sorted(names) for group in groups):
        return None
    return ", ".join("(" + ", ".join(group[name] for name in sorted(names)) + ")" for group in groups)


def without_names(text: str) -> str | None:
    """Return (x, y) = (1, 2) as (1, 2), if the names are in alphabetical order."""
    match = _NAMES.match(text.strip())
    if match is None or (names := re.split(r"\s*,\s*", match[1])) != sorted(names):
        return None
    return text.strip()[match.end() :].strip()


def matrix(text: str) -> list[list[str]] | None:
    """Return the rows of a matrix with plain entries; None for anything else."""
    match = _MATRIX.fullmatch(text.strip().strip("$ "))
    if match is None or r"\begin" in match[2]:
        return None
    rows = [[entry.strip() for entry in row.split("&")] for row in re.split(r"\\\\", match[2]) if row.strip()]
    return rows if rows and len({len(row) for row in rows}) == 1 else None
