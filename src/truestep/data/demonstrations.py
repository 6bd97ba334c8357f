"""Problems with solutions → token sequences to imitate. What does not fit is counted and named, never cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.data.chat import encode_demonstration
from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.records import Demonstration, Problem
from truestep.settings import ChatSettings, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """A demonstration that was left out because the model cannot see it whole."""

    problem_id: str
    row: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """What can be trained on, and what was left out; together they are every row of the source."""

    kept: tuple[Demonstration, ...]
    dropped: tuple[TooLong, ...]


def load_demonstrations(
    name: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatSettings,
    *,
    context_length: int,
    seed: int,
    base_dir: Path,
) -> Demonstrations:
    """The demonstrations of ``[data.NAME]``; every row must have a solution.

    Raises UserError as ``load_problems`` and ``encode_demonstration``, and where none fits.
    """
    problems = load_problems(name, settings, seed=seed, base_dir=base_dir, needs=("solution",))
    return encode_demonstrations(problems, tokenizer, chat, context_length=context_length)


def encode_demonstrations(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatSettings,
    *,
    context_length: int,
) -> Demonstrations:
    """Those of at most ``context_length`` tokens (prompt, solution and stop token), in order, and the others'
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
            f"{shortest}: raise model.context_length or use shorter ones"
        )
    return Demonstrations(kept=tuple(kept), dropped=tuple(dropped))
