"""The settings of a data set, ``[data.NAME]``, and of the data sets of a stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from truestep.errors import did_you_mean
from truestep.frozen import Frozen

Checker = Literal["math", "exact", "integer", "choice", "countdown"]  # the functions: grade.score.CHECKERS
CHECKERS: tuple[Checker, ...] = get_args(Checker)
OVERLONG_SHARE = 0.05

T = TypeVar("T")


def _is_list(value: Any) -> str:
    return "union-several" if isinstance(value, list | tuple) else "union-one"


# A text, or a list. The tags keep the faults of one apart from those of the other.
_Several = Annotated[tuple[T, ...], Tag("union-several")]
OneOrSeveral = Annotated[Annotated[str, Tag("union-one")] | _Several[T], Discriminator(_is_list)]

# The columns that a data set can have, by our names, and what they mean. A row has one of the first four.
COLUMN_MEANINGS = {
    "problem": "the question, as text; chat.user makes a turn of it",
    "prompt": "the question as text, or the turns of the prompt",
    "messages": "the turns of a dialogue; an assistant's turn at the end is the solution",
    "text": "a bare text, which only SFT can train on",
    "answer": "the gold answer: text or a number",
    "solution": "a worked solution: text, or a list with one assistant's turn",
    "reasoning_content": "the thought before the solution",
    "system": "the system turn of this row, instead of chat.system",
    "tools": "descriptions of tools for the chat template: a list of objects, or its JSON text",
    "id": "a unique name of the row: text or an integer; by default FILE-NUMBER",
    "checker": "what compares an answer with the gold answer; by default math",
    "choices": "the choices of the checker choice; the answer is a letter, a number from 1 or the text of one",
    "numbers": "the integers that the checker countdown must use",
    "target": "the integer that countdown must reach; in verl's layout, a list with the solution as one turn",
    "reward_model": 'verl\'s gold answer: {"style": "rule", "ground_truth": ANSWER}',
}
DATA_COLUMNS = tuple(COLUMN_MEANINGS)


class DataSettings(Frozen):
    source: OneOrSeveral[str]
    """A file, a folder, a pattern, a list of files, hub:ORG/NAME, procedural:TASK or reasoning_gym:TASK.
    Example: ``source = "rows.jsonl"``"""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns: our name = the data's. A part of a column is named with a dot.
    Example: ``columns = { problem = "question", answer = "extra_info.answer" }``"""
    train_turns: Literal["all", "last"] = "all"
    """Which of a dialogue's assistant turns SFT trains on. Example: ``train_turns = "last"``"""
    overlong_share: float = Field(OVERLONG_SHARE, ge=0, lt=1)
    """The largest share of prompts that RL may leave out because they are too long. Tests leave out none.
    Example: ``overlong_share = 0.1``"""
    split: str = "train"
    """The split of a folder, a hub data set or a generated task. Example: ``split = "test"``"""
    seed: Annotated[int, Field(ge=0)] | Literal["run"] = "run"
    """The seed of generated problems. "run": the run's seed. Example: ``seed = 0``"""
    skip: int = Field(0, ge=0)
    """How many rows at the start are left out. Example: ``skip = 500``"""
    limit: int | Literal["all"] = "all"
    """How many rows are used. Generated problems need a number. Example: ``limit = 1000``"""
    checker: Literal["auto"] | Checker = "auto"
    """What compares an answer with the gold answer. "auto": a row's own, otherwise "math".
    Example: ``checker = "integer"``"""
    options: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)
    """Options of a generated task, or config = "SUBSET" of a hub data set.
    Example: ``options = { length = 6 }``"""

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if not self.source:
            raise ValueError("source is empty; set a file, a folder or a list of files")
        return self

    @model_validator(mode="after")
    def _known_columns(self) -> Self:
        for name in self.columns:
            if name not in DATA_COLUMNS:
                known = ", ".join(DATA_COLUMNS) + did_you_mean(name, list(DATA_COLUMNS))
                raise ValueError(f"columns.{name}: expected our name of a column, one of {known}")
        return self

    @model_validator(mode="after")
    def _limit_positive(self) -> Self:
        if self.limit != "all" and self.limit < 1:
            raise ValueError('limit must be at least 1, or "all"')
        return self


class DataShare(Frozen):
    """One of several data sets of a stage. The weights are the shares of a step's sequences or prompts."""

    name: str
    """The name of a data set. Example: ``name = "train"``"""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of a step's sequences (SFT) or prompts (RL), relative to the others.
    Example: ``weight = 2``"""
