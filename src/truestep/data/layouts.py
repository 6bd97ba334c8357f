"""Recognizes the layouts in which data sets are published, and reads a row of each under our names of columns.

A layout is recognized by the columns of a row, never guessed from their texts, with one exception: a GSM8K answer
contains ``#### N``. ``columns = { answer = "label" }`` names columns in any layout, and comes first."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from truestep.data.rows import Row, RowError, shown
from truestep.data.turns import read_turns
from truestep.data_settings import DATA_COLUMNS as COLUMNS

PROMPTS = COLUMNS[:4]  # a row has one of these


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A row under our names, and as it was ``given``. ``sources`` are, by our name, the given columns."""

    layout: str
    row: Row
    given: Row
    sources: Mapping[str, tuple[str, ...]]

    def named(self, error: RowError) -> RowError:
        """Return the error with the row's name of the column in place of ours."""
        head = error.field.partition("[")[0].partition(".")[0]
        (own, *_) = self.sources.get(head, (head,))
        return RowError(own + error.field.removeprefix(head), error.message)


@dataclass(frozen=True)
class _Layout:
    """A layout. A row has it if it has all columns of ``has``. ``reads`` gives their names by ours."""

    name: str
    has: tuple[str, ...]
    reads: Mapping[str, str] = field(default_factory=dict)


# The first one that fits is used.
_LAYOUTS = (
    _Layout("verl", ("prompt", "reward_model")),
    _Layout("problem and messages (NuminaMath, OpenR1)", ("problem", "messages")),
    _Layout("prompt and messages (UltraChat)", ("prompt", "messages")),
    _Layout("prompt-completion (TRL)", ("prompt", "completion"), {"solution": "completion"}),
    _Layout(
        "OpenMathInstruct", ("problem", "generated_solution", "expected_answer"),
        {"solution": "generated_solution", "answer": "expected_answer"},
    ),
    _Layout("messages (OpenAI, TRL)", ("messages",)),
    _Layout("truestep", ("problem",)),
    _Layout("truestep", ("prompt",)),
    _Layout("ShareGPT", ("conversations",), {"messages": "conversations"}),
    _Layout("conversation (LMSYS)", ("conversation",), {"messages": "conversation"}),
    _Layout("Alpaca", ("instruction", "output"), {"problem": "instruction", "solution": "output"}),
    _Layout("Dolly", ("instruction", "response"), {"problem": "instruction", "solution": "response"}),
    _Layout("MetaMathQA", ("query", "response"), {"problem": "query", "solution": "response"}),
    _Layout("OpenOrca", ("question", "response"), {"problem": "question", "solution": "response"}),
    _Layout("DeepMath", ("question", "final_answer"), {"problem": "question", "answer": "final_answer"}),
    _Layout("question-answer", ("question", "answer"), {"problem": "question"}),
    _Layout("question-answer", ("question", "solution"), {"problem": "question"}),
    _Layout("AIME", ("Problem", "Answer"), {"problem": "Problem", "answer": "Answer", "solution": "Solution", "id": "ID"}),
    _Layout("text (TRL)", ("text",)),
    _Layout("question-answer", ("question",), {"problem": "question"}),  # its answer is named, or is missing
)  # fmt: skip
# Texts that Alpaca and Dolly write after the instruction, after an empty line.
_AFTER = {"Alpaca": "input", "Dolly": "context"}
_SYSTEM = {"OpenOrca": "system_prompt"}


