"""The error type for mistakes that a user can correct. Each is reported in one line."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from truestep.explained import meaning


class UserError(ValueError):
    """An error in settings, data or paths (exit code 2). Its message is one line with fault and remedy, or a list
    of several such lines."""

    def __init__(self, *faults: str) -> None:
        several = [f"{len(faults)} faults:", *(fault.replace("\n", "\n    ") for fault in faults)]
        super().__init__(faults[0] if len(faults) == 1 else "\n  ".join(several))
        self.faults = faults


class Faults:
    """Collects the faults of independent checks, so that one refusal lists all of them."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, *faults: str) -> None:
        self.found += [fault for fault in dict.fromkeys(faults) if fault not in self.found]

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Collect the UserError that the block raises; the block ends there."""
        try:
            yield
        except UserError as error:
            self.add(*error.faults)

    def refuse(self) -> None:
        """Raise UserError if there is a fault."""
        if self.found:
            raise UserError(*self.found)


class OutOfSpace(RuntimeError):
    """Raised if the disk is full (exit code 5). The files that existed before are unchanged."""


_SINGULAR = {"are": "is", "have": "has", "become": "becomes", "share": "shares"}


def count(num: int, noun: str, of: int | None = None) -> str:
    """Return a number with its noun, such as "1 row", "2 rows" or, with a total, "1 of 2 rows"."""
    total = num if of is None else of
    return f"{num if of is None else f'{num} of {of}'} {noun}{'' if total == 1 else 's'}"


def quoted(text: str, most: int = 60) -> str:
    """Return a text in quotation marks, on one line and cut to ``most`` characters."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= most else f'"{line[: most - 3]}..."'


def verb(num: int, plural: str) -> str:
    """Return the verb of ``num`` things, such as "is" or "are"."""
    return _SINGULAR[plural] if num == 1 else plural


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?", or "" if no known word is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f'; did you mean "{close[0]}"?' if close else ""


# Names that other frameworks use, and keys that set the same. The first one that the table has is suggested.
ALIASES = {
    "learning_rate": ("optimizer.lr",), "max_steps": ("steps",), "num_train_epochs": ("epochs",),
    "batch_size": ("sequences_per_step", "prompts_per_step"), "num_generations": ("samples_per_prompt",),
    "train_batch_size": ("sequences_per_step", "prompts_per_step"),
    "per_device_train_batch_size": ("sequences_per_step", "prompts_per_step"), "path": ("source",),
    "max_tokens": ("sampling.max_new_tokens",), "max_completion_length": ("sampling.max_new_tokens",),
    "model_name_or_path": ("model.path",), "eval_steps": ("validation.every_steps",), "save_steps": ("save_every",),
    "lr_scheduler_type": ("optimizer.schedule",), "assistant_only_loss": ("train_turns",), "report_to": ("trackers",),
    "bf16": ("compute.dtype",), "max_length": ("model.context_length",), "max_seq_length": ("model.context_length",),
}  # fmt: skip
# Names for which no key is needed, or an option of a method.
INSTEAD_OF = {
    "gradient_accumulation_steps": "leave it out: a step has all its sequences, in as many micro-batches of "
    "tokens_per_microbatch tokens as they fill",
    "packing": "leave it out: sequences are always packed, without seeing each other",
    "logging_steps": "leave it out: every step is logged",
    "output_dir": "pass --out FOLDER",
    "beta": "set method_options = { kl_coef = ... }",
    "kl_coef": "set method_options = { kl_coef = ... }",
    "epsilon": "set method_options = { clip_low = ..., clip_high = ... }",
}
MOST_FAULTS = 8


def refused(where: str, error: ValidationError, model: type[BaseModel], raw: Any) -> UserError:
    """Return the error with every problem of the table ``raw``, which ``model`` rejected."""
    found = each_fault(error, model, raw)
    more = [f"and {count(len(found) - MOST_FAULTS, 'more fault')}"] if len(found) > MOST_FAULTS else []
    return UserError(f"{where}: {UserError(*found[:MOST_FAULTS], *more)}")


