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
from truestep.errors import UserError
from truestep.records import Demonstration, Message, Problem, Prompt, Role
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
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
    ``generation_suffix``), this beginning is removed. Raises UserError as ``encode_prompt`` does, and also if
    there is no solution, if a thought is never closed, if the template renders an answered prompt
    differently, or if no stop token would be trained on."""
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
    end = prompt.rpartition(messages[-1].content.strip())[2] + suffix
    solution = _continued(problem, end, (prompt[len(before) :] + suffix, suffix))
    if not solution.strip():
        raise UserError(f"{_where(problem)}: solution: expected a worked solution to train on, got none")
    solution_ids = _ids(tokenizer, solution)
    _check_text(tokenizer, problem, "solution", solution, solution_ids)
    token_ids = (*prompt_ids, *solution_ids, stop_id)
    return Demonstration(problem_id=problem.id, token_ids=token_ids, num_prompt_tokens=len(prompt_ids))


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], chat: ChatSettings, context_length: int
) -> list[Demonstration]:
    """Return the demonstrations of at most ``context_length`` tokens, in order. Longer ones are left out and
    never cut. Raises UserError if none fits."""
    made = [encode_demonstration(tokenizer, problem, chat) for problem in problems]
    kept = [d for d in made if len(d.token_ids) <= context_length]
    if made and not kept:
        shortest = min(len(d.token_ids) for d in made)
        raise UserError(
            f"none of the {len(made)} demonstrations fits into {context_length} tokens (the shortest has "
            f"{shortest}); increase model.context_length or use shorter demonstrations"
        )
    return kept


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
    asked: dict[str, Any] = {"where": _where(problem), "today": chat.date}
    text = prompt_text(tokenizer, messages, **asked)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for message in messages:
        _check_text(tokenizer, problem, "problem", message.content, encoding["input_ids"])
    marked = [Message(role=m.role, content=f"{_MARK}{i}.") for i, m in enumerate(messages)]
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
        if at < 0 or f"{_MARK}{i}." not in outline:
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


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """Return a completion as the grader reads it: without special tokens, with its spaces unchanged."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _answered(
    tokenizer: Any, problem: Problem, messages: Sequence[Message], chat: ChatSettings
) -> tuple[str, str, str]:
    """Return the prompt, and what the template writes before and after the assistant's text."""
    asked: dict[str, Any] = {"where": _where(problem), "today": chat.date}
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


def _check_text(tokenizer: Any, problem: Problem, field: str, text: str, ids: Sequence[int]) -> None:
    """Raise UserError for a control token, which would end the turn, or an unknown character, which would be
    trained on as <unk>. ``ids`` are the tokens of the text, or of a rendering that contains the text."""
    where = f"{_where(problem)}: {field}"
    if token := control_tokens(tokenizer, str(getattr(tokenizer, "chat_template", None))).search(text):
        raise UserError(f'{where}: expected plain text, got the control token "{token[0]}"; remove it')
    unknown = tokenizer.unk_token_id
    # The unknown token must come from the text itself, not only from the template.
    if unknown is not None and unknown in ids and unknown in _ids(tokenizer, text):
        found = next((c for c in text if unknown in _ids(tokenizer, c)), text[:60])
        raise UserError(f"{where}: the tokenizer does not know the character {found!r}; replace it")


def _where(problem: Problem) -> str:
    return problem.row or problem.id
