"""Converts between messages and tokens with the tokenizer's chat template.

Training, sampling and evaluation all use this module. A prompt is the template's text up to the assistant's
turn, plus ``chat.generation_suffix``. A demonstration is that prompt, the solution's text (tokenized
separately, as if it had been sampled), and the token with which the template ends the assistant's turn. The
position, never the token id, decides which tokens are trained on, so the padding token may be the stop token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from truestep.data.template import (
    PLACE,
    accepted_turns,
    control_tokens,
    has_chat_template,
    prompt_text,
    render,
)
from truestep.data.turns import THOUGHTS
from truestep.errors import UserError
from truestep.records import Demonstration, Message, Problem, Prompt, Role
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
_MARK = "PLACEOFTURN"  # replaces the text of the prompt's turns
_THOUGHT = re.compile(r"(<\w[\w:-]*>|\[[A-Z_]+\])(\s*)$")  # at the end of a prompt that opens a thought


def prompt_messages(problem: Problem, chat: ChatSettings) -> tuple[Message, ...]:
    """Return the turns of the prompt. ``chat.user`` wraps bare text; ``chat.system`` is added if the row has
    no system turn."""
    messages = problem.messages
    if not problem.meta.get("turns_given"):
        *before, last = messages
        messages = (*before, replace(last, content=chat.user.replace("{problem}", last.content)))
    if chat.system and messages[0].role != "system":
        messages = (Message(role="system", content=chat.system), *messages)
    return messages


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, chat: ChatSettings) -> Prompt:
    """Return the problem as the token ids that every sample starts from. Raises UserError if a text contains
    a special token, or a character that the tokenizer does not know, or if the chat template does not write
    the text of every turn (only white space around it, and thoughts of earlier turns, may be left out)."""
    return Prompt(problem=problem, token_ids=tuple(_prompt(tokenizer, problem, chat)[0]))


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, chat: ChatSettings
) -> Demonstration:
    """Return the prompt, the solution and the stop token. Only the last two are trained on.

    If the solution begins with the end of the prompt (such as ``<think>``, from the template or
    ``generation_suffix``), this beginning is removed. A thought or tool calls of the last turn are written by the
    template. Raises UserError in the cases of ``encode_prompt``. It also does if there is no solution, if a thought is
    never closed, if the template renders an answered prompt differently, or if no stop token would be trained on."""
    prompt_ids, _ = _prompt(tokenizer, problem, chat)
    messages = prompt_messages(problem, chat)
    prompt, before, after = _answered(tokenizer, problem, messages, chat)
    suffix = chat.generation_suffix
    _check_header(problem, before[len(prompt) :].removeprefix(suffix))
    stop_id = _turn_end(tokenizer, after)
    if stop_id is None:
        raise UserError(
            f"the chat template ends the assistant's turn with {after[:20]!r}, not with a special token, so no "
            "stop token is trained on; end the turn with the eos token, e.g. {{ message['content'] + eos_token }}"
        )
    reply = problem.dialogue[-1] if problem.dialogue else Message(role="assistant", content=problem.solution)
    if reply.more:
        whole = render(tokenizer, messages, answer=reply, **_asked(problem, chat))
        solution = _written(problem, reply, whole, prompt + suffix, after)
        texts = [reply.content, *map(str, reply.more.values())]
    else:
        end = prompt.rpartition(messages[-1].content.strip())[2] + suffix
        solution = _continued(problem, end, (prompt[len(before) :] + suffix, suffix))
        texts = [solution]
    if not solution.strip():
        raise UserError(f"{_where(problem)}: solution: expected a worked solution to train on, got none")
    solution_ids = _ids(tokenizer, solution)
    field = field_of(problem, "solution", len(problem.messages) + 1, "assistant")
    for text in texts:
        check_text(tokenizer, _where(problem), field, text, solution_ids, chat)
    token_ids = (*prompt_ids, *solution_ids, stop_id)
    return Demonstration(problem_id=problem.id, token_ids=token_ids, num_prompt_tokens=len(prompt_ids))


def _written(problem: Problem, reply: Message, whole: str, prompt: str, after: str) -> str:
    """Return what the template writes for the last turn, which has more than a text. Raises UserError if it does
    not continue the prompt, or lacks a part of the turn."""
    where = f"{_where(problem)}: messages"
    if not (whole.startswith(prompt) and whole.endswith(after)):
        key = next(iter(reply.more))
        raise UserError(
            f"{where}: with {key}, the chat template does not continue the prompt up to the token that ends a turn; "
            "use a template that does, or write the whole turn as text"
        )
    written = whole[len(prompt) : len(whole) - len(after)]
    parts = {key: [value] for key, value in reply.more.items() if key in THOUGHTS} | {
        "content": [reply.content]
    }
    parts["tool_calls"] = [call["function"]["name"] for call in reply.more.get("tool_calls", ())]
    for key, texts in parts.items():
        if any(text.strip() not in written for text in texts):
            remedy = (
                "<think>...</think> before the content" if key in THOUGHTS else "it into the content as text"
            )
            raise UserError(
                f"{where}: the chat template does not write {key}; use one that does, or write {remedy}"
            )
    return written


def prompt_roles(tokenizer: Any, problem: Problem, chat: ChatSettings) -> tuple[Role, ...]:
    """Return the role that wrote each token of the prompt. If a token is in two turns, the role is that of
    its first character."""
    return tuple(_prompt(tokenizer, problem, chat, lenient=True)[1])


def _prompt(
    tokenizer: Any, problem: Problem, chat: ChatSettings, *, lenient: bool = False
) -> tuple[list[int], list[Role]]:
    """Return the token ids and roles of the prompt. If ``lenient``, a template may leave out a turn."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is slow and has no offsets; use a model folder with a tokenizer.json")
    messages = prompt_messages(problem, chat)
    asked = _asked(problem, chat)
    text = prompt_text(tokenizer, messages, **asked)
    for tool in problem.tools:
        if (name := str(tool.get("function", tool).get("name"))) not in text:
            fault = (
                f'the chat template does not write the tool "{name}"; use one that does, or remove the column'
            )
            raise UserError(f"{_where(problem)}: tools: {fault}")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first = 1 - (len(messages) - len(problem.messages))  # the number of the first turn: 0 for chat.system
    for number, message in enumerate(messages, start=first):
        field = field_of(problem, "problem", number, message.role) if number else "chat.system"
        check_text(tokenizer, _where(problem), field, message.content, encoding["input_ids"], chat)
    marked = [replace(m, content=m.content and f"{_MARK}{i}.") for i, m in enumerate(messages)]
    outline = prompt_text(tokenizer, marked, **asked)
    owners = _owners(text, outline, messages)
    if not owners and not lenient:
        _check_turns(problem, text, outline, messages)
    owners = owners or [Role.TEMPLATE] * len(text)
    roles = [owners[start] if start < end else Role.TEMPLATE for start, end in encoding["offset_mapping"]]
    bos, suffix = _bos(tokenizer), _ids(tokenizer, chat.generation_suffix)
    ids = [*bos, *encoding["input_ids"], *suffix]
    return ids, [*[Role.TEMPLATE] * len(bos), *roles, *[Role.TEMPLATE] * len(suffix)]


