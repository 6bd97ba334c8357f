"""Reads a row as a Problem, and defines which columns a row may have and what each may contain."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

from truestep.data.characters import check_characters, check_text
from truestep.data.layouts import COLUMNS, PROMPTS, Reading, listed, read
from truestep.data.rows import Row, RowError, shown
from truestep.data.turns import (
    BARE,
    READ_KEYS,
    closest,
    did_you_mean,
    is_turns,
    near,
    read_tools,
    read_turns,
    refuse,
    text_of,
    trained_part,
)
from truestep.data_settings import CHECKERS
from truestep.records import Message, Problem
from truestep.settings import DataSettings

# Columns that would change what is trained on. Not supported, so never dropped silently.
UNSUPPORTED = ("weight", "tool_calls", "functions", "function_call")
_UNSUPPORTED_ROW = frozenset(UNSUPPORTED)
# A letter with which an answer names a choice: (C), C. Cecile, c
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[).:])(?:\s.*)?$|([A-Za-z])$", re.DOTALL)
LETTERS = "ABCDEFGHIJ"  # the letters that the grader reads
_NUMBER = re.compile(r"\+?(\d{1,9})(?:\.0*)?")
_ANY_NUMBER = re.compile(r"[-+]?\d*\.?\d+\.?")


def problem_of(row: Row, data: DataSettings, *, id: str, where: str, needs: Collection[str]) -> Problem:
    """Return the problem in a row. ``needs`` names what the row must have: "answer", "solution" or both.
    With "problem", neither is needed; if ``needs`` is empty, one of them is enough. Raises RowError with the
    first fault, under the row's name of the column."""
    if not _UNSUPPORTED_ROW.isdisjoint(row):
        refuse(row, UNSUPPORTED, "")
    reading = read(row, data.columns)
    if "text" in reading.row:
        check_text("text", reading.row["text"])
        check_characters({key: value for key, value in row.items() if key not in reading.sources["text"]})
    else:
        check_characters(row)
    try:
        problem = _problem(reading, data, id=id, where=where, needs=needs)
    except RowError as error:
        raise reading.named(error) from None
    return replace(problem, columns=row)


def _problem(reading: Reading, data: DataSettings, *, id: str, where: str, needs: Collection[str]) -> Problem:
    row = reading.row
    checker: str = data.checker
    made: dict[str, Any] = {"row": where, "layout": reading.layout, "sources": reading.sources}
    if row.get("id") is not None:
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise RowError("id", f"expected text or a whole number, got {shown(row['id'])}")
        id = text_of(str(row["id"]), "id")
    if "text" in row:
        if "answer" in needs or "problem" in needs:
            raise RowError(
                "text",
                "expected a problem, got text, which only SFT can train on" + _remedy(reading, "problem"),
            )
        return Problem(id=id, messages=(), answer="", text=text_of(row["text"], "text"), **made)
    messages, dialogue, given, num_left = _turns(reading, data, needs)
    answer = _answer(row)
    solution = dialogue[-1].content if dialogue else ""
    has_solution = bool(dialogue)
    if "answer" in needs and not answer:
        asked = ", ".join(name for ours in PROMPTS for name in reading.sources.get(ours, ()))
        is_empty = "answer" in {**reading.sources, **reading.given}
        fault = "expected an answer, got none" if is_empty else f"the row has {asked}, but no answer"
        raise RowError("answer", fault + _remedy(reading, "answer"))
    wants_turn = "messages" in row and not has_solution  # of the assistant
    if "solution" in needs and wants_turn:
        raise RowError(
            "messages", "expected an assistant turn to train on, got none" + _remedy(reading, "solution")
        )
    if "solution" in needs and not has_solution:
        raise RowError("solution", "expected a worked solution, got none" + _remedy(reading, "solution"))
    if not answer and wants_turn and not needs:
        hint = _remedy(reading, "answer", "solution")
        raise RowError("messages", "expected an assistant turn to train on, or an answer, got neither" + hint)
    if not answer and not has_solution and "problem" not in needs:
        hint = _remedy(reading, "answer", "solution")
        raise RowError("answer", "expected an answer or a solution, got neither" + hint)
    if checker == "auto":
        if answer and row.get("checker") is None and row.get("choices") not in BARE:
            remedy = 'set "checker": "choice", or checker = "choice" for the data set, or remove the choices'
            raise RowError("choices", f"the row has choices, but no checker; {remedy}")
        checker = _checker(row)
    meta: dict[str, Any] = {"turns_given": True} if given else {}
    if checker == "countdown":
        meta |= _countdown(row)
    if checker == "choice" and row.get("choices") is not None:
        choices, answer = choice_answer(row["choices"], answer)
        meta |= {"choices": choices}
    num_spoken = sum(turn.role == "assistant" for turn in dialogue)
    is_plain = num_spoken < 2 and not any(turn.more for turn in dialogue)
    return Problem(
        id=id, messages=messages, answer=answer, checker=checker, solution=solution, meta=meta,
        dialogue=() if is_plain else tuple(dialogue), tools=read_tools(row.get("tools"), "tools"),
        num_left_turns=num_left, **made,
    )  # fmt: skip


