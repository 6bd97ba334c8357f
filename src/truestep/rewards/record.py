"""The input and output of a reward function, and the JSON that represents them on a pipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from truestep.records import Message, Problem, RewardInput, Stop, Verdict


@dataclass(frozen=True)
class Unscored:
    """A value that a function can return instead of None, with the reason why a sample has no reward."""

    reason: str


# One value per sample: a number, None or Unscored (no reward, but not a failure), a mapping of named parts,
# or an exception object (a failure of only this sample).
Value = float | None | Unscored | Mapping[str, float] | Exception


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One function's result for one sample. A failure has a ``reason``, and the function's traceback or
    output is in ``detail``. If it is a ``fault`` of the function, it is of every sample in the batch."""

    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    failed: bool = False
    detail: str = ""
    fault: bool = False

    def named(self, name: str) -> dict[str, float]:
        """Return the value and its parts by name: NAME/PART and NAME."""
        value = {} if self.value is None else {name: self.value}
        return {f"{name}/{key}": part for key, part in self.parts.items()} | value


def to_json(value: Any) -> bytes:
    """Return one line of JSON. Records become objects; other types, such as dates, become text."""
    return json.dumps(value, default=_plain).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return vars(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_input(table: Mapping[str, Any]) -> RewardInput:
    """Read the record that ``to_json`` wrote."""

    def messages(turns: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
        return tuple(Message(**turn) for turn in turns)

    problem = dict(table["problem"])
    problem |= {name: messages(problem[name]) for name in ("messages", "dialogue")}
    problem |= {"tools": tuple(problem["tools"])}
    problem["sources"] = {ours: tuple(names) for ours, names in problem["sources"].items()}
    changed = {
        "problem": Problem(**problem),
        "messages": messages(table["messages"]),
        "completion_ids": tuple(table["completion_ids"]),
        "stop": Stop(table["stop"]),
        "verdict": table["verdict"] and Verdict(table["verdict"]),
    }
    return RewardInput(**{**table, **changed})