def _owners(text: str, outline: str, messages: Sequence[Message]) -> list[Role]:
    """Return the role of every character, or [] if the template changes the contents. The turns are rendered
    again with marks in place of their contents, because a content could also occur in the template."""
    written = [m.content for m in messages]
    for contents in (written, [text.strip() for text in written]):  # some templates strip the contents
        rebuilt, rest, owners = "", outline, []
        for i, (message, content) in enumerate(zip(messages, contents, strict=True)):
            if not content:
                continue
            before, _, rest = rest.partition(f"{_MARK}{i}.")
            rebuilt += before + content
            owners += [Role.TEMPLATE] * len(before) + [_ROLES[message.role]] * len(content)
        if rebuilt + rest == text:
            return owners + [Role.TEMPLATE] * len(rest)
    return []


def _check_turns(problem: Problem, text: str, outline: str, messages: Sequence[Message]) -> None:
    """Raise UserError if a turn's text is not in the rendered text. A template may strip it, and may leave out
    the thought of an earlier assistant turn; some write the system's turn after other turns."""
    end = 0
    for i, message in enumerate(messages):
        content = message.content.strip()
        if message.role == "assistant" and content not in text:
            content = content.rpartition("</think>")[2].strip()
        at = text.find(content, 0 if message.role == "system" else end)
        if at < 0 or (content and f"{_MARK}{i}." not in outline):
            raise UserError(
                f"{_where(problem)}: messages: the chat template leaves out or changes the text of turn {i + 1} "
                f"({message.role}); use a template that writes every turn as it is, or remove the turn"
            )
        end = end if message.role == "system" else at + len(content)


def _check_header(problem: Problem, written: str) -> None:
    """Raise UserError if the template writes text before an answer that the prompt does not end with. An empty
    thought is allowed, because the solution contains it."""
    if re.sub(r"</?think>", "", written).strip():
        raise UserError(
            f"{_where(problem)}: messages: the chat template writes {written[:60]!r} before an answer, but not at the end "
            "of a prompt, so a demonstration would not contain it; use a template that writes the same in both"
        )


def _continued(problem: Problem, end: str, beginnings: Sequence[str]) -> str:
    """Return the solution without the beginning that is already at the ``end`` of the prompt. Raises UserError
    if a thought is never closed, because the grader finds no answer in such a completion."""
    solution = problem.solution
    if beginning := next((b for b in beginnings if b and solution.startswith(b)), ""):
        solution = solution.removeprefix(beginning)
    elif (opened := _THOUGHT.search(end)) and solution.lstrip().startswith(opened[1]):
        solution = solution.lstrip().removeprefix(opened[1]).removeprefix(opened[2])
    thought = "<think>" if end.rstrip().endswith("<think>") else ""
    if solution.strip() and "<think>" in (thought + solution).rpartition("</think>")[2]:
        opener = "<think>" if "<think>" in solution else "the end of the prompt (<think>)"
        raise UserError(
            f"{_where(problem)}: solution: the thought that {opener} opens is never closed, so the grader would find no "
            "answer in it; write </think> before the answer"
        )
    return solution


