"""Reads brackets, lists, regions of the number line, assignments and matrices in answers, without algebra."""

from __future__ import annotations

import re
from itertools import pairwise

from truestep.grade.normal import TEXT_COMMAND, canonical, plain
from truestep.grade.numeric import Number, parse_number, same_number

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

_DOTS = re.compile(r"\\[lcd]?dots(?:[bcmio])?(?![a-z])|\.{3}")
_LOGIC = re.compile(r"\\(?:land|lor|wedge|vee|lnot|neg|implies|iff)(?![A-Za-z])")
_CONNECTIVES = {"and": "and", "or": "or", r"\land": "and", r"\wedge": "and", r"\lor": "or", r"\vee": "or",
                r"\cap": "and", r"\cup": "or"}  # fmt: skip
_CONNECTIVE = r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\[a-z]+"


def elements(text: str, *, inside: bool = False) -> list[str]:
    """Split a text at its top-level commas, semicolons, "and" and "or". A comma between thousands separates only
    ``inside`` of brackets: (2,500) is a pair."""
    text = _JOINING_TEXT.sub(r" \1 ", text)
    if not re.search(r"[,;]|and|or|\\wedge|\\vee", text) or (not inside and parse_number(text) is not None):
        return [text]
    if inside and re.fullmatch(r"\s*\d{1,3}(?:,\d{3}){2,}\s*", text):
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
Region = list[Stretch]
LINE: Stretch = (r"-\infty", r"\infty", False, False)
_REALS = r"(?:\\(?:mathbb|mathbf|Bbb)\s*\{?\s*R\s*\}?|ℝ|(?:all )?real numbers|all reals?)"
_BUILDER = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*" + _REALS + r"\s*)?(?:\\mid|\||:)(.*)\\\}")
_UNION = (
    rf"\\(?:big)?cup(?![A-Za-z])|(?<=[)\]\[])\s*U\s*(?=[(\[\]])|{TEXT_COMMAND}\{{\s*or\s*\}}|"
    r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])"
)
_BOTH = re.compile(
    rf"\\(?:cap|land|wedge)(?![A-Za-z])|{TEXT_COMMAND}\{{\s*and\s*\}}|(?<![A-Za-z\\])and(?![A-Za-z])"
)
_MINUS = re.compile(rf"{_REALS}\s*(?:\\(?:setminus|backslash)(?![A-Za-z])|∖|-|\\(?=\\\{{))\s*(.+)")
_NOT = re.compile(rf"({_VARIABLE.pattern})\s*\\(?:neq|notin|not\s*\\in)(?![A-Za-z])\s*(.+)")
_NAME = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?:_\{?\w\}?)?(?![A-Za-z])|\\(?:theta|alpha|beta|lambda|mu|phi)")
_REGION = re.compile(
    r"[<>|\[\](]|\\(?:[lg]eq|neq|notin|in|mathbb|mathbf|Bbb)(?![A-Za-z])|\breals?\b", re.IGNORECASE
)
_ABSOLUTE = re.compile(
    r"(?:\||\\vert\s)\s*([A-Za-z])\s*(?:\||\\vert\s)\s*(<|>|\\leq(?![A-Za-z])|\\geq(?![A-Za-z]))\s*(.+)"
)


def region(text: str) -> tuple[Region, str] | None:
    r"""Return the region of the number line that a text describes, and the variable of its relations ("" if it
    has none). A region may be ``a < x \leq b``, ``|x| < a``, ``x \neq a``, an interval (also ``]a, b[``),
    ``\mathbb{R}``, a complement, a union or an intersection. Return None for other texts."""
    text = text.strip()
    if not _REGION.search(text):
        return None
    text = builder[2] if (builder := _BUILDER.fullmatch(text)) else text
    text = re.sub(r"^\s*\\?[A-Za-z]+\s*\\in(?![A-Za-z])\s*", "", text)
    names = {*_NAME.findall(text)} - {"e", "R", "U"} if _RELATION.search(text) or _NOT.search(text) else set()
    parts = [_part(part.strip()) for part in re.split(_UNION, text)[:20]]
    if len(names) > 1 or any(part is None for part in parts):
        return None
    return [stretch for part in parts if part for stretch in part], next(iter(names), "")


