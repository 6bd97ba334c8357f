"""Decides without algebra whether two answers are the same, or names the pairs that algebra must compare.

The result is True, False, or None for "not decided here". Both answers must be normalized
(``grade.normal``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from truestep.grade import structure
from truestep.grade.bases import same_base
from truestep.grade.choices import choice_letter
from truestep.grade.formula import MAX_DEPTH, refusal
from truestep.grade.normal import TEXT_COMMAND, canonical, plain
from truestep.grade.numeric import Number, european, parse_number, same_number, split_unit
from truestep.grade.phrase import num_words
from truestep.grade.quantity import same_quantity, with_digits
from truestep.grade.sides import right_side, split_left
from truestep.grade.structure import brackets, different_signs, elements, is_restated, matrix
from truestep.grade.units import conversion, same_unit
from truestep.grade.words import same_date, same_time

MAX_LENGTH = 2_000  # characters; longer answers are compared only as text
MAX_ELEMENTS = 60  # elements of a list, including nested lists; a longer list is left to algebra
MAX_PROSE = 2  # words next to the mathematics; an answer with more is a sentence and is compared as text
_LABEL = re.compile(rf"(?:{TEXT_COMMAND}\{{\s*)?(?:\(([A-J])\)|([A-J])[:)])\s*(?:\}}\s*)?(?=[^\s}}])")
_CHOICE = re.compile(r"\(?([A-J])\)?[.:]?$|\(([A-J])\)\s(?!.*\b[A-HJ-Z]\b)|([A-J])[.:)]\s(?!.*\b[A-HJ-Z]\b)")
_WORDS_ONLY = re.compile(r"[A-Za-z][A-Za-z' -]*$")
_NOTHING = [  # phrases that are one answer
    (
        "no solution",
        re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?(?:empty|null) set|\\emptyset"),
    ),
    ("does not exist", re.compile(r"(?:the limit )?(?:does not|doesn't) exist|dne|d\.n\.e")),
]
# A formula that may stand for several values.
_EXPANDING = re.compile(r"\\(?:pm|mp|[lc]?dots|[lg]eq?|neq|in|cup|cap)(?![A-Za-z])|[<>]")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The result of a comparison. ``equal`` is None if there is no verdict yet, or if the comparison failed;
    ``reason`` says how the answer was judged, or why it was not. ``unreadable`` marks an answer that is different
    because it could not be read."""

    equal: bool | None
    reason: str = ""
    unreadable: bool = False


def decide(gold: str, found: str) -> Decision:
    """Compare two normalized answers without algebra."""
    if gold == found or canonical(gold) == canonical(found):
        return Decision(equal=True, reason="same text")
    if len(found) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        reason = f"over {MAX_LENGTH:,} characters: compared as text"
        return Decision(equal=False, reason=reason, unreadable=len(found) > MAX_LENGTH)
    if refused := refusal(gold):
        return Decision(equal=None, reason=f"not compared: in the gold answer, {refused}")
    if refused := refusal(found):
        return Decision(equal=False, reason=f"unreadable: {refused}", unreadable=True)
    if (equal := _same(gold, found, depth=0)) is not None:
        return Decision(equal=equal, reason="compared as numbers, words or lists")
    if num_words(re.sub(r"\b(?:and|or)\b", " ", plain(found))) > MAX_PROSE:
        return Decision(equal=False, reason="the answer is a sentence: compared as text")
    return Decision(equal=None)


def ballot(answer: str) -> str:
    """Return the key under which an answer counts as a vote. The key of a number has no unit, so that 7, 7.0
    and $7 are the same vote. The key of any other answer is its canonical text."""
    number = parse_number(plain(answer)) if len(answer) <= MAX_LENGTH else None
    if number is None:
        return canonical(answer)
    # Hexadecimal, because Python refuses to write numbers of more than 4,300 decimal digits.
    return f"\0{number.value.numerator:x}/{number.value.denominator:x}"


def same_integer(gold: str, found: str) -> bool | None:
    """Return whether two answers are the same number; None if the gold answer is not a number."""
    left = parse_number(plain(gold)) or parse_number(gold)
    right = parse_number(found) or parse_number(right_side(found))
    return None if left is None else right is not None and same_number(left, right)


