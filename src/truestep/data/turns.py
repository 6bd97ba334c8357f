"""Reads a list of chat turns, as OpenAI, TRL and ShareGPT write them, as messages."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from truestep.data.rows import Row, RowError, shown
from truestep.records import Message

ROLES = ("system", "user", "assistant", "tool")
# Roles under other names: OpenAI's for new models, and those of ShareGPT, only with the key "from".
_SAME_ROLE = {"developer": "system"}
_SHAREGPT = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant", **_SAME_ROLE,
}  # fmt: skip
THOUGHTS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # a thought beside the content, by different templates
_PASSED = (*THOUGHTS, "tool_calls", "tool_call_id")  # given to the chat template as they are
READ_KEYS = ("role", "from", "content", "value", "weight", "train", *_PASSED)  # of a turn
# Keys that would change what is trained on. Not supported, so never dropped silently.
_UNSUPPORTED = ("tools", "functions", "function_call", "tool_responses", "loss")
BARE: tuple[Any, ...] = (None, "", [], {})  # parquet writes None for a key that only other rows have


def read_turns(value: Any, column: str) -> list[Message]:
    """Return the turns in a column. Raises RowError with the first fault."""
    value = from_json(value, column)
    if not isinstance(value, list):
        raise RowError(column, f'expected a list of {{"role": ..., "content": ...}}, got {shown(value)}')
    if not value:
        raise RowError(column, "expected at least one turn, got an empty list")
    turns = [_turn(turn, f"{column}[{i}]", is_first=not i) for i, turn in enumerate(value)]
    for i, (before, turn) in enumerate(pairwise(turns), start=1):
        if turn.role == "tool" and before.role not in ("assistant", "tool"):
            fault = f"expected a tool's turn only after the assistant's, got it after the {before.role}'s"
            raise RowError(f"{column}[{i}].role", fault)
    return turns


def is_turns(value: Any) -> bool:
    """Return whether a value looks like a list of turns."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and (
        {"role", "content"} <= first.keys() or {"from", "value"} <= first.keys()
    )


def from_json(value: Any, column: str) -> Any:
    """Return the value of a JSON text, as CSV files and some tools' columns have it, or the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(column, f"expected JSON, got {shown(value)} ({error})") from None


def _turn(turn: Any, field: str, *, is_first: bool) -> Message:
    if not isinstance(turn, dict):
        raise RowError(field, f'expected {{"role": ..., "content": ...}}, got {shown(turn)}')
    refuse(turn, _UNSUPPORTED, f"{field}.")
    is_sharegpt = "from" in turn and "role" not in turn
    role_key, text_key = ("from", "value") if is_sharegpt else ("role", "content")
    role = turn.get(role_key)
    if role is None:
        raise RowError(f"{field}.{role_key}", "expected text, got nothing" + near(turn, role_key))
    given, names = role, _SHAREGPT if is_sharegpt else _SAME_ROLE
    role = names.get(str(role), role)
    if role not in ROLES:
        found, meant = shown(role) + did_you_mean(str(role), ROLES), _SHAREGPT.get(str(role))
        hint = f'; write "{meant}", or "from" and "value" as the keys' if meant else "; rename the role"
        raise RowError(f"{field}.{role_key}", f"expected system, user, assistant or tool, got {found}{hint}")
    if role == "system" and not is_first:
        raise RowError(f"{field}.{role_key}", "expected the system's turn first, got it later; move it")
    passed = {key: turn[key] for key in _PASSED if turn.get(key) not in BARE}
    content = turn.get(text_key)
    if given == "function_call":
        passed["tool_calls"], content = from_json(content, f"{field}.value"), ""
    if "tool_calls" in passed:
        passed["tool_calls"] = _tool_calls(passed["tool_calls"], f"{field}.tool_calls")
    may_be_empty = role == "tool" or "tool_calls" in passed
    if content is None and not may_be_empty:
        raise RowError(f"{field}.{text_key}", "expected text, got nothing" + near(turn, text_key))
    content = "" if may_be_empty and content in BARE else text_of(_joined(content), f"{field}.{text_key}")
    for key in (key for key in (*THOUGHTS, "tool_call_id") if key in passed):
        passed[key] = text_of(passed[key], f"{field}.{key}")
    if passed and role in ("system", "user"):
        key = next(iter(passed))
        raise RowError(f"{field}.{key}", f"expected {key} only in the assistant's turns; remove it")
    if role == "tool" and turn.get("name") not in BARE:
        passed["name"] = text_of(turn["name"], f"{field}.name")
    return Message(role=role, content=content, is_trained=_is_trained(turn, field), more=passed)


def _joined(content: Any) -> Any:
    """Return the text of content that is a list of text parts; other content as it is."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if parts and len(known) == len(parts) else content


