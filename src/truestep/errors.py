"""The error type for mistakes that a user can correct. Each is reported in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """An error in settings, data or paths (exit code 2). Its message is one line with fault and remedy."""


class OutOfSpace(RuntimeError):
    """Raised if the disk is full (exit code 5). The files that existed before are unchanged."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?", or "" if no known word is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f'; did you mean "{close[0]}"?' if close else ""


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe the first problem in a table that ``model`` rejected, with key, expected and given value."""
    first = error.errors(include_url=False)[0]
    loc = [str(p) for p in first["loc"] if p not in ("sft", "rl", "rejection") or first["type"] == "missing"]
    where = ".".join(p for p in loc if not p.startswith(("function-", "constrained-")))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key" + _right_key(loc, list(_keys(model)))
    elif first["type"] == "missing":
        message = "the key is missing and has no default; set it"
    elif first["type"] == "union_tag_not_found":
        message = 'each stage needs kind = "sft", "rl" or "rejection"'
    elif first["type"] == "union_tag_invalid":
        message = f'kind = {first["input"].get("kind")!r} is not a stage; set "sft", "rl" or "rejection"'
    elif "input" in first and not isinstance(first["input"], dict | list | tuple):
        message += f", got {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return (f"{where}: " if where else "") + message + more


def _right_key(loc: Sequence[str], keys: Sequence[str]) -> str:
    """Suggest a similar known key (with its table if that is a different one), or list the expected keys."""
    here = [part for part in loc[:-1] if not part.isdigit()]

    def is_here(table: list[str]) -> bool:
        return len(table) == len(here) and all(a in (b, "NAME") for a, b in zip(table, here, strict=True))

    siblings = [name for *table, name in (key.split(".") for key in keys) if is_here(table)]
    if hint := did_you_mean(loc[-1], siblings):
        return hint
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(loc[-1], elsewhere, n=1, cutoff=0.7)
    return f'; did you mean "{elsewhere[close[0]]}"?' if close else f"; expected one of {', '.join(siblings)}"


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of a settings model and of its nested tables, with its table ("compute.threads")."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            yield from _keys(field.annotation, f"{prefix}{name}.")
    else:
        named = "NAME." if get_origin(annotation) is dict else ""  # [data.NAME]
        for part in get_args(annotation):
            yield from _keys(part, prefix + named)
