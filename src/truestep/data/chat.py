"""Converts between messages and tokens with the tokenizer's chat template.

Training, sampling and evaluation all use this module. A prompt is the template's text up to the assistant's
turn, plus ``chat.generation_suffix``. A demonstration is that prompt, the solution's text (tokenized
separately, as if it had been sampled), and the token with which the template ends the assistant's turn. The
position, never the token id, decides which tokens are trained on, so the padding token may be the stop token.
A tokenizer without a chat template (a base model) gets a plain one: the turns with an empty line between
them, then a newline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError
from truestep.records import Demonstration, Message, Problem, Prompt, Role
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_PLACE = "PLACEOFTHESOLUTION"  # replaces the assistant's text when the template is examined


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether there is a chat template; if not, the plain template described above is used."""
    return getattr(tokenizer, "chat_template", None) is not None


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
    a special token, or a character that the tokenizer does not know."""
    return Prompt(problem=problem, token_ids=tuple(_prompt(tokenizer, problem, chat)[0]))


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, chat: ChatSettings
) -> Demonstration:
    """Return the prompt, the solution and the stop token. Only the last two are trained on.

    If the solution begins with the end of the prompt (such as ``<think>``, from the template or
    ``generation_suffix``), this beginning is removed. Raises UserError as ``encode_prompt`` does, and also if
    there is no solution, if the template renders an answered prompt differently, or if no stop token would be
    trained on."""
    prompt_ids, _ = _prompt(tokenizer, problem, chat)
    messages = prompt_messages(problem, chat)
    opening, after = _answered(tokenizer, problem, messages)
    stop_id = _turn_end(tokenizer, after)
    if stop_id is None:
        raise UserError(
            f"the chat template ends the assistant's turn with {after[:20]!r}, not with a special token, so no "
            "stop token is trained on; end the turn with the eos token, e.g. {{ message['content'] + eos_token }}"
        )
    solution = problem.solution.removeprefix(opening + chat.generation_suffix)
    if solution == problem.solution:
        solution = solution.removeprefix(chat.generation_suffix)
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
    return tuple(_prompt(tokenizer, problem, chat)[1])


def _prompt(tokenizer: Any, problem: Problem, chat: ChatSettings) -> tuple[list[int], list[Role]]:
    """Return the token ids and roles of the prompt."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is slow and has no offsets; use a model folder with a tokenizer.json")
    messages = prompt_messages(problem, chat)
    text = _render(tokenizer, problem, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for message in messages:
        _check_text(tokenizer, problem, "problem", message.content, encoding["input_ids"])
    marked = [Message(role=m.role, content=f"{_PLACE}{i}.") for i, m in enumerate(messages)]
    owners = _owners(text, _render(tokenizer, problem, marked), messages) or [Role.TEMPLATE] * len(text)
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
            before, _, rest = rest.partition(f"{_PLACE}{i}.")
            rebuilt += before + content
            owners += [Role.TEMPLATE] * len(before) + [_ROLES[message.role]] * len(content)
        if rebuilt + rest == text:
            return owners + [Role.TEMPLATE] * len(rest)
    return []


def stop_token_ids(tokenizer: Any, model_eos: int | Sequence[int] | None = ()) -> tuple[int, ...]:
    """Return the tokens at which sampling stops: those that end a turn in the chat template, and the eos
    tokens of the tokenizer and the model. Raises UserError if there is none."""
    problem = Problem(id="stop token", messages=(Message(role="user", content="1+1=?"),), answer="2")
    end = _turn_end(tokenizer, _answered(tokenizer, problem, problem.messages)[1])
    found = [end, tokenizer.eos_token_id, *([model_eos] if isinstance(model_eos, int) else model_eos or ())]
    stops = tuple(dict.fromkeys(int(token) for token in found if token is not None))
    if not stops:
        raise UserError("neither the tokenizer, its chat template nor the model has a stop token")
    return stops


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """Return a completion as the grader reads it: without special tokens, with its spaces unchanged."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _render(tokenizer: Any, problem: Problem, messages: Sequence[Message], answer: str | None = None) -> str:
    """Return the text of the turns, then of an open assistant turn or, given ``answer``, of a closed one."""
    if not has_chat_template(tokenizer):
        text = "\n\n".join(m.content for m in messages) + "\n"
        return text if answer is None else text + answer + (tokenizer.eos_token or "")
    from jinja2 import TemplateError

    turns = [{"role": m.role, "content": m.content} for m in messages]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
    except (TemplateError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = _where(problem)
        raise UserError(f"{where}: messages: the chat template refuses these turns: {reason}") from None


def _answered(tokenizer: Any, problem: Problem, messages: Sequence[Message]) -> tuple[str, str]:
    """Return what the template puts before the assistant's text (such as ``<think>``) and after it."""
    prompt = _render(tokenizer, problem, messages)
    before, _, after = _render(tokenizer, problem, messages, _PLACE).partition(_PLACE)
    if not (prompt.startswith(before) or before.startswith(prompt)):
        raise UserError(
            f"{_where(problem)}: messages: the chat template renders these turns differently once they are answered, "
            "so a demonstration could not start with the sampled prompt; use a template that keeps earlier turns"
        )
    return prompt[len(before) :], after


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
    """Raise UserError for a special token, which would end the turn, or an unknown character, which would be
    trained on as <unk>. ``ids`` are the tokens of the text, or of a rendering that contains the text."""
    where = f"{_where(problem)}: {field}"
    for token in tokenizer.all_special_tokens:
        if token in text:
            raise UserError(f'{where}: expected plain text, got the special token "{token}"; remove it')
    unknown = tokenizer.unk_token_id
    # The unknown token must come from the text itself, not only from the template.
    if unknown is not None and unknown in ids and unknown in _ids(tokenizer, text):
        found = next((c for c in text if unknown in _ids(tokenizer, c)), text[:60])
        raise UserError(f"{where}: the tokenizer does not know the character {found!r}; replace it")


def _where(problem: Problem) -> str:
    return problem.row or problem.id
