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

# The columns that a data set can have, by our names. A row has one of the first four.
DATA_COLUMNS = (
    "problem", "prompt", "messages", "text", "answer", "solution", "reasoning_content", "system", "tools", "id",
    "checker", "choices", "numbers", "target", "reward_model",
)  # fmt: skip


class DataSettings(Frozen):
    # procedural:TASK | reasoning_gym:TASK | hub:org/name | a file, folder or pattern (*.jsonl) | a list of files
    source: OneOrSeveral[str]
    columns: dict[str, str] = Field(
        default_factory=dict
    )  # our name of a column = the data's, e.g. answer = "label"
    train_turns: Literal["all", "last"] = "all"  # of a dialogue's assistant turns
    # The largest share of prompts that may be left out of RL because they are too long. None is left out of tests.
    overlong_share: float = Field(OVERLONG_SHARE, ge=0, lt=1)
    split: str = "train"
    seed: Annotated[int, Field(ge=0)] | Literal["run"] = "run"  # for procedural problems
    skip: int = Field(0, ge=0)
    limit: int | Literal["all"] = "all"
    checker: Literal["auto"] | Checker = "auto"
    options: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)

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
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
