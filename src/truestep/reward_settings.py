"""The rewards of a recipe, set as ``[[stages.rewards]]`` or, for a single one, ``reward = "NAME"``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from truestep.errors import did_you_mean
from truestep.frozen import Frozen
from truestep.redaction import INSTEAD, find_secret

# Functions that ship with the package; "checker" and "random" need no child process.
SHIPPED = {
    "format": "truestep.rewards.functions:format_reward",
    "length": "truestep.rewards.functions:length_reward",
    "overlong": "truestep.rewards.functions:overlong_penalty",
    "judge": "truestep.rewards.judge:judge",
}
BUILT_IN = ("checker", "random", *SHIPPED)
FORM = re.compile(r"(?:[^:]+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
JUDGE_SECONDS = 600.0  # for one batch; long, because a judge waits for a server


class RewardSettings(Frozen):
    """One term of the reward, and the limits of the child processes that compute it."""

    function: str
    """A reward: "checker", "random", "format", "length", "overlong", "judge", FILE.py:FUNCTION or
    PACKAGE.MODULE:FUNCTION. Example: ``function = "reward.py:steps"``"""
    weight: float = 1.0
    """The factor of this reward in the sum. 0: it is only logged. Example: ``weight = 0.2``"""
    name: str = ""
    """The name in metrics and messages. "": the function's name. Example: ``name = "steps"``"""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function. "${NAME}" stands for an environment variable.
    Example: ``options = { most = 5 }``"""
    timeout_seconds: float = Field(60.0, gt=0)
    """The time limit of one call, which is for one batch of samples. The judge's default is 600.
    Example: ``timeout_seconds = 20``"""
    memory_mb: int = Field(4096, ge=64)
    """The limit on resident memory of a worker and all processes that it has started (Linux).
    Example: ``memory_mb = 8192``"""
    workers: int = Field(1, ge=1)
    """How many child processes compute the reward, on each rank. Example: ``workers = 4``"""
    batch_size: int = Field(64, ge=1)
    """The largest number of samples in one call. Example: ``batch_size = 16``"""
    max_failure_share: float = Field(0.05, ge=0, le=1)
    """The largest share of a step's samples that may fail. A larger share stops the run.
    Example: ``max_failure_share = 0``"""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("function"), str):
            return raw
        patience = {"timeout_seconds": JUDGE_SECONDS} if raw["function"] == "judge" else {}
        return {**patience, **raw, "name": raw.get("name") or raw["function"].rpartition(":")[2]}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.function not in BUILT_IN and not FORM.fullmatch(self.function):
            raise ValueError(
                f'"{self.function}" is not a reward; use one of {", ".join(BUILT_IN)}, or name a function as '
                "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION" + did_you_mean(self.function, BUILT_IN)
            )
        if self.function in ("checker", "random") and self.options:
            raise ValueError(f'"{self.function}" takes no options; remove the options that are set')
        if not NAME.fullmatch(self.name):
            raise ValueError(f'name = "{self.name}" is not valid; use only letters, digits, "_", "-" and "."')
        if (key := find_secret(self.options, "options")) is not None:
            raise ValueError(f"{key} looks like a secret, and settings are written to files; {INSTEAD}")
        return self


def reward_entries(reward: str, rewards: Sequence[RewardSettings]) -> tuple[RewardSettings, ...]:
    """Return ``rewards`` or, if empty, the reward named ``reward``. Raises ValueError for a contradiction."""
    entries = tuple(rewards) or (RewardSettings(function=reward),)
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f'two rewards are called "{twice[0]}"; set a different name for each')
    for entry in entries:
        needs_verdict = entry.function == "length" and entry.options.get("correct_only", True)
        if needs_verdict and "checker" not in [e.function for e in entries]:
            raise ValueError(
                '"length" also needs the reward "checker"; add it, or set options.correct_only = false'
            )
    return entries
