"""Renders turns with a tokenizer's chat template: within a time limit, and with a date that does not change.

A tokenizer without a chat template (a base model) gets a plain one: the turns with an empty line between
them, then a newline."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from truestep.data.turns import THOUGHTS
from truestep.errors import UserError
from truestep.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # of processor time for one rendering; an ordinary one takes less than a millisecond
PLACE = "PLACEOFTHESOLUTION"  # replaces the assistant's text when the template is examined
_PROBE = (Message(role="user", content="1+1=?"),)
_PROBES = (_PROBE, (Message(role="system", content="."), *_PROBE))
_MARK = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|\[/?[A-Z_]{2,30}\]|<</?SYS>>|</?s>")
_NO_MARK = re.compile(r"</?(?:think|answer)>")  # part of what a model writes


class _TooLong(Exception):
    """Raised in a template that has used up its time."""


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether there is a chat template; if not, the plain template described above is used."""
    return getattr(tokenizer, "chat_template", None) is not None


def render(
    tokenizer: Any, messages: Sequence[Message], *, where: str, today: str, answer: Message | str | None = None,
    opens: bool = True, tools: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
    """Return the text of the turns, then (if it ``opens``) of an open assistant turn or, given ``answer``, of
    a closed one. ``today`` is the date that a template may write. Raises UserError if the template fails."""
    answer = Message(role="assistant", content=answer) if isinstance(answer, str) else answer
    if not has_chat_template(tokenizer):
        text = "\n\n".join(map(_plain, messages)) + "\n"
        return text if answer is None else text + _plain(answer) + (tokenizer.eos_token or "")
    from jinja2 import TemplateError

    spoken = [*messages, answer] if answer is not None else messages
    turns = [{"role": m.role, "content": m.content, **m.more} for m in spoken]
    fault = f"{where}: messages: the chat template"
    options: dict[str, Any] = {"tokenize": False, "strftime_now": date.fromisoformat(today).strftime}
    options |= {"tools": [dict(tool) for tool in tools]} if tools else {}
    try:
        with _limited(SECONDS):
            text = tokenizer.apply_chat_template(
                turns, add_generation_prompt=opens and answer is None, **options
            )
            text.encode()  # fails on a lone surrogate, which a template may contain
    except _TooLong:
        raise UserError(
            f"{fault} does not end within {SECONDS:.0f} s; use a template without such a loop"
        ) from None
    except (OverflowError, MemoryError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{fault} is too large to render ({reason}); use a template without such a loop"
        ) from None
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{fault} refuses these turns: {reason}") from None
    return str(text)


def _plain(message: Message) -> str:
    """Return what the plain template writes for a turn: its thought, if it has one, and its text."""
    thought = next(
        (f"<think>\n{message.more[key]}\n</think>\n\n" for key in THOUGHTS if key in message.more), ""
    )
    return thought + message.content


def prompt_text(tokenizer: Any, messages: Sequence[Message], **asked: Any) -> str:
    """Return the turns with an open assistant turn. If the template ignores ``add_generation_prompt``, the
    assistant's header is what the template writes before an answer. ``asked`` is for ``render``."""
    if not _ignores_generation_prompt(tokenizer, str(getattr(tokenizer, "chat_template", None))):
        return render(tokenizer, messages, **asked)
    before = render(tokenizer, messages, **asked, answer=PLACE).partition(PLACE)[0]
    return re.sub(r"<think>\s*</think>\s*$", "", before)


@lru_cache(maxsize=8)
def accepted_turns(tokenizer: Any, template: str) -> tuple[Message, ...]:
    """Return turns to examine a template with: a user's turn, after a system turn if the template needs one. If
    the template refuses both, return the user's turn."""
    for turns in _PROBES if has_chat_template(tokenizer) else ():
        try:
            render(tokenizer, turns, where="the chat template", today="2000-01-01")
        except UserError:
            continue
        return turns
    return _PROBE


@lru_cache(maxsize=8)
def _ignores_generation_prompt(tokenizer: Any, template: str) -> bool:
    if not has_chat_template(tokenizer):
        return False
    asked: dict[str, Any] = {"where": "the chat template", "today": "2000-01-01"}
    try:
        turns = accepted_turns(tokenizer, template)
        closed, opened = (render(tokenizer, turns, opens=opens, **asked) for opens in (False, True))
        return closed == opened and render(tokenizer, turns, answer=PLACE, **asked).startswith(opened)
    except UserError:
        return False  # the template refuses this probe; a problem's own turns may still be rendered


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Any, template: str) -> re.Pattern[str]:
    """Return a pattern for the texts that structure a chat: the special tokens, and the further tokens and
    marks (such as [INST]) that the chat template writes around the turns."""
    added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
    found = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    for messages in _PROBES if has_chat_template(tokenizer) else ():
        try:
            text = render(tokenizer, messages, where="the chat template", today="2000-01-01", answer=".")
        except UserError:
            continue
        found |= {*_MARK.findall(text), *(token.content for token in added if token.content in text)}
    kept = sorted(
        (token for token in found if token.strip() and not _NO_MARK.fullmatch(token)), key=len, reverse=True
    )
    return re.compile("|".join(map(re.escape, kept)) or r"(?!)")


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the main thread after ``seconds`` of processor time; other threads have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