def _same(gold: str, found: str, depth: int) -> bool | None:
    if canonical(gold) == canonical(found):
        return True
    if depth >= MAX_DEPTH:
        return None
    left, right = parse_number(gold), parse_number(found)
    if (left is None) != (right is None):
        left, right = parse_number(gold, letters=True), parse_number(found, letters=True)
    if left is not None and right is not None:
        return same_number(left, right) or _same_european(gold, found, left, right)
    if left is not None and is_restated(left, found):
        return True
    for rule in (
        different_signs,
        same_base,
        _same_time,
        _same_words,
        _same_spelled,
        same_quantity,
        _same_ratio,
    ):
        if (equal := rule(gold, found)) is not None:
            return equal
    if left is not None and _WORDS_ONLY.match(plain(found)):
        return False
    for reshape in (_same_region, _same_assignments, _same_matrix, _same_labelled):
        if (equal := reshape(gold, found, depth)) is not None:
            return equal
    if stripped := _without_left_side(gold, found) or _without_units(gold, found):
        return _same(*stripped, depth + 1)
    return _same_european(gold, found, left, right) or _same_lists(gold, found, depth)


def _same_region(gold: str, found: str, depth: int) -> bool | None:
    """Return whether both are the same part of the number line; None if undecided. Two relations must have the
    same variable, and are never different here."""
    left, right = structure.region(gold), structure.region(found)
    if left is None or right is None or (left[1] and right[1] and left[1] != right[1]):
        return None
    if len(left[0]) != len(right[0]):
        return None  # two stretches may be the parts of a single one

    def same(one: structure.Stretch, other: structure.Stretch) -> bool | None:
        if one[2:] != other[2:]:
            return False
        ends = [_same(a, b, depth + 1) for a, b in zip(one[:2], other[:2], strict=True)]
        return False if False in ends else True if all(ends) else None

    equal = _matching([[same(one, other) for other in right[0]] for one in left[0]])
    return equal or (False if len(left[0]) == 1 and not (left[1] and right[1]) else None)


def questions(gold: str, found: str, depth: int = 0) -> list[tuple[str, str]]:
    """Return the pairs that algebra must compare. Two undecided answers are equal if all their pairs are
    equal. The pairs are the undecided entries of tuples, intervals and matrices, or the whole answers."""
    stripped = _without_left_side(gold, found) or _without_units(gold, found)
    if stripped and depth < MAX_DEPTH:
        return questions(*stripped, depth + 1)
    left, right = brackets(gold), brackets(found)
    ours, theirs = (elements(side[1], inside=bool(side[0])) for side in (left, right))
    rows = matrix(gold), matrix(found)
    if rows[0] is not None and rows[1] is not None:
        ours, theirs = ([entry for row in side for entry in row] for side in rows if side is not None)
    elif not (left[0] in ("(", "[") and left[::2] == right[::2] and len(ours) > 1):
        return [(gold, found)]
    if len(ours) != len(theirs) or len(ours) > MAX_ELEMENTS or depth >= MAX_DEPTH:
        return [(gold, found)]
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if _same(a, b, depth + 1) is not True]
    return [question for a, b in pairs for question in questions(a, b, depth + 1)]


def _same_assignments(gold: str, found: str, depth: int) -> bool | None:
    """Compare x = 1, y = 2 with (1, 2). The places of a tuple belong to the names in alphabetical order."""
    roots = [structure.roots(text) for text in (gold, found)]
    if roots[0] is not None and roots[1] is not None:
        return _same(roots[0], roots[1], depth + 1)
    sides = [structure.without_names(text) or text for text in (gold, found)]
    if ("=" in sides[0]) != ("=" in sides[1]):
        tuples = [structure.as_tuples(side) for side in sides]
        if any(tuples):  # the values of names are ordered, also if a list has no brackets
            sides = [
                made
                or (
                    f"({side})"
                    if brackets(side)[0] == "" and len(elements(side)) > 1 and "(" not in side
                    else side
                )
                for made, side in zip(tuples, sides, strict=True)
            ]
    has_tuple = all("(" in side for side in sides)
    return _same(sides[0], sides[1], depth + 1) if sides != [gold, found] and has_tuple else None


