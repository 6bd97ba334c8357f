"""Explains the keys of a settings model: type, default, meaning and example, which are written at the field.

    lr: float = Field(gt=0, le=1)
    \"\"\"The highest learning rate. Example: ``lr = 1e-5``\"\"\"

Held by: tests/unit/test_reference_pages.py
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key in words. ``path`` is as in --set; NAME stands for the name of a data set, a stage, a reward ..."""

    path: str
    header: str  # of its table, in TOML
    type: str
    default: str  # in TOML; "" if the key must be set
    meaning: str
    example: str  # in TOML, as a line of the key's table

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of settings. The same one can be in several ``places``: its header, such as [model] or [[stages]], and
    what the paths of its keys begin with. ``keys`` are those of the first place."""

    places: Mapping[str, str]
    about: str
    keys: tuple[Key, ...]

    @property
    def every_key(self) -> list[Key]:
        """The keys of all places."""
        return [
            replace(key, header=header, path=f"{start}.{key.name}".lstrip("."))
            for header, start in self.places.items()
            for key in self.keys
        ]


@cache
def texts(cls: type) -> dict[str, str]:
    """Return the text below each field of a class and of its bases, in one line each."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if c.__module__.startswith("truestep")]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # installed without its source
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = " ".join(said.split())
    return found


def meaning(cls: type, name: str) -> tuple[str, str]:
    """Return the meaning and the example of a field, "" if its text does not have them."""
    said, _, example = texts(cls).get(name, "").partition(" Example: ")
    return said, example.strip("`")


def tables(model: type[BaseModel], place: str = "") -> list[Table]:
    """Return the table of a settings model and all tables inside it, each once, in the order of the keys."""
    found: dict[type[BaseModel], Table] = {}

    def visit(model: type[BaseModel], path: str, header: str, about: str) -> None:
        (base, *_) = model.__bases__
        kind = ""
        if issubclass(base, BaseModel) and base.model_fields:  # what all kinds of stages have in common
            visit(base, path, header, about)
            kind = str(get_args(model.model_fields["kind"].annotation)[0])
        if known := found.get(model):
            found[model] = replace(known, places={**known.places, header: path})
            return
        own = [(n, f) for n, f in model.model_fields.items() if n in model.__annotations__ and not _is_tag(f)]
        at = path.removesuffix("NAME") + kind if kind else path
        shown = f'{header} with kind = "{kind}"' if kind else header
        keys = tuple(_key(model, f"{at}.{name}".lstrip("."), shown, field) for name, field in own)
        text = " ".join((model.__dict__.get("__doc__") or about).split())
        found[model] = Table(places={shown: at}, about=text, keys=keys)
        for name, field in own:
            inside = f"{header.strip('[]')}.{name}".lstrip(".")
            for inner, suffix, head in _models(field.annotation, inside):
                visit(inner, f"{path}.{name}{suffix}".lstrip("."), head, meaning(model, name)[0])

    visit(model, place, f"[{place}]" if place else "", "")
    return list(found.values())


def _models(annotation: Any, place: str) -> Iterator[tuple[type[BaseModel], str, str]]:
    """Yield the settings models in an annotation, with what follows in the path, and their header in TOML."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, "", f"[{place}]"
    origin = get_origin(annotation)
    for part in get_args(annotation):
        for model, suffix, header in _models(part, f"{place}.NAME" if origin is dict else place):
            yield (
                model,
                ".NAME" if origin in (dict, tuple) else suffix,
                f"[{header}]" if origin is tuple else header,
            )


def _is_tag(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _key(model: type[BaseModel], path: str, header: str, field: FieldInfo) -> Key:
    said, example = meaning(model, path.rpartition(".")[2])
    kind, default = in_words(field.annotation, field.metadata), _default(field)
    return Key(path=path, header=header, type=kind, default=default, meaning=said, example=example)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return toml(value.model_dump(exclude_defaults=True)).replace("{}", "those of its keys")
    is_absent = value is None or (value == "" and in_words(field.annotation) == "table")
    return "not set" if is_absent else toml(value)


def toml(value: Any) -> str:
    """Return a plain value as TOML."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return (
            f"{{ {', '.join(f'{key} = {toml(inner)}' for key, inner in value.items())} }}" if value else "{}"
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


_PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "value"}
_SEVERAL = {"integer": "integers", "number": "numbers", "text": "texts", "table": "tables", "list": "lists"}
_LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def in_words(annotation: Any, metadata: Any = ()) -> str:
    """Return the type of a field in words, with its limits."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return in_words(inner, [*more, *metadata])
    return _of_kind(annotation) + _limits(metadata)


def _of_kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        listed = ", ".join(toml(part) for part in parts)
        return f"one of {listed}" if len(parts) > 1 else listed
    if origin in (Union, types.UnionType):
        given = [in_words(part) for part in parts if part is not type(None) and part != Literal[""]]
        words = list(dict.fromkeys(word for text in given for word in text.split(" or ")))
        return " or ".join([", ".join(words[:-1]), words[-1]][len(words) == 1 :])
    if origin in (tuple, list):
        inner, *rest = parts
        word, *limit = in_words(inner).replace("one of", "some of").split(" ", 1)
        count = f"{len(parts)} " if rest and rest[0] is not Ellipsis else ""
        several = _SEVERAL.get(word, f"{word}s" if not limit else word)
        return f"list of {count}{' '.join([several, *limit])}"
    if origin is dict:
        return f"table of NAME = {in_words(parts[1])}"
    return (
        "table" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else _PLAIN[annotation]
    )


def _limits(metadata: Any) -> str:
    parts = [part for one in metadata for part in getattr(one, "metadata", None) or [one]]
    found = [
        f"{sign} {getattr(p, name):g}" for p in parts for name, sign in _LIMITS.items() if hasattr(p, name)
    ]
    found += [f"a multiple of {part.multiple_of}" for part in parts if hasattr(part, "multiple_of")]
    found += [f"that matches {part.pattern}" for part in parts if getattr(part, "pattern", None)]
    least, most = (
        max((getattr(p, n, 0) or 0 for p in parts), default=0) for n in ("min_length", "max_length")
    )
    count = f", {least} to {most} of them" if most else f", at least {least} of them" if least else ""
    return (" " + " and ".join(found) if found else "") + count