def _part(text: str) -> Region | None:
    """Return the region of a text without a union."""
    if re.fullmatch(_REALS, plain(text), re.IGNORECASE):
        return [LINE]
    if without := _MINUS.fullmatch(text) or _NOT.fullmatch(text):
        return _complement(without[without.lastindex or 1])
    if around := _ABSOLUTE.fullmatch(text):
        end, closed = around[3].strip(), around[2] in (r"\leq", r"\geq")
        if not _is_end(end) or end.startswith("-"):
            return None
        inside = around[2] in ("<", r"\leq")
        return (
            [("-" + end, end, closed, closed)]
            if inside
            else [(LINE[0], "-" + end, False, closed), (end, LINE[1], closed, False)]
        )
    if _BOTH.search(text):
        return _common([_part(part.strip()) for part in _BOTH.split(text)])
    if not _RELATION.search(text):
        stretch = _from_interval(text)
        return None if stretch is None else [stretch]
    found = [_from_relation(part) for part in elements(text)]
    stretches = [part for part in found if part is not None]
    if len(stretches) != len(found):
        return None
    return (_common([[part] for part in stretches]) or stretches) if len(found) > 1 else stretches


def _complement(text: str) -> Region | None:
    opening, inside, _ = brackets(text)
    if opening in ("(", "[") and (stretch := _from_interval(text)):
        low, high, has_low, has_high = stretch
        return [(LINE[0], low, False, not has_low), (high, LINE[1], not has_high, False)]
    points = elements(inside, inside=bool(opening))
    if not all(_is_end(point) for point in points) or (opening and opening != "{"):
        return None
    numbers = [parse_number(point) for point in points]
    if len(points) > 1:
        if None in numbers:
            return None
        points = [point for _, point in sorted(zip((n.value for n in numbers if n), points, strict=True))]
    ends = [LINE[0], *points, LINE[1]]
    return [(low, high, False, False) for low, high in pairwise(ends)]


def _common(parts: list[Region | None]) -> Region | None:
    """Return the intersection of single stretches; None if it is empty or cannot be found without algebra."""
    low, high, has_low, has_high = LINE
    for part in parts:
        if part is None or len(part) != 1:
            return None
        bounds = [
            _tighter((low, has_low), (part[0][0], part[0][2]), 1),
            _tighter((high, has_high), (part[0][1], part[0][3]), -1),
        ]
        if bounds[0] is None or bounds[1] is None:
            return None
        (low, has_low), (high, has_high) = bounds  # type: ignore[misc]
    ends = parse_number(low), parse_number(high)
    if ends[0] and ends[1] and ends[0].value >= ends[1].value:
        return None
    return [(low, high, has_low, has_high)]


def _tighter(one: tuple[str, bool], other: tuple[str, bool], sign: int) -> tuple[str, bool] | None:
    """Return the greater of two low ends (sign 1), or the smaller of two high ends (sign -1)."""
    if "infty" in one[0] or "infty" in other[0]:
        return other if "infty" in one[0] else one
    left, right = parse_number(one[0]), parse_number(other[0])
    if left is None or right is None:
        return one if one == other else None
    if left.value == right.value:
        return one[0], one[1] and other[1]
    return one if (left.value > right.value) == (sign > 0) else other


def _stretch(low: str, high: str, has_low: bool = False, has_high: bool = False) -> Stretch:
    low, high = (re.sub(r"\+\s*(?=\\infty)", "", end.strip()) for end in (low, high))
    return low, high, has_low, has_high


