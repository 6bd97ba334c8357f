"""Reads a row of a benchmark, in any published layout, as its question, choices and gold answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.data.rows import Row, RowError, read_rows, shown
from truestep.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"^\(?([A-Z]|\d{1,2})[).:]\s*")


class NotThere(UserError):
    """Error for a benchmark that has neither a local file nor a source."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question as published. ``choices`` are bare texts (() if the answer is free); ``answer`` is the gold
    answer or, with choices, the position of the correct one, written as a decimal number."""

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


def content_hash(items: Iterable[Item]) -> str:
    """Return the SHA-256 of questions, choices and answers. It does not depend on ids or on the order of the
    rows, so the same questions from a different source are the same benchmark."""
    lines = sorted(json.dumps([i.question, list(i.choices), i.answer], ensure_ascii=False) for i in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def item_of(row: Row, id: str) -> Item:
    """Return the item in a row, which has a published or the plain layout (problem or question, answer,
    optional choices). Raises RowError, without a quotation of the row, as some benchmarks are private."""
    id = str(row.get("id") or row.get("Record ID") or row.get("question_id") or id)
    question, choices, answer = _parts(row)
    question, answer = question.strip(), answer.strip()
    for field, value in (("question", question), ("answer", answer)):
        if not value:
            raise RowError(field, "expected text, got nothing")
    return Item(id=id, question=question, answer=answer, choices=tuple(c.strip() for c in choices))


def _parts(row: Row) -> tuple[str, Sequence[str], str]:
    if "Correct Answer" in row:  # GPQA
        wrong = [_text(row, f"Incorrect Answer {n}") for n in (1, 2, 3)]
        return _text(row, "Question"), [_text(row, "Correct Answer"), *wrong], "0"
    if "Body" in row:  # SVAMP
        return f"{_text(row, 'Body')} {_text(row, 'Question')}", (), _text(row, "Answer")
    question = _text(row, "question" if "question" in row else "problem")
    given: Any = row.get("options") or row.get("choices")
    labels: Sequence[str] = ()
    if isinstance(given, dict):  # ARC
        given, labels = given.get("text"), given.get("label", ())
    key = "answerKey" if "answerKey" in row else "answer"
    answer = _text(row, key)
    if given is None and (found := _inline_choices(question)):
        question, given = found
    if given is not None:
        return question, *_choices(given, labels, answer, key)
    return question, (), answer.rpartition("####")[2]  # a GSM8K solution ends with #### ANSWER


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise RowError(field, f"expected text, got {type(value).__name__}")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inline_choices(problem: str) -> tuple[str, list[str]] | None:
    """Return the question and its choices, if the problem ends with a block of lines A) …, B) …"""
    question, _, block = problem.rpartition("\n\n")
    lines = block.split("\n")
    marks = [_LABEL.match(line) for line in lines]
    if not question or len(lines) < 2 or not all(marks):
        return None
    expected = (LETTERS[: len(lines)], "".join(str(n + 1) for n in range(len(lines))))
    return (question, lines) if "".join(m[1] for m in marks if m) in expected else None


def _choices(given: Any, labels: Sequence[str], answer: str, key: str) -> tuple[list[str], str]:
    """Return the bare texts of the choices, and the position of the correct one."""
    if not isinstance(given, list | tuple) or not all(isinstance(c, str) for c in given):
        raise RowError("choices", "expected a list of strings")
    if not labels:
        given, labels = labeled(given)
    kept = [c for c in given if c != "N/A"]
    if answer not in labels or (place := labels.index(answer)) >= len(given):
        # A private answer is a text; what is no longer than a label can be quoted.
        got = shown(answer) if len(answer) <= 3 else f"a text of {len(answer)} characters"
        span = f"{labels[0]} to {labels[len(given) - 1]}" if given and len(labels) >= len(given) else "none"
        raise RowError(key, f"expected the label of one of the {len(given)} choices ({span}), got {got}")
    return kept, str(kept.index(given[place]) if len(kept) < len(given) else place)


def labeled(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the bare texts of choices, and their labels: those that the texts begin with, or else A, B, C, …"""
    marks, letters = [_LABEL.match(c) for c in given], list(LETTERS[: len(given)])
    labels = [m[1] for m in marks if m]
    if labels in (letters, [str(n + 1) for n in range(len(given))]):
        return [c[m.end() :] for c, m in zip(given, marks, strict=True) if m], labels
    return list(given), letters


def file_items(path: Path) -> list[Item]:
    """Return the items in a file of any kind in ``rows.READ``. Raises UserError with file, row and field."""
    return items_of(str(path), path.stem, read_rows(path))


def hub_items(name: str, repository: str, config: str, split: str) -> list[Item]:
    """Return the items of a Hugging Face hub data set, from its local cache if HF_HUB_OFFLINE=1 is set."""
    where = f"benchmark {name}: hub:{repository}"
    try:
        import datasets
    except ModuleNotFoundError:
        hint = f'run pip install "truestep[hub]", or pass --data FOLDER with {name}.jsonl'
        raise NotThere(f"{where} needs the datasets package; {hint}") from None
    try:
        table: Any = datasets.load_dataset(repository, config or None, split=split, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f"pass --data FOLDER with {name}.jsonl"
        raise NotThere(f"{where} cannot be loaded ({reason}); {hint}") from None
    return items_of(where, name, enumerate((dict(row) for row in table), start=1))


def items_of(label: str, stem: str, rows: Iterable[tuple[int, Row | RowError]]) -> list[Item]:
    """Return the items in numbered rows. Raises UserError with ``label``, row and field."""
    items: dict[str, Item] = {}
    for number, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            item = item_of(row, f"{stem}-{number - 1}")
            if item.id in items:
                raise RowError("id", "expected a unique id, got the id of an earlier row")
        except RowError as error:
            remedy = "" if error.is_of_names else "; correct the row"
            raise UserError(f"{label}:{number}: {error}{remedy}") from None
        items[item.id] = item
    return list(items.values())
