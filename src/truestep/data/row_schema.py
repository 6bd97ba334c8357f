"""Reads a row as a Problem, and defines which columns a row may have and what each may contain."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from truestep.data.rows import Row, RowError, shown
from truestep.records import Message, Problem
from truestep.settings import CHECKERS

PROMPT_COLUMNS = ("problem", "prompt", "messages")
ROLES = ("system", "user", "assistant")
# Other names for our columns, only for "did you mean"; they are never read.
ALIASES = {
    "question": "problem", "query": "problem", "input": "problem", "instruction": "prompt",
    "conversations": "messages", "conversation": "messages", "from": "role", "value": "content",
    "text": "content", "label": "answer", "gold": "answer", "ground_truth": "answer", "final_answer": "answer",
    "response": "solution", "output": "solution", "completion": "solution", "rationale": "solution",
}  # fmt: skip
# Columns and keys of turns that would change what is trained on. Not supported, so never dropped silently.
UNSUPPORTED = ("reasoning_content", "weight", "tools", "tool_calls", "functions", "function_call")
_UNSUPPORTED_IN_TURNS = (
    *UNSUPPORTED,
    "reasoning",
    "thinking",
    "tool_call_id",
    "tool_responses",
    "train",
    "loss",
)
_UNSUPPORTED_ROW = frozenset(UNSUPPORTED)
_BARE: tuple[Any, ...] = (None, "", [], {})  # parquet writes None for a key that only other rows have
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
# A letter with which an answer names a choice: (C), C. Cecile, c
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[).:])(?:\s.*)?$|([A-Za-z])$", re.DOTALL)
LETTERS = "ABCDEFGHIJ"  # the letters that the grader reads
_NUMBER = re.compile(r"\+?(\d{1,9})(?:\.0*)?")
_ANY_NUMBER = re.compile(r"[-+]?\d*\.?\d+\.?")


def problem_of(row: Row, *, id: str, where: str, checker: str, needs: Collection[str]) -> Problem:
    """Return the problem in a row. ``needs`` names what the row must have: "answer", "solution" or both.
    With "problem", neither is needed; if ``needs`` is empty, one of them is enough. Raises RowError with the
    first fault."""
    check_characters(row)
    if not _UNSUPPORTED_ROW.isdisjoint(row):
        _refuse(row, UNSUPPORTED, "")
    messages, solution, given = _turns(row)
    answer, solution = _answer(row), _solution(row, solution)
    if "answer" in needs and not answer:
        raise RowError("answer", "expected an answer, got none" + _near(row, "answer"))
    if "solution" in needs and not solution:
        raise RowError("solution", "expected a worked solution, got none" + _near(row, "solution"))
    if not answer and not solution and "problem" not in needs:
        hint = _near(row, "answer", "solution")
        raise RowError("answer", "expected an answer or a solution, got neither" + hint)
    if checker == "auto":
        if answer and row.get("checker") is None and row.get("choices") not in _BARE:
            remedy = 'set "checker": "choice", or checker = "choice" for the data set, or remove the choices'
            raise RowError("choices", f"the row has choices, but no checker; {remedy}")
        checker = _checker(row)
    meta: dict[str, Any] = {"turns_given": True} if given else {}
    if checker == "countdown":
        meta |= _countdown(row)
    if checker == "choice" and row.get("choices") is not None:
        choices, answer = choice_answer(row["choices"], answer)
        meta |= {"choices": choices}
    given_id = row.get("id")
    if given_id is not None:
        if isinstance(given_id, bool) or not isinstance(given_id, str | int):
            raise RowError("id", f"expected text or a whole number, got {shown(given_id)}")
        id = _text(str(given_id), "id")
    return Problem(
        id=id, messages=messages, answer=answer, checker=checker, solution=solution, row=where, meta=meta,
        columns=row,
    )  # fmt: skip


def unused_columns(row: Mapping[str, Any], checker: str, needs: Collection[str]) -> Iterator[str]:
    """Yield the columns of an accepted row, and the parts of its turns, that are not used if only ``needs`` are
    needed; if it is empty, answers and solutions are both used."""
    used = {*PROMPT_COLUMNS, "checker", "id"}
    used |= {"answer", "reward_model"} if not needs or "answer" in needs else set()
    with_solution = not needs or "solution" in needs
    used |= {"solution"} if with_solution else set()
    used |= {"choice": {"choices"}, "countdown": {"numbers", "target"}}.get(checker, set())
    for name, value in row.items():
        turns = value if isinstance(value, list) and value and isinstance(value[0], dict) else []
        is_read = name in used or (name == "target" and turns and with_solution)
        if not is_read and value is not None:
            yield name
        for turn in turns if is_read else []:
            for key in turn.keys() - {"role", "content"}:
                yield from (f"{name}[].{key}",) if turn[key] not in _BARE else ()
        if name == "messages" and not with_solution and turns and turns[-1].get("role") == "assistant":
            yield "messages[-1]"


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


def _refuse(keys: Row, names: Iterable[str], prefix: str) -> None:
    """Raise RowError if a row or a turn has a key that is not supported."""
    for name in names:
        if keys.get(name) not in _BARE:
            remedy = (
                "remove it, or rename a column that only a reward function reads"
                if not prefix
                else "remove it"
            )
            raise RowError(f"{prefix}{name}", f"is not supported and would be lost; {remedy}")


def choice_answer(value: Any, answer: str, field: str = "answer") -> tuple[list[str], str]:
    """Return the choices and the answer. An answer that is the number (from 1) or the text of one choice becomes
    its letter; other answers are returned as they are. Raises RowError if the choices are not a list of strings, or
    if the answer is a letter or a number of none of them or names two of them."""
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError("choices", f"expected a list of strings, got {shown(value)}")
    text, choices = answer.strip(), [choice.strip().casefold() for choice in value]
    letter, number = _LETTER.match(text), _NUMBER.fullmatch(text)
    named = ord(letter[letter.lastindex or 0].upper()) - ord("A") if letter else -1
    named = int(number[1]) - 1 if number else named
    same = [place for place, choice in enumerate(choices) if choice == text.casefold()]
    places = {*same, named} if 0 <= named < len(value) else {*same}
    if len(places) > 1:
        found = " and ".join(LETTERS[place] for place in sorted(places) if place < len(LETTERS))
        raise RowError(
            "answer", f"expected the letter of one choice, got {shown(answer)}, which can mean {found}"
        )
    if not places and (letter or _ANY_NUMBER.fullmatch(text)):
        expected = f"expected a letter or a number (from 1) of one of the {len(value)} choices"
        raise RowError(field, f"{expected}, got {shown(answer)}")
    place = max(places, default=len(LETTERS))
    return list(value), answer if (place == named and letter) or place >= len(LETTERS) else LETTERS[place]


def _turns(row: Row) -> tuple[tuple[Message, ...], str, bool]:
    """Return the prompt's turns, the solution if they end with one, and whether the row has turns instead of
    bare text."""
    present = [name for name in PROMPT_COLUMNS if row.get(name) is not None]
    expected = "expected one of problem, prompt and messages"
    if not present:
        raise RowError("problem", f"{expected}, got none" + _near(row, *PROMPT_COLUMNS))
    if len(present) > 1:
        raise RowError(present[1], f"{expected}, got {' and '.join(present)}; keep one")
    column, value = present[0], row[present[0]]
    if column == "problem" or (column == "prompt" and isinstance(value, str)):
        return (Message(role="user", content=_text(value, column)),), "", False
    messages = _messages(value, column)
    solution = ""
    if column == "messages" and messages[-1].role == "assistant":
        *messages, last = messages
        solution = last.content
    if not messages or messages[-1].role != "user":
        found = f"the {messages[-1].role}'s" if messages else "none"
        end = 'at the end (a worked answer belongs in "solution")'
        place = "before the assistant's solution" if solution else end
        raise RowError(column, f"expected the user's turn {place}, got {found}")
    return tuple(messages), solution, True


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(column, f'expected a list of {{"role": ..., "content": ...}}, got {shown(value)}')
    if not value:
        raise RowError(column, "expected at least one turn, got an empty list")
    messages = []
    for i, turn in enumerate(value):
        field = f"{column}[{i}]"
        if not isinstance(turn, dict):
            raise RowError(field, f'expected {{"role": ..., "content": ...}}, got {shown(turn)}')
        _refuse(turn, _UNSUPPORTED_IN_TURNS, f"{field}.")
        for key in ("role", "content"):
            if turn.get(key) is None:
                raise RowError(f"{field}.{key}", "expected text, got nothing" + _near(turn, key))
        if turn["role"] not in ROLES:
            found = shown(turn["role"]) + _did_you_mean(str(turn["role"]), ROLES)
            raise RowError(f"{field}.role", f"expected system, user or assistant, got {found}")
        if turn["role"] == "system" and i:
            raise RowError(f"{field}.role", "expected the system's turn first, got it later; move it")
        messages.append(Message(role=turn["role"], content=_text(turn["content"], f"{field}.content")))
    return messages


def _solution(row: Row, from_turns: str) -> str:
    """Return the demonstration, from ``solution``, the last of ``messages``, or ``target`` (a list)."""
    found = {"messages": from_turns} if from_turns else {}
    if row.get("solution") is not None:
        found["solution"] = _text(row["solution"], "solution")
    target = row.get("target")
    if (
        isinstance(target, list) and target and isinstance(target[0], dict)
    ):  # in other rows, target is a number
        turns = _messages(target, "target")
        if len(turns) != 1 or turns[0].role != "assistant":
            raise RowError("target", f"expected one assistant turn, got {', '.join(t.role for t in turns)}")
        found["target"] = turns[0].content
    if len(set(found.values())) > 1:
        raise RowError(
            "solution", f"expected one solution, got different ones in {' and '.join(found)}; keep one"
        )
    return next(iter(found.values()), "")


def _answer(row: Row) -> str:
    """Return the gold answer as text, from ``answer`` or verl's ``reward_model``; "" if there is none."""
    answer = "" if row.get("answer") is None else scalar(row["answer"], "answer")
    reward = row.get("reward_model")
    if reward is None:
        return answer
    if not isinstance(reward, dict):
        expected = '{"ground_truth": ..., "style": "rule"}'
        raise RowError("reward_model", f"expected {expected}, got {shown(reward)}")
    style = reward.get("style")
    if style is not None and not str(style).startswith("rule"):
        raise RowError("reward_model.style", f'expected "rule" (checked by a program), got {shown(style)}')
    key = "reward_model.ground_truth"
    if reward.get("ground_truth") is None:
        if answer:
            return answer
        raise RowError(key, "expected an answer, got nothing" + _near(reward, "ground_truth"))
    truth = scalar(reward["ground_truth"], key)
    if answer and answer != truth:
        raise RowError("answer", f"expected reward_model's {shown(truth)}, got {shown(answer)}; keep one")
    return truth


