"""Messages ⇄ tokens, through the tokenizer's own chat template only, the same for training, sampling and evaluation.

A prompt is the template's text up to where the assistant speaks, plus ``chat.generation_suffix``. A demonstration is
that same prompt, then the solution's text tokenised by itself (as if it had been sampled), then the token with which
the template ends the assistant's turn. What is trained is said by ``trained``, never by a token id, so a tokenizer
whose padding token is its stop token is no special case.

A tokenizer without a chat template (a base model) gets a plain one: the system text and the turns with an empty line
between them, then a newline; ``has_chat_template`` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from truestep.records import Demonstration, Message, Problem, Prompt, Role
from truestep.settings import ChatSettings, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_PLACE = "PLACEOFTHESOLUTION"  # stands for the assistant's text while the template is looked at


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False where prompts are rendered with the plain template described above."""
    return getattr(tokenizer, "chat_template", None) is not None


def prompt_messages(problem: Problem, chat: ChatSettings) -> tuple[Message, ...]:
    """The turns of the prompt: ``chat.user`` around a bare problem text, ``chat.system`` where the row has none."""
    messages = problem.messages
    if not problem.meta.get("turns_given"):
        last = messages[-1]
        messages = (*messages[:-1], Message(role=last.role, content=chat.user.replace("{problem}", last.content)))
    if chat.system and messages[0].role != "system":
        messages = (Message(role="system", content=chat.system), *messages)
    return messages


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, chat: ChatSettings) -> Prompt:
    """The problem as the token ids that every sample of it starts from.

    Raises SettingsError where a text holds a special token, or a character that the tokenizer does not know.
    """
    messages = prompt_messages(problem, chat)
    for message in messages:
        _checked_ids(tokenizer, problem, "problem", message.content)
    ids = _bos(tokenizer) + _ids(tokenizer, _render(tokenizer, problem, messages))
    return Prompt(problem=problem, token_ids=(*ids, *_ids(tokenizer, chat.generation_suffix)))


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, problem: Problem, chat: ChatSettings) -> Demonstration:
    """The prompt, the solution and the stop token; only the solution and the stop token are trained.

    A solution that repeats what the prompt ends with (``<think>``, by the template or by ``generation_suffix``) loses
    that beginning.

    Raises SettingsError as ``encode_prompt``; where there is no solution; where the template writes an answered prompt
    otherwise than an open one; where no stop token would be trained.
    """
    prompt = encode_prompt(tokenizer, problem, chat)
    messages = prompt_messages(problem, chat)
    opening, stop_id = _answered(tokenizer, problem, messages)
    solution = problem.solution
    for start in (opening + chat.generation_suffix, chat.generation_suffix):
        if start and solution.startswith(start):
            solution = solution.removeprefix(start)
            break
    if not solution.strip():
        raise SettingsError(f"{_where(problem)}: solution: expected a worked solution to train on, got none")
    solution_ids = _checked_ids(tokenizer, problem, "solution", solution)
    num_prompt, num_trained = len(prompt.token_ids), len(solution_ids) + 1
    return Demonstration(
        problem_id=problem.id,
        token_ids=(*prompt.token_ids, *solution_ids, stop_id),
        roles=(*prompt_roles(tokenizer, prompt, chat), *[Role.ASSISTANT] * num_trained),
        trained=(*[False] * num_prompt, *[True] * num_trained),
        num_prompt_tokens=num_prompt,
    )


def prompt_roles(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: ChatSettings) -> tuple[Role, ...]:
    """Who wrote each token of a prompt; a token that straddles two turns goes with its first character."""
    messages = prompt_messages(prompt.problem, chat)
    text = _render(tokenizer, prompt.problem, messages)
    owner = [Role.TEMPLATE] * len(text)
    position = 0
    for message in messages:
        content = message.content if message.content in text else message.content.strip()  # some templates strip
        start = text.find(content, position)
        if start >= 0:
            position = start + len(content)
            owner[start:position] = [_ROLES[message.role]] * len(content)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    roles = [owner[start] if start < end else Role.TEMPLATE for start, end in offsets]
    roles = [Role.TEMPLATE] * len(_bos(tokenizer)) + roles
    return tuple(roles + [Role.TEMPLATE] * (len(prompt.token_ids) - len(roles)))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_eos: int | Sequence[int] | None = ()) -> tuple[int, ...]:
    """The tokens at which sampling stops: what ends a turn in the chat template, the tokenizer's and the model's eos.

    Raises SettingsError where there is none.
    """
    found = []
    if has_chat_template(tokenizer):
        problem = Problem(id="stop token", messages=(Message(role="user", content="1+1=?"),), answer="2")
        found.append(_answered(tokenizer, problem, problem.messages)[1])
    eos = [tokenizer.eos_token_id, *([model_eos] if isinstance(model_eos, int) else model_eos or ())]
    found += [int(token) for token in eos if token is not None]
    if not found:
        raise SettingsError("the tokenizer has no eos token and no chat template, so nothing would ever stop a sample")
    return tuple(dict.fromkeys(found))


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """A completion as the grader reads it: without special tokens, its spaces as they were."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _render(tokenizer: Any, problem: Problem, messages: Sequence[Message], answer: str | None = None) -> str:
    """The text of the turns: open for the assistant, or, given an answer, with the assistant's turn closed."""
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
        raise SettingsError(f"{_where(problem)}: messages: the chat template refuses these turns: {reason}") from None


def _answered(tokenizer: Any, problem: Problem, messages: Sequence[Message]) -> tuple[str, int]:
    """What the template itself puts before the assistant's text when it opens the turn (``<think>``), and the token
    with which it ends the turn."""
    prompt = _render(tokenizer, problem, messages)
    before, _, after = _render(tokenizer, problem, messages, _PLACE).partition(_PLACE)
    if not (prompt.startswith(before) or before.startswith(prompt)):
        raise SettingsError(
            f"{_where(problem)}: messages: the chat template writes these turns differently once they are answered, "
            "so a demonstration could not start with the prompt that is sampled from: use one that keeps earlier turns"
        )
    ids = _ids(tokenizer, after)
    if not ids or ids[0] not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        found = repr(after[:20]) if after else "nothing"
        raise SettingsError(
            f"the chat template ends the assistant's turn with {found}, which is no special token, so no stop token "
            "would be trained: end it with the eos token, e.g. {{ message['content'] + eos_token }}"
        )
    return prompt[len(before) :], ids[0]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _bos(tokenizer: Any) -> list[int]:
    """A chat template writes its own bos; the plain one takes it from tokenizers that start every text with it."""
    if has_chat_template(tokenizer) or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def _checked_ids(tokenizer: Any, problem: Problem, field: str, text: str) -> list[int]:
    """A special token in a text would end a turn inside it; an unknown character would be trained on as <unk>."""
    where = f"{_where(problem)}: {field}"
    for token in tokenizer.all_special_tokens:
        if token in text:
            raise SettingsError(
                f'{where}: expected plain text, got the tokenizer\'s special token "{token}": remove it'
            )
    ids = _ids(tokenizer, text)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        unknown = next((c for c in text if tokenizer.unk_token_id in _ids(tokenizer, c)), text[:60])
        raise SettingsError(
            f"{where}: expected text that the tokenizer knows, got the character {unknown!r}: replace it"
        )
    return ids


def _where(problem: Problem) -> str:
    return problem.row or problem.id
