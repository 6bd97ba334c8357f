"""Rows as text, for trainers that make tokens and masks from chats: one word per token, so both agree exactly."""

from __future__ import annotations

import itertools
from typing import Any

END, END_ID = "</s>", 2
# Every answer ends with the end-of-sequence token, which is trained, as in the templates of real models.
ENDED = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    + END
    + "{% endif %} {% endfor %}"
)


def tokenizer(vocabulary: int, template: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {("<pad>", "<s>", END)[i] if i < 3 else f"w{i}": i for i in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": END}
    inputs = ["input_ids", "attention_mask"]  # as tokenizers of decoders have them
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names)
    made.chat_template = template
    return made


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def turns(row: dict[str, list[int]]) -> list[tuple[int, list[int]]]:
    """Return the row's parts in order, as (1 if trained else 0, tokens)."""
    pairs = zip(row["trained"], row["ids"], strict=True)
    return [(on, [i for _, i in part]) for on, part in itertools.groupby(pairs, key=lambda pair: pair[0])]


def messages(row: dict[str, list[int]]) -> list[dict[str, str]]:
    """Return a row as a chat. Untrained tokens are the user's turns, and trained tokens the assistant's. The
    end-of-sequence token is left out, since the template adds it."""
    return [
        {"role": "assistant" if on else "user", "content": words([i for i in part if i != END_ID])}
        for on, part in turns(row)
    ]


def ended(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the row with an end-of-sequence token in place of the last token of every trained part. The
    number of trained tokens stays; tokens after the last trained one, which train nothing, are left out."""
    parts = turns(row)
    while len(parts) > 1 and not parts[-1][0]:
        parts.pop()
    ids = [i for on, part in parts for i in ([*part[:-1], END_ID] if on else part)]
    return {"ids": ids, "trained": [on for on, part in parts for _ in part]}