def _same_matrix(gold: str, found: str, depth: int) -> bool | None:
    """Compare two matrices entry by entry, a matrix of one row or column with a tuple, or a matrix with a
    list of rows."""
    left, right = matrix(gold), matrix(found)
    if left is not None and right is not None:
        if [len(row) for row in left] != [len(row) for row in right]:
            return False
        pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
        entries = [_same(one, other, depth + 1) for one, other in pairs[:MAX_ELEMENTS]]
        return False if False in entries else True if all(entries) and len(pairs) <= MAX_ELEMENTS else None
    rows, other = (left, found) if left is not None else (right, gold)
    if rows is None:
        return None
    kind = brackets(other)[0]
    if kind == "(" and 1 in (len(rows), len(rows[0])):
        flat = f"({', '.join(entry for row in rows for entry in row)})"
    elif kind == "[" and "[" in brackets(other)[1]:
        flat = "[" + ", ".join(f"[{', '.join(row)}]" for row in rows) + "]"
    else:
        return None
    return _same(*((flat, found) if left is not None else (gold, flat)), depth + 1)


def _same_spelled(gold: str, found: str) -> bool | None:
    """Compare a number with a number in words, perhaps with a unit: twenty percent, 五万."""
    texts = plain(gold), plain(found)
    numbers = [parse_number(text) for text in texts]
    if (numbers[0] is None) == (numbers[1] is None):
        return None
    left, right = (n or parse_number(with_digits(text)) for n, text in zip(numbers, texts, strict=True))
    return None if left is None or right is None else same_number(left, right)


def _same_time(gold: str, found: str) -> bool | None:
    texts = plain(gold), plain(found)
    return equal if (equal := same_time(*texts)) is not None else same_date(*texts)


def _same_ratio(gold: str, found: str) -> bool | None:
    """Compare ratios such as 3:4, 3 to 4 and 6 : 8; None for other texts."""
    ratios = [re.split(r"\s*:\s*|\s+to\s+|\\colon\s*", plain(text)) for text in (gold, found)]
    left, right = ([parse_number(part) for part in parts] for parts in ratios)
    if len(left) < 2 or len(left) != len(right):
        return None
    are_times = all(re.fullmatch(r"\d{1,2}:\d\d", plain(text)) for text in (gold, found))
    if are_times or all(" to " in plain(text) for text in (gold, found)):  # a time of day, a range
        return all(a and b and a.value == b.value for a, b in zip(left, right, strict=True))
    ours, theirs = ([n.value for n in numbers if n is not None and n.value] for numbers in (left, right))
    if len(ours) < len(left) or len(theirs) < len(right):
        return None
    return all(a * theirs[0] == b * ours[0] for a, b in zip(ours, theirs, strict=True))


def _same_labelled(gold: str, found: str, depth: int) -> bool | None:
    """Compare 42 with (B) 42, the label and the text of a choice."""
    labels = [_LABEL.match(text) for text in (gold, found)]
    if (labels[0] is None) == (labels[1] is None):
        return None
    gold, found = (
        text[label.end() :] if label else text for text, label in zip((gold, found), labels, strict=True)
    )
    return _same(gold, found, depth + 1)


def _same_european(gold: str, found: str, left: Number | None, right: Number | None) -> bool:
    """Return whether one answer is the other's number with a decimal comma. The comma counts as decimal if
    the gold answer has the same digits with a point. Any other comma counts only if a list is unlikely."""
    if re.fullmatch(r"-?\d+\.\d+", gold) and re.fullmatch(r"-?\d+,\d+", found):
        return gold == found.replace(",", ".") and not re.fullmatch(r"-?[1-9]\d{0,2},\d{3}", found)
    ours, theirs = european(gold) or left, european(found) or right
    is_new = european(gold) is not None or european(found) is not None
    return is_new and ours is not None and theirs is not None and same_number(ours, theirs)


