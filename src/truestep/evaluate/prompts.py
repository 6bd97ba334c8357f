"""Prompt templates by name: the paper's, Qwen's, a plain one, a bare completion, and deliberately odd ones.

A score that changes between reasonable templates says as much about the template as about the model, so
``--prompts`` evaluates with several templates and reports the spread."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from truestep.errors import UserError
from truestep.records import Message, Problem


@dataclass(frozen=True, kw_only=True)
class Template:
    """A way to present a problem. ``suffix`` opens the model's turn and is treated as the model's own text.
    If ``chat`` is False, the prompt is text to continue, without a chat template, and a completion ends at
    the first ``stop``. If ``brief`` is True, each worked example has one step and one line."""

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


_DATA = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
TEMPLATES = tuple(Template(**{**row, "stop": tuple(row.get("stop", ()))}) for row in _DATA["template"])
BY_ID = {t.id: t for t in TEMPLATES}
WORKED: dict[str, list[tuple[str, str]]] = _DATA["worked"]  # by kind: questions with worked answers
MOST_SHOTS = len(WORKED["math"])


def chosen(names: Sequence[str]) -> list[Template]:
    """Return the named templates, each once; "odd" means all odd ones. Raises UserError for other names."""
    found: dict[str, Template] = {}
    for name in names:
        group = [t for t in TEMPLATES if t.odd] if name == "odd" else [BY_ID[name]] if name in BY_ID else []
        if not group:
            raise UserError(f'prompts: "{name}" is not one of {", ".join(BY_ID)}, odd')
        found |= {t.id: t for t in group}
    return list(found.values())


def messages_of(template: Template, problem: Problem, kind: str, few_shot: int) -> tuple[Message, ...]:
    """Return the turns of a prompt: the system turn, ``few_shot`` worked examples, and the problem."""
    body, system = template.math, template.system
    shots = WORKED["brief" if template.brief else "math"]
    if kind == "choice":
        body, system, shots = template.choice, template.choice_system, WORKED["choice"]
    turns = [Message(role="system", content=system)] if system else []
    for question, answer in shots[:few_shot]:
        thought = f"{template.suffix}{answer}\n</think>\n{answer}" if "<think>" in template.suffix else answer
        turns += [_user(body, question), Message(role="assistant", content=thought)]
    return (*turns, _user(body, problem.messages[-1].content))


def _user(body: str, question: str) -> Message:
    return Message(role="user", content=body.replace("{problem}", question))


def plain_text(messages: Sequence[Message]) -> str:
    """Return the turns as text to continue. Each answer follows a space and is followed by an empty line."""
    text = "".join((" " if m.role == "assistant" else "\n\n") + m.content for m in messages)
    return text.removeprefix("\n\n")


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop that it contains."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