def read(row: Row, columns: Mapping[str, str]) -> Reading:
    """Return a row under our names. Raises RowError if a named column does not exist, or if two columns of the row
    could be the prompt."""
    layout = next((one for one in _LAYOUTS if all(row.get(name) is not None for name in one.has)), None)
    known = layout or _Layout("truestep", ())
    sources: dict[str, tuple[str, ...]] = {name: (name,) for name in COLUMNS if row.get(name) is not None}
    for ours, theirs in known.reads.items():
        if row.get(theirs) is not None:
            sources[ours] = (theirs,)
    if not sources.keys().isdisjoint(PROMPTS[:3]):
        sources.pop("text", None)
    if (system := _SYSTEM.get(known.name, "")) and row.get(system):
        sources["system"] = (system,)
    found = {ours: row[names[0]] for ours, names in sources.items()}
    if (after := _AFTER.get(known.name, "")) and isinstance(row.get(after), str):
        sources["problem"] = (*sources["problem"], after)
        if row[after].strip():
            found["problem"] = f"{found['problem']}\n\n{row[after]}"
    name = known.name
    if known.has == ("question", "answer") and "solution" not in found and "####" in str(row["answer"]):
        name, found["solution"] = "GSM8K", row["answer"]
        found["answer"] = row["answer"].rpartition("####")[2].strip()
        sources["solution"] = ("answer",)
    if known.name == "Alpaca" and row.get("history"):
        _put_history(row, found, sources)
    if known.has[1:] == ("messages",):
        _merge(found, sources, columns)
    _put_named(row, columns, found, sources)
    if columns:
        name = "named columns" if {*columns} & {*PROMPTS} else f"{name}, with named columns"
    return Reading(layout=name, row=found, given=row, sources=sources)


def _put_history(row: Row, found: Row, sources: dict[str, tuple[str, ...]]) -> None:
    """Make turns of Alpaca's earlier pairs of texts, the instruction and the output."""
    pairs = row["history"]
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise RowError("history", f"expected a list of pairs of texts, got {shown(pairs)}")
    texts = [*(text for pair in pairs for text in pair), found.pop("problem"), found.pop("solution")]
    roles = ("user", "assistant") * (len(pairs) + 1)
    found["messages"] = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    sources["messages"] = (*sources.pop("problem"), "history", *sources.pop("solution"))


def _merge(found: Row, sources: dict[str, tuple[str, ...]], columns: Mapping[str, str]) -> None:
    """Choose between a text and turns that both are the prompt. The turns say what is trained on; a separate
    solution is then not read. If their only question is the text, the problem is bare text for ``chat.user``."""
    text = "problem" if "problem" in found else "prompt"
    if "solution" in columns:  # the recipe names the solution, so the turns are not needed
        del found["messages"], sources["messages"]
        return
    turns = read_turns(found["messages"], "messages")
    is_plain = [t.role for t in turns] == ["user", "assistant"] and not turns[1].more and turns[1].is_trained
    if is_plain and turns[0].content.strip() == str(found[text]).strip():
        found["solution"], sources["solution"] = turns[1].content, ("messages",)
        del found["messages"], sources["messages"]
        return
    del found[text], sources[text]
    if turns[-1].role == "assistant":
        found.pop("solution", None)
        sources.pop("solution", None)


def _put_named(row: Row, columns: Mapping[str, str], found: Row, sources: dict[str, tuple[str, ...]]) -> None:
    """Replace what the recipe names. A named prompt replaces every other one, and a named solution the turn of
    the assistant at the end."""
    for ours in PROMPTS if {*columns} & {*PROMPTS} else ():
        found.pop(ours, None)
        sources.pop(ours, None)
    for ours, theirs in columns.items():
        value, at = column_of(row, theirs, ours)
        found.pop(ours, None)
        sources[ours] = (at,)
        if value is not None:
            found[ours] = value
    if "solution" in columns and "messages" in found and "messages" not in columns:
        turns = found["messages"]
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1].get("role", turns[-1].get("from"))
            found["messages"] = turns[:-1] if last in ("assistant", "gpt") else turns


def column_of(row: Row, path: str, ours: str) -> tuple[Any, str]:
    """Return the value of a column, or of a part of it (``extra_info.answer``), and the name of the column."""
    if path in row:
        return row[path], path
    head, *parts = path.split(".")
    value: Any = row.get(head)
    if head in row and parts:
        for part in parts:
            value = value.get(part) if isinstance(value, dict) else None
        return value, head
    close = difflib.get_close_matches(path, list(row), n=1, cutoff=0.6)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    fault = f'the row has no such column (columns.{ours} = "{path}"), only {listed(row)}{hint}'
    raise RowError(path, fault, is_of_names=True)


def listed(row: Mapping[str, Any]) -> str:
    """Return the names of a row's columns, at most eight."""
    names = [shown(name).strip('"') for name in row]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