def each_fault(error: ValidationError, model: type[BaseModel], raw: Any) -> list[str]:
    """Describe every problem of the table ``raw``, which ``model`` rejected, with key, expected and given value.
    Unknown keys come first, because they explain missing ones. A stage is called by its name, as in --set."""
    found = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    inner = {e["loc"][:-1] for e in found}  # a list whose faulty items are left out is also called too short
    found = [e for e in found if e["type"] != "too_short" or e["loc"] not in inner]
    places: dict[tuple[str | int, ...], list[Any]] = {}
    for e in found:  # a value that fits none of several types has a problem with each
        places.setdefault(_in_raw(e["loc"], raw) if e["type"] != "missing" else e["loc"], []).append(e)
    said = [(several[0], _fault(several, model, raw)) for several in places.values()]
    wanted = [text for first, text in said if first["type"] == "extra_forbidden"]
    return [
        text for first, text in said
        # A key that is suggested in the place of an unknown one is also called missing.
        if not (first["type"] == "missing" and any(re.search(rf'mean "(\S+\.)?{first["loc"][-1]}"', w) for w in wanted))
    ]  # fmt: skip


def _in_raw(loc: tuple[str | int, ...], raw: Any) -> tuple[str | int, ...]:
    """Return the part of a place that is in the table ``raw``; after it, pydantic names the types of a union."""
    for index, part in enumerate(loc):
        if isinstance(raw, dict) and part in raw:
            raw = raw[str(part)]
        elif isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        elif not isinstance(raw, dict | list | tuple):
            return loc[:index]
    return loc


_TYPES = {"a valid integer": "an integer", "a valid number": "a number", "a valid boolean": "true or false",
          "a valid string": "a string"}  # fmt: skip


def _expected(message: str) -> str:
    """Return pydantic's message in the words of the other ones."""
    text = message.removeprefix("Value error, ")
    if not text.startswith("Input should be "):
        return text
    wanted = text.removeprefix("Input should be ").partition(", unable")[0].partition(", got")[0]
    is_bound = wanted.startswith(("greater", "less"))
    return f"expected {_TYPES.get(wanted, f'a number {wanted}' if is_bound else wanted)}"


def _fault(several: Sequence[Any], model: type[BaseModel], raw: Any) -> str:
    first = several[0]
    key, tables = _place(model, raw, _in_raw(first["loc"], raw) if len(several) > 1 else first["loc"])
    kind, given = first["type"], first.get("input")
    message, *others = dict.fromkeys(_expected(str(e["msg"])) for e in several)
    message += "".join(f" or {other.removeprefix('expected ')}" for other in others)
    if kind == "extra_forbidden":
        message = "unknown key" + (_right_table(first["loc"], given) or _right_key(key, tables, model))
    elif kind == "missing":
        example = _text_of(key, tables)[1]
        so = f", for example {example}" if example else ""
        message = f"the key is missing and has no default; set it{so}{_meaning(key, tables)}"
    elif kind == "union_tag_not_found":
        message = 'each stage needs kind = "sft", "rl" or "rejection"'
    elif kind == "union_tag_invalid":
        message = f'kind = {first["input"].get("kind")!r} is not a stage; set "sft", "rl" or "rejection"'
    elif kind == "tuple_type" and isinstance(given, dict):
        message = f"expected a list of tables, got one table; write [[{'.'.join(key)}]] for each of them"
    elif kind == "tuple_type":
        message = f"expected a list, got {given!r}; write {json.dumps([given], default=str)}"
    elif kind in ("dict_type", "model_type"):
        example = _text_of(key, tables)[1]
        message = f"expected a table, got {given!r}" + (f"; for example {example}" if example else "")
    elif "input" in first and not isinstance(given, dict | list | tuple):
        message += f", got {given!r}" + _meaning(key, tables)
    return (f"{'.'.join(key)}: " if key else "") + message