def _same_words(gold_raw: str, found_raw: str) -> bool | None:
    gold, found = plain(gold_raw), plain(found_raw)
    forms = _word_form(gold), _word_form(found)
    if all(any(form == name for name, _ in _NOTHING) for form in forms):
        return forms[0] == forms[1]
    if choice := _CHOICE.match(gold):
        letter = next(filter(None, choice.groups()))
        if named := choice_letter(found):
            return named == letter
        if _WORDS_ONLY.match(found) and len(found) > 1:
            return False
    if not (_WORDS_ONLY.match(gold) and _WORDS_ONLY.match(found)):
        return None
    is_text = any(re.match(TEXT_COMMAND, raw) for raw in (gold_raw, found_raw))
    is_text = is_text or all(
        re.fullmatch("[A-Z]{2,}", text) for text in (gold, found)
    )  # an order, names of points
    longest = max(len(word) for word in f"{gold} {found}".split())
    if is_text or longest > 3 or (_is_word(gold) and _is_word(found)):
        return forms[0] == forms[1]
    return None


def _is_word(text: str) -> bool:
    """Return whether two or three letters are a word (no, red) and not a product of variables (AB, xyz)."""
    low = text.lower()
    is_run = low in "abcdefghijklmnopqrstuvwxyz"
    return low == "no" or (len(low) == 3 and bool(re.search("[aeiouy]", low)) and not is_run)


def _word_form(text: str) -> str:
    """Return words in lower case, with one form for all texts that say that there is no solution, or no limit."""
    text = re.sub(r"\s+", " ", text.casefold()).strip(" .!")
    text = re.sub(r"^(?:an?|the) (?=\w)", "", text)
    return next((name for name, spelling in _NOTHING if spelling.fullmatch(text)), text)


def _without_left_side(gold: str, found: str) -> tuple[str, str] | None:
    r"""Return both answers without "x =" or "x \in" if only one has it, or if it is the same in both."""
    sides = [split_left(text) for text in (gold, found)]
    if sides[0][0] and sides[1][0]:
        names = [re.sub(r"\([a-z]\)$", "()", canonical(side)) for side, _ in sides]
        constant = all(parse_number(value) is not None for _, value in sides)  # then f(n) is the same as f(x)
        same = names[0] == names[1] if constant else canonical(sides[0][0]) == canonical(sides[1][0])
        return (sides[0][1], sides[1][1]) if same else None
    has_one = (sides[0][0] or sides[1][0]) and "=" not in sides[0][1] + sides[1][1]
    return (sides[0][1], sides[1][1]) if has_one else None


def _without_units(gold: str, found: str) -> tuple[str, str] | None:
    """Return two formulas without their units, the first converted to the unit of the second; None if neither
    has a unit, or if the units do not measure the same."""
    (left, one), (right, other) = split_unit(gold), split_unit(found)
    if not (one or other):
        return None
    if not (one and other) or same_unit(one, other):
        return left, right
    factor = conversion(one, other)
    return (
        None
        if factor is None
        else (rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({left})", right)
    )


def _same_lists(gold: str, found: str, depth: int) -> bool | None:
    left, right = brackets(gold), brackets(found)
    ours, theirs = (elements(side[1], inside=bool(side[0])) for side in (left, right))
    if left[0] and len(ours) == 1 and right[0] and len(theirs) == 1:
        return _same(ours[0], theirs[0], depth + 1) if depth < MAX_DEPTH and left[::2] == right[::2] else None
    kinds = {left[0] + left[2], right[0] + right[2]}
    ordered = bool(kinds & {"()", "[)", "(]"}) or left[0] == "["
    is_set = len({canonical(part) for part in ours}) == len(ours)
    if not ordered and (kinds == {"{}"} or is_set):  # a repeated element does not change a set
        ours, theirs = (list({canonical(part): part for part in parts}.values()) for parts in (ours, theirs))
    if len(ours) != len(theirs):
        return None if _EXPANDING.search(gold + found) else False
    if len(ours) == 1 or gold.count(",") + gold.count(";") >= MAX_ELEMENTS or depth >= MAX_DEPTH:
        return None
    if len(kinds) == 2 and "" not in kinds:
        return False
    if ordered:
        row = [_same(one, other, depth + 1) for one, other in zip(ours, theirs, strict=True)]
        return False if False in row else True if all(row) else None
    return _matching([[_same(one, other, depth + 1) for other in theirs] for one in ours])


def _matching(table: list[list[bool | None]]) -> bool | None:
    """Return whether the elements can be matched one to one; None if that depends on undecided pairs."""
    free = set(range(len(table)))
    for row in table:
        partner = next((j for j in sorted(free) if row[j]), None)
        if partner is None:
            return None if None in row else False
        free.discard(partner)
    return True
