"""Reads the words and signs around a number in a sentence: whether they make another number of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from truestep.grade.units import FUNCTIONS, SCALES, WORDS

_WORDS = re.compile(
    r"[A-Za-z]{3,}|\b(?:so|is|he|it|we|of|to|be|by|at|us|if|no)\b|"
    r"[^\W\d_\u0000-\u024f\u0370-\u03ff\u2070-\u209f]|^[A-Z]:\s"
)
SENTENCE_END = re.compile(r"\n|[.?](?=\s|$)|!(?=\s|$)(?!\s*[=+*/])")  # 5! = 120 goes on
# What makes another number of it directly in front of a number: greater than, half of, a sign of arithmetic. "Equal to"
# and "a total of" do not. English has few words of these classes.
_BEFORE_END = re.compile(
    r"(?:\b(?:than|except|nor|not|never|without|until|till|through|least|most|up to|above|below|under|over|"
    r"beyond|between|within|exceeds?|exceeding|almost|nearly|hardly|barely|twice|thrice|double|triple|half|minus|negative|"
    r"plus|times|base|log|ln|root|mod|modulo|factorial|(?:divided|multiplied) by|different from|"
    r"(?:all|anything|everything|none) but|"
    r"(?:more|less|fewer|greater|larger|smaller|higher|lower) than or equal to|"
    r"(?:anywhere|somewhere|rang(?:es?|ing)|vary|varies) from \S{1,12} to)|n't|[<>≤≥≠^_√∛∜*/×·⋅÷+±~]|"
    r"\b(?:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|"
    r"tenths?|hundredths?|squares?|cubes?|roots?|factorial|multiples?|powers?|factors?|divisors?|"
    r"digits?|reciprocal|opposite|inverse|negative|logarithm|percent(?:age)?|product|quotient|primes?|\d%?) of|"
    r"\\(?:neq?|[lg]eq?|sqrt|times|cdot|div|pm|log|ln)|[A-Za-z]\(|\d(?:,\s|[/-])|\d\s(?:and|or))"
    r"\s*[$(]{0,2}$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[,;:]\s|=|\b(?:which|that|so|is|are|was|were|equals?|becomes?|gives?|gets?|yields?|has|have|"
    r"had)\b(?!n't)"
)
_NOT = re.compile(
    r"\b(?:not|never|cannot|nor|neither|except|unless|anything but|other than|different from|rather than|"
    r"instead of|(?:wrong|incorrect|false) (?:answer|value|result)|multiples?|powers?|factors?|"
    r"divisors?|reciprocal|opposite|inverse|remainder|non|nicht|pas)\b|n't\b|不是",
    re.IGNORECASE,
)
# What follows a number and makes another number of it; a reason, a time, a place or a noun does not.
_OPERATION = re.compile(
    r"(?:squared|cubed|doubled|tripled|halved|factorial|choose|remainder|otherwise|else|repeating|"
    rf"recurring|point|mod|modulo|power|gross|googol|half|octal|binary|hex|hexadecimal|{SCALES})$",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"(?:because|since|as|so|which|who|that|when|where|while|after|before|for|with|in|on|at|given|thus|if|"
    r"assuming|and|of|to|the|by|but|during|from|per|each|every|between|among|until|not|is|are|was|were|will|would|can|"
    r"has|have)$",
    re.IGNORECASE,
)
PIECEWISE = re.compile(r"\b(?:if|when|for)\b.*(?:\d\s(?:if|when|for)|\b(?:otherwise|else))\b", re.IGNORECASE)
_CONTINUES = re.compile(  # a harmless word with these words behind it is not harmless
    r"\s*(?:in base (?!10\b|ten\b)|and (?:(?:an?|one|two|three|four|five|seven|nine) [a-z]+|"
    r"[$*\\(]{0,3}[\d$]|[a-z]\s?=)|"
    r"or (?:more|less|fewer|greater|higher|lower|above|below|over|under|so|[a-z]\s?=|\W{0,3}\d|[$\\])|"
    r"of \S*\d|for (?:every|each) \S*\d|"
    r"to (?:the (?:power|\S*\d|[a-z]{2,9}(?:th|ird)\b)|\S*\d)|from \S*\d|by \S*\d|at (?:least|most)\b|"
    r"with (?:a )?remainder|(?:is|was|are) (?:wrong|incorrect|false)\b|isn't|but not)",
    re.IGNORECASE,
)
_ORDINAL = re.compile(
    r"\s(?:[a-z]+\s)?(?:primes?|roots?|power|terms?|squares?|cubes?|digits?|number|element|odd|even)\b"
)
GLUED = (*"gsLVAWJNm", "am", "pm")  # units that prose writes without a space: 100g
_NO_FACTOR = re.compile(rf"\b(?:st|nd|rd|th)\b|[ck]?m[²³]|(?<![A-Za-z])(?:{'|'.join(GLUED)})(?![\w^²³⁰-⁹])")
_STUCK = re.compile(
    r"(?!\s?[ck]?m[²³])(?:[\^!_²³¹⁰-⁹π√∛(]|\\(?!%|\)|\]|,|;|text|mathrm|\s)|[A-Za-z]{1,20}(?=[^A-Za-z]|$))"
)
_OPERATOR = re.compile(
    r"\s*(?:[+*×·⋅÷<>≤≥≠±^]|/(?!\s?[A-Za-z])|\\(?:times|cdot|div|pm|neq?|[lg]eq?)(?![a-z])|[-−–]\s?\d|:\s?\d)"
)
_IN_BRACKETS = re.compile(rf"\s*\(\s?(?:mod|base|not|{SCALES})", re.IGNORECASE)  # 18 (thousand)
_GROUP = re.compile(r"[(\[][^()\[\]A-Za-z\n]{1,40},[^()\[\]A-Za-z\n]{1,60}[)\]]")
# The pieces of a formula without delimiters.
_PIECE = re.compile(r"\d[\d.,]*\d|\d|\\[A-Za-z]+|[A-Za-z]+|\s|.", re.ASCII)
_SIGN = re.compile(r"[+*/×·⋅÷<>≤≥≠^±√∛∜π(){}⁰¹²³⁴-⁹₀-₉-]|\\(?:times|cdot|div|pm|neq?|[lg]eq?|sqrt|pi)")
_INFIX = re.compile(r"[+*/×·⋅÷<>≤≥≠±-]|\\(?:times|cdot|div|pm|neq?|[lg]eq?)")
_OPERAND = re.compile(r"\d[\d.,]*|[B-HJ-Zb-z]|log|ln|sin|cos|tan|sqrt|\\(?:log|ln|sin|cos|tan|frac)")
_NO_WORDS = WORDS | FUNCTIONS | {"and"}


def num_words(text: str) -> int:
    """Return the number of words in a text that are neither mathematics nor units."""
    text = re.sub(r"\\[A-Za-z]+(?:\s*\{[A-Za-z ]{0,100}\})?|(?<=\d)(?:or|and)(?=[A-Z(])", " ", text)
    return sum(word.lower() not in _NO_WORDS for word in _WORDS.findall(text))


def is_changed(before: str, after: str, *, is_marked: bool = False) -> bool:
    """Return whether the words around a number make another number of it: half of 18, 18 million, not 18, 18 or 20.
    ``before`` and ``after`` are the other parts of its sentence. A number ``is_marked`` as a formula or in bold is
    the answer even if it is a share or a rate: **18** out of 20."""
    if _NOT.search(_CLAUSE.split(before)[-1]) or _BEFORE_END.search(before):
        return True
    after = after.lstrip("*_$`\"'")
    if is_marked and re.match(r"(?:\s[a-z]{1,20})?\s(?:out of|per) \d", after):
        return False
    stuck = _STUCK.match(after)
    if stuck and stuck[0] in ("st", "nd", "rd", "th"):
        return bool(_ORDINAL.match(after[2:]))  # the 18th prime is not 18
    if stuck and stuck[0].lower() not in WORDS and stuck[0] not in GLUED:
        return True
    if re.match(r"[\s,]*(?:or|nor)\b", after):
        return True
    after = re.sub(r"^\s?(?:\\?%|percent\b)", "", after[stuck.end() if stuck else 0 :])
    if PIECEWISE.search(after[:200]) or _OPERATOR.match(after) or _IN_BRACKETS.match(after):
        return True
    for word in re.finditer(r"\s*(?:([A-Za-z][A-Za-z'-]*)|(\$?\d)|(.))", after[:200]):
        if word[2] or (word[1] and _OPERATION.match(word[1])):
            return True
        if _CONTINUES.match(after, word.start()):
            return True
        if (
            word[3] == ","
            and (more := re.match(r"\s([A-Za-z]+)", after[word.end() :]))
            and _OPERATION.match(more[1])
        ):
            return True
        if word[3] == "," and re.match(
            r"\s*(?:[*(]*\$?-?\d[\d.]*(?!\S?\s(?:of|%|days|years|hours|minutes)\b)(?![\d.])|\$)",
            after[word.end() :],
        ):
            return True  # a list
        if not word[1] or _HARMLESS.match(word[1]):
            return False
    return False


def run_of(text: str, number: re.Match[str]) -> tuple[int, int]:
    """Return the start and end of the pair, interval or formula without delimiters that contains a number:
    (3, 18), 2^18, 3 × 10⁸, x < 18. A formula starts after its last "="."""
    start, end = number.start(), number.start() + len(number[0].rstrip())
    if "/" in number[0] and (mixed := re.search(r"(?<![\d.,/])\d{1,6}\s$", text[max(0, start - 8) : start])):
        start -= len(mixed[0])  # 2 1/2
    if len(number[0]) == 2 and (hour := re.search(r"(?<!\d)\d{1,2}:$", text[max(0, start - 3) : start])):
        return start - len(hour[0]), end  # 2:30
    for group in _GROUP.finditer(text, max(0, start - 60), end + 60):
        if group.start() < start < group.end():
            return group.span()
    first = start - _reach(_PIECE.findall(text[max(0, start - 60) : start])[::-1])
    last = end + _reach(_PIECE.findall(_NO_FACTOR.split(text[end : end + 60])[0]))
    run = text[first:last]
    is_whole = all(run.count(a) == run.count(b) for a, b in ("()", "{}")) and not num_words(run)
    return (first, last) if is_whole else (start, end)


def _reach(pieces: Sequence[str]) -> int:
    """Return how many characters next to a number belong to its formula: operands that a sign joins to it."""
    length = taken = 0
    is_joined, is_tight = True, True  # a letter directly next to the number is a factor
    for place, piece in enumerate(pieces):
        length += len(piece)
        spaced = (
            piece == "-" and pieces[place - 1 : place] == [" "] and pieces[place + 1 : place + 2] == [" "]
        )
        if piece == " ":
            is_joined, is_tight = is_joined and place > 0, False
        elif _SIGN.fullmatch(piece) and not spaced:
            taken, is_joined = (taken if _INFIX.fullmatch(piece) else length), True
        elif (is_joined or is_tight) and _OPERAND.fullmatch(piece):
            taken, is_joined, is_tight = length, False, True
        else:
            break
    return taken