def stop_token_ids(tokenizer: Any, model_eos: int | Sequence[int] | None = ()) -> tuple[int, ...]:
    """Return the tokens at which sampling stops: those that end a turn in the chat template, and the eos
    tokens of the tokenizer and the model. Raises UserError if there is none."""
    turns = accepted_turns(tokenizer, str(getattr(tokenizer, "chat_template", None)))
    problem = Problem(id="stop token", messages=turns, answer="2")
    end = _turn_end(tokenizer, _answered(tokenizer, problem, problem.messages, ChatSettings())[2])
    found = [end, tokenizer.eos_token_id, *([model_eos] if isinstance(model_eos, int) else model_eos or ())]
    stops = tuple(dict.fromkeys(int(token) for token in found if token is not None))
    if not stops:
        raise UserError("neither the tokenizer, its chat template nor the model has a stop token")
    return stops


def completion_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], kept: Sequence[str] = ()
) -> str:
    """Return a completion as the grader reads it: without special tokens, except those to be ``kept``, and with its
    spaces unchanged."""
    ids = list(token_ids)
    if kept:
        left_out = {*tokenizer.all_special_ids} - {*tokenizer.convert_tokens_to_ids(list(kept))}
        ids = [token for token in ids if token not in left_out]
    text = tokenizer.decode(ids, skip_special_tokens=not kept, clean_up_tokenization_spaces=False)
    return str(text)


def check_special_tokens(tokenizer: Any, chat: ChatSettings, stop_ids: Sequence[int]) -> None:
    """Raise UserError if one of ``chat.special_tokens`` is not a token, or ends a completion."""
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    for text in chat.special_tokens:
        if text not in known:
            added = ", ".join(list(known)[:20])
            raise UserError(
                f'chat.special_tokens: "{text}" is not an added token of the tokenizer, which has {added}'
            )
        if known[text] in stop_ids:
            raise UserError(
                f'chat.special_tokens: "{text}" ends a completion, so no text can contain it; remove it'
            )


def _answered(
    tokenizer: Any, problem: Problem, messages: Sequence[Message], chat: ChatSettings
) -> tuple[str, str, str]:
    """Return the prompt, and what the template writes before and after the assistant's text."""
    asked = _asked(problem, chat)
    prompt = prompt_text(tokenizer, messages, **asked)
    before, _, after = render(tokenizer, messages, answer=PLACE, **asked).partition(PLACE)
    if not (prompt.startswith(before) or before.startswith(prompt)):
        raise UserError(
            f"{_where(problem)}: messages: the chat template renders these turns differently once they are answered, "
            "so a demonstration could not start with the sampled prompt; use a template that keeps earlier turns"
        )
    return prompt, before, after


def _turn_end(tokenizer: Any, after: str) -> int | None:
    """Return the special token directly after the assistant's text, or None."""
    ids = _ids(tokenizer, after)
    return ids[0] if ids and ids[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} else None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _bos(tokenizer: Any) -> list[int]:
    """Return the bos tokens to prepend. A chat template has its own bos; the plain template needs one if the
    tokenizer starts every text with it."""
    if has_chat_template(tokenizer) or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def check_text(
    tokenizer: Any, row: str, field: str, text: str, ids: Sequence[int], chat: ChatSettings
) -> None:
    """Raise UserError for a control token, which would end the turn, or an unknown character, which would be
    trained on as <unk>. ``ids`` are the tokens of the text, or of a rendering that contains the text."""
    where = f"{row}: {field}"
    for token in control_tokens(tokenizer, str(getattr(tokenizer, "chat_template", None))).findall(text):
        if token not in chat.special_tokens:
            remedy = "remove it, or allow it with chat.special_tokens if the model should write it"
            raise UserError(f'{where}: expected plain text, got the control token "{token}"; {remedy}')
    unknown = tokenizer.unk_token_id
    # The unknown token must come from the text itself, not only from the template.
    if unknown is not None and unknown in ids and unknown in _ids(tokenizer, text):
        found = next((c for c in text if unknown in _ids(tokenizer, c)), text[:60])
        raise UserError(f"{where}: the tokenizer does not know the character {found!r}; replace it")


def field_of(problem: Problem, ours: str, turn: int = 0, role: str = "") -> str:
    """Return the row's name of a column, and of turns the number (from 1) and the role."""
    turns = problem.sources.get("messages") or problem.sources.get("prompt")
    if ours not in problem.sources and turns:
        return f"{turns[0]}: turn {turn} ({role})" if problem.meta.get("turns_given") else turns[0]
    return problem.sources.get(ours, (ours,))[0]


def _where(problem: Problem) -> str:
    return problem.row or problem.id


def _asked(problem: Problem, chat: ChatSettings) -> dict[str, Any]:
    """Return what ``render`` needs besides the turns."""
    return {"where": _where(problem), "today": chat.date, "tools": problem.tools}
