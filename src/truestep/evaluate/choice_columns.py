"""Reads choices that are in separate columns (A, B, C; option_a, option_b; choice1, choice2) as a list of choices.

The columns are recognized by their names, and are choices only if the answers of the file are their labels or texts.
Held by: tests/evaluate/test_choice_columns.py"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from truestep.data.rows import Row, RowError, shown
from truestep.evaluate.choice_rows import Numbered, key_of
from truestep.evaluate.sources import LETTERS

# A label, such as "A", "(b)", "1." or "option_a".
_NAME = re.compile(
    r"((?:option|opt|choice|alternative|answer|ans)s?[ _.-]*)?\(?([a-j]|\d)\)?[.):]?", re.IGNORECASE
)
_FIRST = ("a", "0", "1")  # labels with which columns of choices begin


NO_CHOICE = "expected the label or the text of one of the choices in "


def gathered(rows: Sequence[Numbered], named: Collection[str] = ()) -> tuple[list[Numbered], list[str]]:
    """Return the rows with such columns as ``choices`` and with labels as letters, and the names of these columns:
    [] if there are none, or if no answer names a choice. If only some answers do, the other rows become errors.
    ``named`` are columns with another meaning."""
    names = {key: None for _, row in rows if isinstance(row, dict) for key in row if key not in named}
    for columns in _runs(list(names)):
        made = [(n, _with_choices(row, columns) if isinstance(row, dict) else row) for n, row in rows]
        old = {n for n, row in rows if isinstance(row, dict)}
        if any(n in old and not (isinstance(new, RowError) and NO_CHOICE in new.message) for n, new in made):
            return made, list(columns.values())
    return list(rows), []


def _runs(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield every set of at least two columns with consecutive labels from the first one, by label."""
    labels: dict[str, dict[str, str]] = {}
    for name in names:
        if found := _NAME.fullmatch(name.strip()):
            labels.setdefault((found[1] or "").lower(), {})[found[2].lower()] = name
    for of in labels.values():
        for first in _FIRST:
            run = [chr(ord(first) + i) for i in range(len(LETTERS))]
            num = next(i for i, label in enumerate(run) if label not in of)
            if num > 1:
                yield {label: of[label] for label in run[:num]}
                break


def _with_choices(row: Row, columns: dict[str, str]) -> Row | RowError:
    """Return the row with its choices as a list. Its answer becomes a letter if it is a label; a text or, beside
    letters, a number is left for ``choice_rows.lettered``."""
    key, values = key_of(row), [row.get(name) for name in columns.values()]
    while values and values[-1] is None:  # the row has fewer choices than others
        values.pop()
    texts = ["" if value is None else str(value).strip() for value in values]
    answer = "" if row.get(key) is None else str(row[key]).strip()
    labels, match = list(columns)[: len(texts)], _NAME.fullmatch(answer)
    place = labels.index(match[2].lower()) if match and match[2].lower() in labels else None
    same = texts.index(answer) if answer and answer in texts else None
    is_number = "a" in columns and answer.isdecimal() and int(answer) <= len(texts)
    if place is None and same is None and not is_number:
        fault = f"{NO_CHOICE}{', '.join(columns.values())}, got"
        return RowError(key, f"{fault} {shown(row.get(key))}; if they are not choices, rename these columns")
    if "" in texts:
        empty = [*columns.values()][texts.index("")]
        return RowError(empty, "expected the text of a choice, got nothing before the last choice")
    if place is not None and same not in (None, place):
        fault = f"got {shown(answer)}, which is the label of one choice and the text of another"
        return RowError(key, f'{fault}; if the label is meant, write "choice {answer}"')
    kept = {k: v for k, v in row.items() if k not in columns.values()} | {"choices": texts}
    return kept if place is None else kept | {key: LETTERS[place]}
