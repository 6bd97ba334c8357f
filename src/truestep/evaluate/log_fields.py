"""The types of the fields that are read from logs, so that a log with other types is refused in one line.

A schema is a type, ANY, a dict of fields ("*": all other fields), a list with the schema of its items, or a
tuple of alternatives. A field may be absent or null; an item of a list may not."""

from __future__ import annotations

from typing import Any

from truestep.data.rows import shown
from truestep.errors import UserError

AS_WRITTEN = "pass a log as its harness wrote it"
ANY = object
_ID = (str, int)
_DOC = {"id": _ID, "query": str, "choices": [ANY], "gold_index": (int, [ANY])}
_REPLY = {"text": [ANY], "output_tokens": [[ANY]]}
_TURN = {"content": (str, [ANY])}

OWN_HEADER = {"name": str}
OWN = {
    "problem_id": str, "sample_index": int, "verdict": str, "num_tokens": int, "prompt": str, "completion": str,
    "gold": str, "extracted": (str, bool), "reason": str, "stop": str, "strict": str, "lenient": str, "unreadable": bool,
    "rewards": {"*": (int, float)}, "unrewarded": {"*": str},
}  # fmt: skip
LM_EVAL = {
    "doc_id": _ID, "doc": {"id": _ID}, "filter": str, "metrics": [str], "resps": [ANY], "filtered_resps": [ANY],
    "truestep": {"verdicts": [str]},
}  # fmt: skip
LIGHTEVAL = {
    "__doc__": _DOC, "doc": _DOC, "__model_response__": _REPLY, "model_response": _REPLY, "__metric__": {}, "metric": {},
}  # fmt: skip
INSPECT_HEADER = {"eval": {"task": str, "dataset": {"samples": int}}, "status": str, "samples": [{}]}
INSPECT = {
    "id": _ID, "epoch": int, "input": (str, [_TURN]), "target": (str, int, float, [ANY]), "scores": {"*": {}},
    "output": {"choices": [{"message": _TURN, "stop_reason": str}], "usage": {"output_tokens": int}},
    "error": (str, {"message": str}),
}  # fmt: skip
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def check_fields(where: str, value: Any, schema: Any, name: str = "") -> None:
    """Raise UserError, with the name of the field, if a value does not have the types of a schema."""
    for kind in schema if isinstance(schema, tuple) else (schema,):
        if isinstance(kind, dict) and isinstance(value, dict):
            for key, part in value.items():
                if part is not None and (inner := kind.get(key, kind.get("*"))) is not None:
                    check_fields(where, part, inner, f"{name}.{key}" if name else str(key))
            return
        if isinstance(kind, list) and isinstance(value, list):
            for i, part in enumerate(value):
                check_fields(where, part, kind[0], f"{name}[{i}]")
            return
        if (
            isinstance(kind, type)
            and isinstance(value, kind)
            and (kind in (bool, ANY) or type(value) is not bool)
        ):
            return
    kinds = [
        kind if isinstance(kind, type) else type(kind)
        for kind in (schema if isinstance(schema, tuple) else (schema,))
    ]
    expected = " or ".join(_WORDS[kind] for kind in kinds)
    raise UserError(f"{where}: {name or 'row'}: expected {expected}, got {shown(value)}; {AS_WRITTEN}")
