"""A settings error as the one line that a user reads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """ "; did you mean …?", or nothing where nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f'; did you mean "{close[0]}"?' if close else ""


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem: where, what was expected, what stood there. ``root``: all settings models inherit from it."""
    first = error.errors(include_url=False)[0]
    loc = [str(p) for p in first["loc"] if p not in ("sft", "rl", "rejection") or first["type"] == "missing"]
    where = ".".join(p for p in loc if not p.startswith(("function-", "constrained-")))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key" + did_you_mean(loc[-1], _known_keys(root))
    elif first["type"] == "missing":
        message = "is missing and has no default: write it"
    elif first["type"] == "union_tag_not_found":
        message = 'each stage needs kind = "sft", "rl" or "rejection"'
    elif first["type"] == "union_tag_invalid":
        message = f'kind = {first["input"].get("kind")!r} is not a stage: write "sft", "rl" or "rejection"'
    elif "input" in first and not isinstance(first["input"], dict | list | tuple):
        message += f", got {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return (f"{where}: " if where else "") + message + more


def _known_keys(root: type[BaseModel]) -> list[str]:
    """Every key any settings model knows: enough to suggest the right spelling of a wrong one."""
    models: list[type[BaseModel]] = [root]
    for model in models:
        models += model.__subclasses__()
    return sorted({name for model in models for name in model.model_fields})
