"""Turns rows into the sequences that SFT trains on: solutions, all turns of dialogues, and bare texts.

A turn of a dialogue is trained on as it would have been sampled: after its own prompt, rendered by the template, with
its own tokens and the token that ends it. Two turns share a sequence only if the tokens of the first one, from its
prompt to its end, are the beginning of the second one's. If not, because the template strips earlier thoughts or
because tokens merge, the turns become separate sequences.
Held by: tests/unit/test_data_dialogues.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from truestep.data.chat import check_text, encode_demonstration, field_of
from truestep.data.problems import each_row
from truestep.errors import UserError
from truestep.records import Demonstration, Problem
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The sequences of a data set that fit, in order. ``num_long`` were left out, ``num_split`` dialogues became
    several sequences, and ``num_cut`` texts were cut into pieces."""

    kept: list[Demonstration]
    num_long: int
    num_split: int
    num_cut: int


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], chat: ChatSettings, context_length: int
) -> Encoded:
    """Return the demonstrations of at most ``context_length`` tokens. Longer ones are left out and never cut, except
    bare texts. Raises UserError if none fits, and BadRows for rows that cannot be encoded."""
    work = partial(encode_row, tokenizer, chat=chat, context_length=context_length)
    rows = [made for _, made in each_row(problems, work)]
    made = [d for row in rows for d in row]
    kept = [d for d in made if len(d.token_ids) <= context_length]
    if made and not kept:
        shortest = min(len(d.token_ids) for d in made)
        raise UserError(
            f"none of the {len(made)} demonstrations fits into {context_length} tokens (the shortest has "
            f"{shortest}); increase model.context_length or use shorter demonstrations"
        )
    several = [bool(p.text) for p, row in zip(problems, rows, strict=True) if len(row) > 1]
    num_cut = sum(several)
    return Encoded(
        kept=kept, num_long=len(made) - len(kept), num_split=len(several) - num_cut, num_cut=num_cut
    )  # fmt: skip


def encode_row(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, chat: ChatSettings, context_length: int
) -> list[Demonstration]:
    """Return the sequences of one row, of which the last has the problem's id. Raises UserError as
    ``encode_demonstration`` does."""
    if problem.text:
        return _pieces(tokenizer, problem, chat, context_length)
    if sum(turn.is_trained for turn in problem.dialogue if turn.role == "assistant") < 2:
        return [encode_demonstration(tokenizer, problem, chat)]
    found: list[Demonstration] = []
    for i, turn in enumerate(problem.dialogue):
        if not turn.is_trained or turn.role != "assistant":
            continue
        prompt, dialogue = problem.dialogue[:i], problem.dialogue[: i + 1]
        up_to = replace(problem, messages=prompt, dialogue=dialogue, solution=turn.content)
        made = encode_demonstration(tokenizer, up_to, chat)
        if found and made.token_ids[: len(found[-1].token_ids)] == found[-1].token_ids:
            last = found.pop()
            spans = (*last.earlier, (last.num_prompt_tokens, len(last.token_ids)))
            made = replace(made, earlier=spans)
        elif found:  # a problem has one demonstration for methods that sample, which is its last turn
            found[-1] = replace(found[-1], problem_id=f"{problem.id}#{i}")
        found.append(made)
    return found


def _pieces(tokenizer: Any, problem: Problem, chat: ChatSettings, context_length: int) -> list[Demonstration]:
    """Return a bare text as sequences of at most ``context_length`` tokens. It begins with the bos token, if the
    tokenizer writes one, and ends with the eos token. Every token but the first is trained on once: a piece begins
    with the last token of the piece before."""
    ids = list(tokenizer(problem.text, add_special_tokens=False)["input_ids"])
    check_text(tokenizer, problem.row or problem.id, field_of(problem, "text"), problem.text, ids, chat)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    ids = [*([bos] if starts else []), *ids, *([] if eos is None else [eos])]
    cuts = range(0, max(1, len(ids) - 1), context_length - 1)
    pieces = [tuple(ids[start : start + context_length]) for start in cuts]
    if len(pieces[0]) < 2:
        raise UserError(
            f"{problem.row or problem.id}: text: expected at least two tokens, got one; remove the row"
        )
    names = [*(f"{problem.id}#{i}" for i in range(len(pieces) - 1)), problem.id]
    return [
        Demonstration(problem_id=name, token_ids=piece, num_prompt_tokens=1)
        for name, piece in zip(names, pieces, strict=True)
    ]