def unused_columns(problem: Problem, needs: Collection[str]) -> Iterator[str]:
    """Yield the columns of an accepted row, and the parts of its turns, that are not used if only ``needs`` are
    needed; if it is empty, answers and solutions are both used."""
    row = problem.columns
    used = {*PROMPTS, "checker", "id", "system", "tools"}
    used |= {"answer", "reward_model"} if not needs or "answer" in needs else set()
    with_solution = not needs or "solution" in needs
    used |= {"solution", "reasoning_content"} if with_solution else set()
    used |= {"choice": {"choices"}, "countdown": {"numbers", "target"}}.get(problem.checker, set())
    names = {name for ours in used for name in problem.sources.get(ours, ())}
    targets, turns_of = problem.sources.get("target", ()), problem.sources.get("messages", ())
    for name, value in row.items():
        turns = value if isinstance(value, list) and value and isinstance(value[0], dict) else []
        is_read = name in names or (name in targets and turns and with_solution)
        if not is_read and value is not None:
            yield name
        for turn in turns if is_read and name not in problem.sources.get("tools", ()) else []:
            for key in turn.keys() - {*READ_KEYS, *(("name",) if turn.get("role") == "tool" else ())}:
                yield from (f"{name}[].{key}",) if turn[key] not in BARE else ()
        last = turns[-1].get("role", turns[-1].get("from")) if turns else ""
        if name in turns_of and not with_solution and last in ("assistant", "gpt"):
            yield f"{name}[-1]"


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
        hint = "; if the numbers count from 0, write letters" if text == "0" else ""
        raise RowError(field, f"{expected}, got {shown(answer)}{hint}")
    place = max(places, default=len(LETTERS))
    return list(value), answer if (place == named and letter) or place >= len(LETTERS) else LETTERS[place]


def _turns(
    reading: Reading, data: DataSettings, needs: Collection[str]
) -> tuple[tuple[Message, ...], list[Message], bool, int]:
    """Return the prompt's turns, the whole dialogue if it ends with a solution (otherwise []), whether the row has
    turns instead of bare text, and how many turns after the dialogue's end are left out."""
    row = reading.row
    present = [name for name in PROMPTS if row.get(name) is not None]
    expected = "expected one of problem, prompt and messages"
    if not present:
        raise RowError("problem", f"{expected}, got none" + _remedy(reading, *PROMPTS[:3]))
    if len(present) > 1:
        raise RowError(present[1], f"{expected}, got {' and '.join(present)}; keep one")
    column, value = present[0], row[present[0]]
    if column == "problem" or (column == "prompt" and isinstance(value, str) and not value.startswith("[{")):
        turns, given = [Message(role="user", content=text_of(value, column))], False
    else:
        turns, given = read_turns(value, column), True
    if row.get("system") not in BARE and turns[0].role != "system":
        turns.insert(0, Message(role="system", content=text_of(row["system"], "system")))
    num_turns = len(turns)
    reply, spoken = None, any(turn.role == "assistant" for turn in turns)
    is_shown = "solution" in needs or (not needs and not {"answer", "reward_model"} & row.keys())
    if column == "messages" and is_shown and row.get("solution") is None:
        while spoken and turns[-1].role != "assistant":  # turns that nobody answers
            turns.pop()
    if column == "messages" and turns[-1].role == "assistant":
        *turns, reply = turns
    if not turns or turns[-1].role not in ("user", "tool"):
        found = f"the {turns[-1].role}'s" if turns else "none"
        end = 'at the end (a worked answer belongs in "solution")'
        place = "before the assistant's solution" if reply else end
        raise RowError(column, f"expected the user's turn {place}, got {found}")
    reply = _solution(reading, reply)
    if reply is None:
        return tuple(turns), [], given, 0
    dialogue = [*turns, reply]
    if column == "messages" or any(t.role == "assistant" for t in turns):
        dialogue = trained_part(dialogue, column, data.train_turns)
    *prompt, _ = dialogue
    num_left = max(0, num_turns - len(dialogue))
    return tuple(replace(turn, is_trained=True) for turn in prompt), dialogue, given, num_left


