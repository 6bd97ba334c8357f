"""Reads the rows of ``truestep eval grade``: a gold answer and a prediction, checked as rows of data are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from truestep.data.characters import check_characters, check_output
from truestep.data.row_schema import choice_answer, scalar
from truestep.data.rows import Row, RowError, read_rows
from truestep.errors import UserError
from truestep.grade.pairs import Pair

_FIELDS = ("id", "kind", "gold", "pred", "choices")
_EXAMPLE = '{"gold": "1/2", "pred": "0.5"}'


def read_pairs(path: Path, note: Callable[[str], None] = lambda text: None) -> list[Pair]:
    """Return the pairs in a file of JSON lines (gold, pred, id, kind, choices). The default id is the row. A
    prediction may be null: there is none. Characters that JSON has probably damaged are kept, and ``note`` is told
    about them. Raises UserError with file, row and field for any other fault."""
    pairs: list[Pair] = []
    for number, row in read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            pairs.append(_pair(number, row))
            for damage in _damage(row, pairs[-1].pred):
                note(f"{path}: row {number}: field {damage}; graded as it is")
        except RowError as error:
            fault = f"field {error}"
            if error.field == "JSON":
                is_json = error.message.startswith("expected an object")
                fault = (
                    f"expected an object such as {_EXAMPLE}"
                    if is_json
                    else f"not valid JSON: {error.message}"
                )
            raise UserError(f"{path}: row {number}: {fault}") from None
    if not pairs:
        raise UserError(f"{path} is empty; write one object such as {_EXAMPLE} on each line")
    return pairs


def _damage(row: Row, pred: str | None) -> Iterator[RowError]:
    """Yield what JSON has probably damaged in a row. A prediction may have control characters that a model wrote."""
    try:
        check_characters({name: value for name, value in row.items() if name != "pred"})
    except RowError as error:
        yield error
    try:
        check_output("pred", pred or "")
    except RowError as error:
        yield error


def _pair(number: int, row: Row) -> Pair:
    for name in ("gold", "pred"):
        if row.get(name) is None and (name == "gold" or name not in row):
            found = "nothing" if name in row else "no such field"
            raise RowError(
                name, f'expected text or a number, got {found}; write, for example, "{name}": "1/2"'
            )
    pred = row["pred"] if isinstance(row["pred"], str | None) else scalar(row["pred"], "pred")
    for name in row:
        if near := _meant(name):
            raise RowError(name, f'no such field; did you mean "{near}"?')
    kind, id, choices = row.get("kind") or "", row.get("id"), row.get("choices")
    if not isinstance(kind, str) or (kind != "choice" and _is_misspelt(kind.lower())):
        raise RowError("kind", f'expected "choice", or another word for other answers, got {kind!r:.60}')
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        raise RowError("id", f"expected text or a whole number, got {id!r:.60}")
    gold: Any = scalar(row["gold"], "gold")
    if choices:
        choices, gold = choice_answer(choices, gold, "gold")
    return Pair(
        id=str(number if id is None else id), gold=gold, pred=pred, kind=kind, choices=tuple(choices or ())
    )


def _meant(name: str) -> str:
    """Return the optional field that a similar name means. Other names are the user's own."""
    if name in _FIELDS:
        return ""
    close = difflib.get_close_matches(name.lower(), ["kind", "choices"], n=1, cutoff=0.8)
    return "kind" if name == "checker" else next(iter(close), "")


def _is_misspelt(kind: str) -> bool:
    return "choice" in kind or bool(difflib.get_close_matches(kind, ["choice"], cutoff=0.7))
