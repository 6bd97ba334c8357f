"""Chat templates that a recipe can choose by name, for tokenizers without one (base models).

The texts are our own, in the layouts that are known by these names. Each ends the assistant's turn with a token that
the tokenizer has, so that a model learns to stop. The chosen template is exported with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from truestep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST = "loop.last and message['role'] == 'assistant'"
_EACH = "{% for message in messages %}"
# The turns with an empty line between them, and a newline before the answer.
_PLAIN = (
    _EACH + "{{ message['content'] }}{% if " + _LAST + " %}{{ eos_token }}"
    "{% elif loop.last or (loop.revindex == 2 and messages[-1]['role'] == 'assistant') %}{{ '\\n' }}"
    "{% else %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)


def _titled(user: str, assistant: str, after: str) -> str:
    """A title before each turn; a system turn has none."""
    return (
        _EACH
        + "{% if message['role'] == 'assistant' %}{{ '"
        + assistant
        + "' + message['content'] + eos_token + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '" + user + "' + message['content'] + '" + after + "' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + assistant + "' }}{% endif %}"
    )


def _headed(before: str, between: str, after: str) -> str:
    """A header with the role before each turn, in special tokens."""
    return (
        _EACH
        + "{{ '"
        + before
        + "' + message['role'] + '"
        + between
        + "' + message['content'] + '"
        + after
        + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + before + "assistant" + between + "' }}{% endif %}"
    )


TEMPLATES: dict[str, str] = {
    "plain": _PLAIN,
    "alpaca": _titled("### Instruction:\\n", "### Response:\\n", "\\n\\n"),
    "user-assistant": _titled("User: ", "Assistant:\\n", "\\n\\n"),
    "chatml": _headed("<|im_start|>", "\\n", "<|im_end|>\\n"),
    "llama3": _headed("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>"),
}
_NEEDS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def fitting(tokenizer: Any) -> list[str]:
    """Return the names of the templates whose tokens the tokenizer has."""
    return [name for name in TEMPLATES if not _missing(tokenizer, name)]


def _missing(tokenizer: Any, name: str) -> list[str]:
    if (wanted := _NEEDS.get(name)) is None:
        return [] if tokenizer.eos_token else ["an eos token"]
    added = tokenizer.get_added_vocab()
    return [token for token in wanted if token not in added]


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str, model: str) -> None:
    """Give the tokenizer the template ``name`` ("model": the one that it has). If it has none, or a token of the
    template is missing, raises UserError, which names the templates that fit."""
    if name == "model":
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                f"model.path = {model!r}: the tokenizer has no chat template, which turns a problem into a prompt; set "
                f"chat.template to one of {', '.join(fitting(tokenizer))}"
            )
        return
    if missing := _missing(tokenizer, name):
        raise UserError(
            f'chat.template = "{name}" needs {", ".join(missing)}, which the tokenizer of model.path = {model!r} does not '
            f"have; set one of {', '.join(fitting(tokenizer)) or 'another model'}"
        )
    # A tokenizer that begins every text with a bos token expects it here, too; a template writes it as text.
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer("")["input_ids"][:1]) == [bos]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATES[name]
