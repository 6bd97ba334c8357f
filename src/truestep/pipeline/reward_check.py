"""Loads every reward of a stage before anything is sampled, and tries it on a row of the stage's data.

Held by: tests/contract/test_user_code.py"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.data.chat import prompt_messages
from truestep.records import Problem, RewardInput, Stop, Verdict
from truestep.rewards.scorer import RewardScorer
from truestep.settings import RlSettings, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_rewards(
    stage: RlSettings,
    problems: Sequence[Problem],
    settings: Settings,
    base_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Load the stage's rewards in their workers, and call each on the first problem, if there is one and the tokenizer
    is known. Raises UserError if a reward cannot be loaded, or fails on the problem's solution and on an empty
    completion. The judge is not called, because its requests can cost money."""
    with tempfile.TemporaryDirectory(prefix="truestep-rewards-") as folder:
        scorer = RewardScorer(
            stage.reward_entries, grade=lambda pairs: [], base=base_dir, folder=Path(folder)
        )
        with scorer:
            if problems and tokenizer is not None:
                scorer.rehearse(list(_trials(stage, problems[0], settings, tokenizer)))


def _trials(
    stage: RlSettings, problem: Problem, settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[RewardInput]:
    has_checker = any(entry.function == "checker" for entry in stage.reward_entries)
    right = problem.solution or problem.answer
    for text, verdict in ((right, Verdict.CORRECT), ("", Verdict.INCORRECT)):
        yield RewardInput(
            problem=problem, messages=prompt_messages(problem, settings.chat), completion=text,
            completion_ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else (),
            stop=Stop.STOP_TOKEN, seed=settings.seed, step=0, sample=0, limit=stage.sampling.max_new_tokens,
            verdict=verdict if has_checker else None,
        )  # fmt: skip