def _solution(reading: Reading, from_turns: Message | None) -> Message | None:
    """Return the demonstration, from ``solution`` (text or one turn), the last of ``messages``, or ``target``."""
    row = reading.row
    found = {"messages": from_turns} if from_turns else {}
    for name in ("solution", "target"):
        value = row.get(name)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            turns = read_turns(value, name)
            if len(turns) != 1 or turns[0].role != "assistant":
                raise RowError(name, f"expected one assistant turn, got {', '.join(t.role for t in turns)}")
            found[name] = turns[0]
        elif name == "solution" and value is not None:  # in some rows, target is a number
            found[name] = Message(role="assistant", content=text_of(value, name))
    if len({message.content for message in found.values()}) > 1:
        raise RowError(
            "solution", f"expected one solution, got different ones in {' and '.join(found)}; keep one"
        )
    reply = next(iter(found.values()), None)
    if row.get("reasoning_content") in BARE:
        return reply
    if reply is None:
        raise RowError(
            "reasoning_content",
            "expected a solution beside the thought, got none" + _remedy(reading, "solution"),
        )
    thought = text_of(row["reasoning_content"], "reasoning_content")
    return replace(reply, more={**reply.more, "reasoning_content": thought})


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
        raise RowError(key, "expected an answer, got nothing" + near(reward, "ground_truth"))
    truth = scalar(reward["ground_truth"], key)
    if answer and answer != truth:
        raise RowError("answer", f"expected reward_model's {shown(truth)}, got {shown(answer)}; keep one")
    return truth


def scalar(value: Any, field: str) -> str:
    """Return a value as text. A number becomes plain decimal text (1e-05 → 0.00001, 3.0 → 3)."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise RowError(field, f"expected text or a number, got {shown(value)}")
    if isinstance(value, str):
        return text_of(value, field)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value) or (value and not float(value)):
        raise RowError(
            field, f"expected a finite number that a float can hold, got {value}; write it as text"
        )
    number = Decimal(str(value))
    return str(int(number)) if number == int(number) else format(number, "f")


def _checker(row: Row) -> str:
    value = row.get("checker")
    if value is None:
        return "math"
    if value not in CHECKERS:
        hint = did_you_mean(str(value), CHECKERS)
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


def _remedy(reading: Reading, *wanted: str) -> str:
    """Return which columns the row has, and how to name one of them in the recipe."""
    turns = [key for key in reading.given if "messages" in wanted and is_turns(reading.given[key])]
    if found := (turns[0], "messages") if turns else closest(reading.given, *wanted):
        key, name = found
        hint = f'; the row has {shown(key)}; did you mean "{name}"?'
        return f"{hint} Set columns = {{ {name} = {shown(key)} }} for the data set, or rename it"
    known = {*COLUMNS, *(name for of in reading.sources.values() for name in of)}
    others = [name for name in reading.given if name not in known]
    example = f'set columns = {{ {wanted[0]} = "..." }} for the data set to name one of them'
    return f"; the row also has {listed(dict.fromkeys(others))}: {example}" if others else ""