def _from_interval(text: str) -> Stretch | None:
    if (
        len(text) > 2
        and text[0] in "[]("
        and text[-1] in "[])"
        and "]" not in text[1:-1]
        and "[" not in text[1:-1]
    ):
        left, inside, right = text[0], text[1:-1], text[-1]  # also ]a, b[
    else:
        left, inside, right = brackets(text)
    ends = elements(inside, inside=True)
    if (
        left not in ("(", "[", "]")
        or not right
        or right not in ")]["
        or len(ends) != 2
        or brackets(inside)[0]
    ):
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


def roots(text: str) -> str | None:
    """Return the values of x_1=1, x_2=2 or x=1, x=2 as a list; None for other texts."""
    found = [_ASSIGNMENT.fullmatch(part) for part in elements(text)]
    if not 2 <= len(found) <= 60 or None in found:
        return None
    names = [canonical(match[1]) for match in found if match is not None]
    is_numbered = names == [f"{names[0][0]}_{i}" for i in range(1, len(names) + 1)]
    if not is_numbered and len({*names}) > 1:
        return None
    return ", ".join(match[2].strip() for match in found if match is not None)


def without_names(text: str) -> str | None:
    """Return the values in (x, y) = (1, 2) or (y, x) = (2, 1), in the alphabetical order of the names: (1, 2)."""
    match = _NAMES.match(text.strip())
    if match is None:
        return None
    names, values = re.split(r"\s*,\s*", match[1]), text.strip()[match.end() :].strip()
    if names == sorted(names):
        return values
    opening, content, closing = brackets(values)
    parts = elements(content, inside=True)
    if opening != "(" or closing != ")" or len(parts) != len(names):
        return None
    return "(" + ", ".join(value for _, value in sorted(zip(names, parts, strict=True))) + ")"


def matrix(text: str) -> list[list[str]] | None:
    """Return the rows of a matrix with plain entries; None for anything else."""
    match = _MATRIX.fullmatch(text.strip().strip("$ "))
    if (
        match is None or r"\begin" in match[2] or match[1] in ("vmatrix", "Vmatrix")
    ):  # the last two are numbers
        return None
    rows = [[entry.strip() for entry in row.split("&")] for row in re.split(r"\\\\", match[2]) if row.strip()]
    return rows if rows and len({len(row) for row in rows}) == 1 else None


def different_signs(gold: str, found: str) -> bool | None:
    """Return False for two texts of which only one has dots (1, 2, ..., 10), or that connect statements differently
    (x < 2 or x > 5; p and q). "x = 2 and x = 3" is a list of roots, and so the same with "or"."""
    if not any(part in gold + found for part in ("\\", "...", "and", "or")):
        return None
    dots = [len(_DOTS.findall(text)) for text in (gold, found)]
    if dots[0] != dots[1]:
        return False
    logic = [[_CONNECTIVES.get(sign, sign) for sign in _LOGIC.findall(text)] for text in (gold, found)]
    if any(logic) and not re.search(r"[=<>]|\\[lg]eq|\\neq|\\in(?![a-z])", gold + found):
        return None if logic[0] == logic[1] else False
    words = [
        {_CONNECTIVES[m] for m in re.findall(_CONNECTIVE, plain(text)) if m in _CONNECTIVES}
        for text in (gold, found)
    ]
    if len(words[0]) != 1 or len(words[1]) != 1 or words[0] == words[1]:
        return None
    names = {match for text in (gold, found) for match in re.findall(r"([A-Za-z])(?:_\w)?\s*=", text)}
    return False if re.search(r"[<>]|\\[lg]eq|\\neq", gold + found) or len(names) > 1 else None


def is_restated(number: Number, found: str) -> bool:
    """Return whether an answer gives the same number in two or three ways: "1/2 or 0.5"."""
    parts = elements(plain(found))
    values = [parse_number(part) for part in parts]
    return (
        1 < len(parts) < 4
        and " or " in found
        and all(n is not None and same_number(number, n) for n in values)
    )
