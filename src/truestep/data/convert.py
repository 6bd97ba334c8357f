"""Writes problems as rows in the layouts of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from truestep.data.rows import Row
from truestep.errors import UserError
from truestep.records import Message, Problem

Target = Literal["trl", "verl", "openai", "truestep"]
TARGETS: tuple[Target, ...] = get_args(Target)
SUFFIXES = (".jsonl", ".parquet")


def converted(problem: Problem, target: Target, name: str, *, flat: bool = False) -> tuple[Row, list[str]]:
    """Return a problem as a row, and the names of what the layout has no place for. ``name`` is the data set's, which
    verl writes as the data source. If ``flat``, tools are JSON texts, because in a table every row would get the keys
    of all others. Raises UserError if the layout needs what the problem lacks."""
    where = problem.row or problem.id
    if problem.text:
        if target not in ("trl", "truestep"):
            raise UserError(
                f"{where}: text: {target} rows have turns, got a bare text; use --to trl or truestep"
            )
        return {"text": problem.text}, []
    reply = [Message(role="assistant", content=problem.solution)] if problem.solution else []
    turns = list(problem.dialogue) or [*problem.messages, *reply]
    is_dialogue = bool(problem.dialogue) or any(m.role == "assistant" for m in problem.messages)
    extra = {"choices", "numbers", "target"} & problem.meta.keys()
    lost = [name for name in ("checker", *sorted(extra)) if name != "checker" or problem.checker != "math"]
    listed = [dict(tool) for tool in problem.tools]
    tools: Row = {"tools": json.dumps(listed) if flat else listed} if listed else {}
    written = partial(_written, as_text=flat or target == "openai")
    answer = {"answer": problem.answer} if problem.answer else {}
    if target == "openai":
        return {"messages": written(turns), **tools}, [*lost, *answer]
    if target == "trl":
        prompt = {"prompt": written(problem.messages)}
        row = {"messages": written(turns)} if is_dialogue and problem.solution else prompt
        completion = {"completion": written(reply)} if reply and not is_dialogue else {}
        return {**row, **completion, **answer, **tools}, lost
    if target == "verl":
        if not problem.answer:
            raise UserError(
                f"{where}: answer: verl rows need an answer (reward_model.ground_truth), got none"
            )
        lost += ["tools"] if tools else []
        lost += (
            ["earlier turns that are trained on"] if sum(t.is_trained for t in problem.dialogue) > 1 else []
        )
        return {
            "data_source": name,
            "prompt": written(problem.messages),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"id": problem.id},
            **({"target": written(turns[-1:])} if problem.solution else {}),
        }, lost
    is_bare = len(problem.messages) == 1 and not problem.meta.get("turns_given") and not problem.dialogue
    own: Row = {"problem": problem.messages[0].content} if is_bare else {"messages": written(turns)}
    own |= {"solution": problem.solution} if is_bare and problem.solution else {}
    own |= {"checker": problem.checker} if problem.checker != "math" else {}
    return {"id": problem.id, **own, **answer, **{key: problem.meta[key] for key in extra}, **tools}, []


def _written(turns: Iterable[Message], *, as_text: bool) -> list[Row]:
    """Return turns as OpenAI writes them, with the arguments of calls as JSON texts or as objects. A turn that is not
    trained on has the weight 0."""
    rows = []
    for m in turns:
        row = {"role": m.role, "content": m.content, **m.more}
        if as_text and "tool_calls" in row:
            row["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
                }
                for call in row["tool_calls"]
            ]
        rows.append(row if m.is_trained or m.role != "assistant" else {**row, "weight": 0})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a .jsonl or .parquet file. Raises UserError if the columns of a parquet file cannot be one type."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(
            f'{path}: writing parquet needs the pyarrow package; run pip install "truestep[train]"'
        ) from None
    try:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: the rows do not fit into one table ({str(error).splitlines()[0]}); write .jsonl"
        ) from None