def _right_table(loc: Sequence[str | int], given: Any) -> str:
    """Return what to write for [[stages.rl.rewards]] below [[stages]]: TOML puts it into a new key of the last stage."""
    if len(loc) < 3 or loc[0] != "stages" or not isinstance(given, dict) or not given:
        return ""
    inner, value = next(iter(given.items()))
    head = f"[[stages.{inner}]]" if isinstance(value, list) else f"[stages.{inner}]"
    return f"; below [[stages]], a table of the stage is called {head}"


def _meaning(key: Sequence[str], tables: Sequence[type[BaseModel]]) -> str:
    """Return the first sentence of the key's meaning in parentheses, or "" for what is not a key of these tables."""
    said, _ = _text_of(key, tables)
    return f" ({key[-1]}: {said.partition('. ')[0].rstrip('.')})" if said else ""


def _text_of(key: Sequence[str], tables: Sequence[type[BaseModel]]) -> tuple[str, str]:
    """Return the meaning and the example of a key, or empty texts."""
    named = (meaning(table, key[-1]) for table in tables if key and key[-1] in table.model_fields)
    return next(named, ("", ""))


def _place(
    model: type[BaseModel], raw: Any, loc: Sequence[str | int]
) -> tuple[list[str], list[type[BaseModel]]]:
    """Return the key that pydantic calls ``loc``, and what the table that contains it can be."""
    key = list[str]()
    tables = inside = [model]
    before: str | int = ""
    for part in loc:
        if str(part).startswith(("function-", "constrained-", "union-")):
            continue
        # The kind of a stage, which is not a key.
        if isinstance(before, int) and (tagged := [m for m in inside if part == _tag(m)]):
            inside, before = tagged, ""
            continue
        held = [m.model_fields[part].annotation for m in inside if part in m.model_fields]
        tables, inside = inside, [m for annotation in held for m in _models(annotation)] if held else inside
        raw = raw[int(part)] if isinstance(raw, list) else raw.get(part) if isinstance(raw, dict) else None
        name = raw.get("name") or raw.get("kind") if isinstance(part, int) and isinstance(raw, dict) else ""
        key.append(str(name or part))
        before = part
    return key, tables


def _right_key(key: Sequence[str], tables: Sequence[type[BaseModel]], model: type[BaseModel]) -> str:
    """Suggest the right key (with its table if that is a different one), or list the expected keys."""
    *here, name = key
    if name in INSTEAD_OF:
        return f"; {INSTEAD_OF[name]}"
    siblings = list(dict.fromkeys(field for table in tables for field in table.model_fields))
    below = [".".join([*here, k]) for table in tables for k in _keys(table)]
    pools, aliases = (siblings, below, list(_keys(model))), ALIASES.get(name, ())
    for known, alias in ((k, a) for pool in pools for a in aliases for k in pool):
        if known == alias.rpartition(".")[2] or known.endswith(f".{alias}"):
            return f'; did you mean "{known}"?'
    if hint := did_you_mean(name, siblings):
        return hint
    elsewhere = {k.rpartition(".")[2]: k for k in reversed([*below, *pools[2]])}
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.7)
    return f'; did you mean "{elsewhere[close[0]]}"?' if close else f"; expected one of {', '.join(siblings)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings models that an annotation contains (a union, a tuple of models, a table of models)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tag(model: type[BaseModel]) -> str:
    """Return the one kind that the model is for, or ""."""
    values = get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
    return str(values[0]) if len(values) == 1 else ""


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of a settings model and of its nested tables, with its table ("compute.threads")."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            yield from _keys(field.annotation, f"{prefix}{name}.")
    else:
        named = "NAME." if get_origin(annotation) is dict else ""  # [data.NAME]
        for part in get_args(annotation):
            tag = _tag(part) if isinstance(part, type) and issubclass(part, BaseModel) else ""
            yield from _keys(part, prefix + (f"{tag}." if tag else named))
