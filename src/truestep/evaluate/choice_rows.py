"""Reads the answers of rows with choices that are a number or the text of a choice, as the letter of that choice.

Some files count from 0 (MMLU), others from 1. A file says which: 0 occurs only in the first, and the number of the
choices only in the second. Held by: tests/evaluate/test_own_benchmark.py"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from truestep.data.rows import Row, RowError, shown
from truestep.errors import count, verb
from truestep.evaluate.sources import LETTERS, labeled

Numbered = tuple[int, Row | RowError]


def lettered(rows: Sequence[Numbered]) -> tuple[list[Numbered], str]:
    """Return the rows with such answers as letters, and a sentence about them ("" without any). Rows whose choices
    have labels that are numbers are returned as they are, and so are answers that name no choice. An answer that can
    be read in two ways becomes an error."""
    numbers = {n: found for n, row in rows if isinstance(row, dict) and (found := _number(row))}
    values = [value for value, _ in numbers.values()]
    has_zero, has_last = 0 in values, any(value == size for value, size in numbers.values())
    first = 0 if has_zero else 1
    made: list[Numbered] = []
    num_texts = 0
    for n, row in rows:
        if isinstance(row, RowError):
            made.append((n, row))
        elif n in numbers:
            value, size = numbers[n]
            is_known = has_zero != has_last and first <= value < first + size
            letter = {key_of(row): LETTERS[value - first]} if is_known else {}
            made.append((n, {**row, **letter} if is_known else _refused(value, size, has_zero, has_last)))
        elif (place := _place_of_text(row)) is not None:
            num_texts += 1
            made.append((n, _of_text(row, place)))
        else:
            made.append((n, row))
    ways = ((len(numbers), f"number of a choice, counted from {first}"), (num_texts, "text of a choice"))
    said = [f"{count(num, 'answer')} {verb(num, 'are')} read as the {way}" for num, way in ways if num]
    return made, "; ".join(said)


def _of_text(row: Row, place: int) -> Row | RowError:
    """Return the row with the letter of the choice whose text is the answer, unless that can be another's number."""
    text, size = str(row[key_of(row)]), len(_choices_of(row))
    number = int(text) if text.strip().isdecimal() else -1
    if {n for n in (number, number - 1) if 0 <= n < size} - {place}:
        also = f"got {shown(text)}, which is the text of choice {LETTERS[place]} and can be the number of another"
        return RowError("answer", f"expected the letter of one choice, {also}")
    return {**row, key_of(row): LETTERS[place]}


def _refused(value: int, size: int, has_zero: bool, has_last: bool) -> RowError:
    if has_zero == has_last:
        both = (
            "both 0 and the number of choices occur"
            if has_zero
            else "neither 0 nor the number of choices occurs"
        )
        fault = f"the answers of this file are numbers, which can count from 0 or from 1, because {both}"
        return RowError("answer", f"{fault}; write letters (A to {LETTERS[size - 1]})")
    first = 0 if has_zero else 1
    fault = (
        f"expected the number of one of the {size} choices ({first} to {first + size - 1}, as in this file)"
    )
    return RowError("answer", f"{fault}, or its letter, got {value}")


def key_of(row: Row) -> str:
    return "answerKey" if "answerKey" in row else "answer"


def _choices_of(row: Row) -> list[str]:
    """Return the bare texts of the row's choices if their labels are letters, or []."""
    given: Any = row.get("options") or row.get("choices")
    if not isinstance(given, list | tuple) or not given or not all(isinstance(c, str) for c in given):
        return []
    bare, labels = labeled(given)
    return bare if labels[:1] == ["A"] and len(bare) <= len(LETTERS) else []


def _number(row: Row) -> tuple[int, int] | None:
    """Return the number that is the answer, and how many choices there are; None if it is not a number, or a text
    that is also the text of a choice."""
    value, choices = row.get(key_of(row)), _choices_of(row)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not choices or not (is_number or (isinstance(value, str) and value.strip().isdecimal())):
        return None
    if not is_number and _place_of_text(row) is not None:
        return None
    return int(str(value)), len(choices)


def _place_of_text(row: Row) -> int | None:
    """Return the place of the only choice whose text is the answer, unless the answer is a letter of a choice."""
    value, choices = row.get(key_of(row)), [choice.strip() for choice in _choices_of(row)]
    if (
        not isinstance(value, str)
        or value.strip() in LETTERS[: len(choices)]
        or choices.count(value.strip()) != 1
    ):
        return None
    return choices.index(value.strip())