def scalar(value: Any, field: str) -> str:
    """Return a value as text. A number becomes plain decimal text (1e-05 → 0.00001, 3.0 → 3)."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise RowError(field, f"expected text or a number, got {shown(value)}")
    if isinstance(value, str):
        return _text(value, field)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value) or (value and not float(value)):
        raise RowError(
            field, f"expected a finite number that a float can hold, got {value}; write it as text"
        )
    number = Decimal(str(value))
    return str(int(number)) if number == int(number) else format(number, "f")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"expected text, got {shown(value)}")
    if not value.strip():
        raise RowError(field, "expected text, got an empty string")
    return value


def _checker(row: Row) -> str:
    value = row.get("checker")
    if value is None:
        return "math"
    if value not in CHECKERS:
        hint = _did_you_mean(str(value), CHECKERS)
        raise RowError("checker", f"expected one of {', '.join(CHECKERS)}, got {shown(value)}{hint}")
    return str(value)


def _countdown(row: Row) -> dict[str, Any]:
    """Return what the countdown checker needs: the numbers to use and the target to reach."""
    numbers, target = row.get("numbers"), row.get("target")
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int for n in numbers):
        raise RowError("numbers", f"expected whole numbers (checker countdown), got {shown(numbers)}")
    if type(target) is not int:
        raise RowError("target", f"expected a whole number (checker countdown), got {shown(target)}")
    return {"numbers": numbers, "target": target}


def _near(row: Iterable[str], *wanted: str) -> str:
    """Return a hint if a column's name resembles a wanted name, or is a known alias of it."""
    for key in row:
        for name in wanted:
            like = difflib.get_close_matches(key.lower(), [name], n=1, cutoff=0.7)
            if key != name and (like or ALIASES.get(key.lower()) == name):
                return f'; the row has {shown(key)}; did you mean "{name}"?'
    return ""


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""