def _is_trained(turn: Row, field: str) -> bool:
    """Return whether a turn may be trained on, by OpenAI's ``weight`` (0 or 1) or axolotl's ``train``."""
    for key in ("weight", "train"):
        if (value := turn.get(key)) is not None and value not in (0, 1):
            remedy = (
                "make it 0 or 1, or give a data set a weight in the stage: data = [{ name, weight }, ...]"
            )
            raise RowError(
                f"{field}.{key}",
                f"expected 0 or 1 (not trained on, or trained on), got {shown(value)}; {remedy}",
            )
    return turn.get("weight") not in (0,) and turn.get("train") not in (0,)


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Return tool calls as templates read them: OpenAI's arguments, which are JSON texts, become objects."""
    value, calls = value if isinstance(value, list) else [value], []
    for i, call in enumerate(value):
        where = f"{field}[{i}]"
        inner = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(
                where, f'expected {{"function": {{"name": ..., "arguments": ...}}}}, got {shown(call)}'
            )
        arguments = from_json(inner.get("arguments"), f"{where}.function.arguments")
        if not isinstance(arguments, dict | None):
            raise RowError(f"{where}.function.arguments", f"expected a JSON object, got {shown(arguments)}")
        function = {"name": inner["name"], "arguments": arguments or {}}
        kept = {key: call[key] for key in ("id",) if call.get(key) not in BARE}
        calls.append({"type": "function", **kept, "function": function})
    return calls


def read_tools(value: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """Return the descriptions of the tools, which a list or its JSON text has."""
    value = from_json(value, field)
    if value in BARE:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(field, f"expected a list of tools (JSON objects), got {shown(value)}")
    return tuple(value)


def trained_part(turns: Sequence[Message], column: str, train_turns: str) -> list[Message]:
    """Return a dialogue up to its last assistant's turn that is trained on, with ``is_trained`` set for every turn.
    Raises RowError if no turn is trained on, or if a trained turn does not follow the user's or a tool's."""
    start = int(turns[0].role == "system")  # a greeting at the start follows nothing, so it is context
    spoken = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i > start]
    chosen = {i for i in spoken[-1 if train_turns == "last" else 0 :] if turns[i].is_trained}
    if not chosen:
        raise RowError(
            column, "expected an assistant's turn to train on, but all have the weight 0; remove the row"
        )
    for i in chosen:
        if (before := turns[i - 1].role) not in ("user", "tool"):
            found = f"the {before}'s"
            raise RowError(
                column,
                f"expected the user's turn before the assistant's solution (turn {i + 1}), got {found}",
            )
    kept = enumerate(turns[: max(chosen) + 1])
    return [replace(turn, is_trained=i in chosen) if turn.role == "assistant" else turn for i, turn in kept]


def refuse(keys: Row, names: Iterable[str], prefix: str) -> None:
    """Raise RowError if a row or a turn has a key that is not supported."""
    for name in names:
        if keys.get(name) not in BARE:
            rename = "remove it, or rename a column that only a reward function reads"
            raise RowError(
                f"{prefix}{name}", f"is not supported and would be lost; {'remove it' if prefix else rename}"
            )


def text_of(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"expected text, got {shown(value)}")
    if not value.strip():
        raise RowError(field, "expected text, got an empty string; write the text, or remove the row")
    return value


# Other names for our columns and keys, for "did you mean".
ALIASES = {
    "question": "problem", "query": "problem", "input": "problem", "instruction": "problem",
    "conversations": "messages", "conversation": "messages", "msgs": "messages", "chat": "messages",
    "dialog": "messages", "dialogue": "messages", "turns": "messages", "q": "problem", "from": "role", "value": "content",
    "text": "content", "label": "answer", "gold": "answer", "ground_truth": "answer", "final_answer": "answer",
    "target": "answer", "expected_answer": "answer", "gt_answer": "answer",
    "response": "solution", "output": "solution", "completion": "solution", "rationale": "solution",
}  # fmt: skip


def closest(row: Iterable[str], *wanted: str) -> tuple[str, str] | None:
    """Return a key that resembles a wanted name, or is a known alias of it, with that name."""
    for key in row:
        for name in wanted:
            like = difflib.get_close_matches(key.lower(), [name], n=1, cutoff=0.7)
            if key != name and (like or ALIASES.get(key.lower()) == name):
                return key, name
    return None


def near(row: Iterable[str], wanted: str) -> str:
    """Return a hint if a key's name resembles a wanted name, or is a known alias of it."""
    found = closest(row, wanted)
    return f'; the row has {shown(found[0])}; did you mean "{wanted}"?' if found else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""
