"""Prompt templates by name: the paper's, Qwen's, a plain one, a bare completion, deliberately odd ones, and the user's.

A score that changes between reasonable templates says as much about the template as about the model, so
``--prompts`` evaluates with several templates and reports the spread."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.errors import UserError, did_you_mean
from truestep.records import Message, Problem


@dataclass(frozen=True, kw_only=True)
class Template:
    """A way to present a problem. ``suffix`` opens the model's turn and is treated as the model's own text.
    If ``chat`` is False, the prompt is text to continue, without a chat template, and a completion ends at
    the first ``stop``. If ``brief`` is True, each worked example has one step and one line; ``worked`` replaces them."""

    id: str
    math: str
    choice: str
    system: str = ""
    choice_system: str = ""
    suffix: str = ""
    chat: bool = True
    stop: tuple[str, ...] = ()
    brief: bool = False
    odd: bool = False
    worked: tuple[tuple[str, str], ...] = ()  # questions with worked answers


_DATA = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
TEMPLATES = tuple(Template(**{**row, "stop": tuple(row.get("stop", ()))}) for row in _DATA["template"])
BY_ID = {t.id: t for t in TEMPLATES}
WORKED: dict[str, list[tuple[str, str]]] = _DATA["worked"]  # by kind: questions with worked answers
MOST_SHOTS = len(WORKED["math"])
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # it is the name of a folder


def chosen(names: Sequence[str], base_dir: Path = Path()) -> list[Template]:
    """Return the named templates, each once; "odd" means all odd ones, and FILE.toml all of a file in ``base_dir`` or the
    current folder. Raises UserError for other names, and for a file that is not one of templates."""
    found: dict[str, Template] = {}
    for name in names:
        if is_file(name):
            group = _read(base_dir / name if (base_dir / name).is_file() else Path(name).expanduser())
        else:
            group = (
                [t for t in TEMPLATES if t.odd] if name == "odd" else [BY_ID[name]] if name in BY_ID else []
            )
        if not group:
            hint = did_you_mean(name, list(BY_ID))
            raise UserError(f'prompts: "{name}" is not one of {", ".join(BY_ID)}, odd, FILE.toml{hint}')
        for template in group:
            if found.setdefault(template.id, template) != template:
                raise UserError(f'prompts: two different templates have the id "{template.id}"; rename one')
    return list(found.values())


def is_file(name: str) -> bool:
    """Return whether an entry of evaluate.prompts names a file."""
    return name.endswith(".toml")


def _read(path: Path) -> list[Template]:
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("template")
    except OSError as error:
        near = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise UserError(f"prompts: cannot read {path}: {error.strerror}{hint}") from None
    except ValueError as error:
        raise UserError(f"prompts: {path} is not valid TOML: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"prompts: {path} has no [[template]] table")
    return [_template(row, f"prompts: {path}: template {number}") for number, row in enumerate(rows, start=1)]


_TEXTS = ("id", "math", "choice", "system", "choice_system", "suffix")


def _template(row: dict[str, Any], where: str) -> Template:
    """Return a template of a user's file. ``choice`` and ``choice_system`` are by default those of ``math``."""
    known = (*_TEXTS, "chat", "stop", "worked")
    if unknown := next((key for key in row if key not in known), ""):
        hint = did_you_mean(unknown, list(known)) or f"; use {', '.join(known)}"
        raise UserError(f"{where}: {unknown}: unknown key{hint}")
    worked = row.get("worked", [])
    pairs = [
        pair for pair in worked if isinstance(pair, list) and [type(text) for text in pair] == [str, str]
    ]
    faults = {key: "expected a string" for key in _TEXTS if not isinstance(row.get(key, ""), str)}
    faults |= {} if isinstance(row.get("chat", True), bool) else {"chat": "expected true or false"}
    stops = row.get("stop", [])
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        faults["stop"] = "expected a list of strings that are not empty"
    if not isinstance(worked, list) or len(pairs) < len(worked):
        faults["worked"] = "expected a list of [question, answer]"
    texts = {key: row[key] for key in _TEXTS if key in row and key not in faults}
    if "id" not in faults and (
        not _ID.fullmatch(row.get("id", "")) or row["id"] in (*BY_ID, "odd", "benchmark")
    ):
        faults["id"] = 'expected a new name of letters, digits, ".", "_" and "-"'
    for key in ("math", "choice"):
        if key not in faults and "{problem}" not in row.get(key, row.get("math", "")):
            faults[key] = "expected a text with {problem}"
    for key, fault in faults.items():
        raise UserError(f"{where}: {key}: {fault}")
    texts = {"choice": texts["math"], "choice_system": texts.get("system", ""), **texts}
    return Template(
        **texts, chat=row.get("chat", True), stop=tuple(stops), worked=tuple((q, a) for q, a in pairs)
    )


def messages_of(template: Template, problem: Problem, kind: str, few_shot: int) -> tuple[Message, ...]:
    """Return the turns of a prompt: the system turn, ``few_shot`` worked examples, and the problem's turns. The
    template wraps the last turn. A problem's system turn replaces the template's."""
    body, system = template.math, template.system
    shots = WORKED["brief" if template.brief else "math"]
    if kind == "choice":
        body, system, shots = template.choice, template.choice_system, WORKED["choice"]
    *earlier, last = problem.messages
    turns = [Message(role="system", content=system)] if system else []
    if earlier and earlier[0].role == "system":
        turns = [earlier.pop(0)]
    shots = list(template.worked) or shots
    if len(shots) < few_shot:
        raise UserError(f"few_shot = {few_shot}: the template {template.id} has {len(shots)} worked examples")
    for question, answer in shots[:few_shot]:
        thought = f"{template.suffix}{answer}\n</think>\n{answer}" if "<think>" in template.suffix else answer
        turns += [_user(body, question), Message(role="assistant", content=thought)]
    return (*turns, *earlier, _user(body, last.content) if last.role == "user" else last)


def _user(body: str, question: str) -> Message:
    return Message(role="user", content=body.replace("{problem}", question))


def plain_text(messages: Sequence[Message]) -> str:
    """Return the turns as text to continue. Each answer follows a space and is followed by an empty line."""
    text = "".join((" " if m.role == "assistant" else "\n\n") + m.content for m in messages)
    return text.removeprefix("\n\n")


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop that it contains."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
