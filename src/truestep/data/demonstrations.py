"""Problems with solutions → token sequences to train on. What does not fit is counted and named, never
cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truestep.data.chat import encode_demonstration
from truestep.errors import UserError
from truestep.records import Demonstration, Problem
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """A demonstration that was left out because it is longer than the model's context."""

    problem_id: str
    row: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """What can be trained on, and what was left out; together they are every row of the source."""

    kept: tuple[Demonstration, ...]
    dropped: tuple[TooLong, ...]


def encode_demonstrations(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatSettings,
    *,
    context_length: int,
) -> Demonstrations:
    """Those of at most ``context_length`` tokens (with prompt and stop token), in order, and the others'
    names."""
    kept, dropped = [], []
    for problem in problems:
        demonstration = encode_demonstration(tokenizer, problem, chat)
        num_tokens = len(demonstration.token_ids)
        if num_tokens <= context_length:
            kept.append(demonstration)
        else:
            dropped.append(TooLong(problem_id=problem.id, row=problem.row, num_tokens=num_tokens))
    if dropped and not kept:
        shortest = min(d.num_tokens for d in dropped)
        raise UserError(
            f"none of the {len(dropped)} demonstrations fits into {context_length} tokens, the shortest has "
            f"{shortest}; raise model.context_length or use shorter ones"
        )
    return Demonstrations(kept=tuple(kept), dropped=tuple(dropped))
