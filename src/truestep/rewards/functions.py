"""Reward functions that ship with truestep. They are ordinary functions, which you can copy and change.
Held by: tests/rewards/test_functions.py"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from truestep.errors import UserError
from truestep.records import RewardInput, Verdict


def format_reward(
    samples: Sequence[RewardInput],
    *,
    tags: Sequence[str] = ("think",),
    opened: bool = False,
    pattern: str = "",
) -> list[float]:
    """Return 1 if the completion has the required form, otherwise 0. Each tag in ``tags`` must open and close
    once, in this order, with text inside. If the last tag is "think", text must follow it. ``opened`` says
    that the first opening tag is at the end of the prompt. ``pattern``, a regular expression for the whole
    text ("." matches line breaks), is used instead of ``tags`` if it is given."""
    body = r"\s*".join(rf"<{re.escape(tag)}>.*\S.*</{re.escape(tag)}>" for tag in tags)
    rest = r".*\S\s*" if tags and tags[-1] == "think" else r"\s*"
    try:
        form = re.compile(pattern or rf"\s*{body}{rest}", re.DOTALL)
    except re.error as error:
        raise UserError(f"options.pattern is not a regular expression: {error}") from None
    marks = [] if pattern else [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    start = f"<{tags[0]}>" if opened and not pattern else ""
    texts = [start + sample.completion for sample in samples]
    return [float(form.fullmatch(t) is not None and all(t.count(mark) == 1 for mark in marks)) for t in texts]


def length_reward(
    samples: Sequence[RewardInput],
    *,
    budget: int = 0,
    shape: Literal["linear", "cosine"] = "linear",
    correct_only: bool = True,
) -> list[float | None]:
    """Return a reward that falls from 1 for no tokens to 0 at ``budget`` tokens (0: the limit) or more.
    With ``correct_only``, an incorrect completion gets 0, so that a short wrong answer gains nothing, and an
    unscored completion gets None."""
    if budget < 0 or shape not in ("linear", "cosine"):
        raise UserError(
            'options: budget or shape is not valid; set budget >= 0 and shape = "linear" or "cosine"'
        )
    values: list[float | None] = []
    for sample in samples:
        used = min(1.0, len(sample.completion_ids) / (budget or sample.limit))
        value = 1.0 - used if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * used))
        if correct_only and sample.verdict is None:
            raise UserError('"length" also needs the reward "checker"; add it, or set correct_only = false')
        known = {Verdict.CORRECT: value, Verdict.INCORRECT: 0.0, Verdict.UNSCORED: None}
        values.append(known[sample.verdict] if correct_only and sample.verdict else value)
    return values


def overlong_penalty(
    samples: Sequence[RewardInput], *, fraction: float = 0.2, penalty: float = 0.5
) -> list[float]:
    """Return a penalty that falls linearly from 0 to −``penalty`` over the last ``fraction`` of the length
    limit. DAPO subtracts up to 1 from rewards of ±1, which corresponds to ½ for rewards of 0 and 1.
    Source: DAPO (arXiv 2503.14476), equation 13"""
    if not 0 < fraction <= 1:
        raise UserError("options.fraction must be greater than 0 and at most 1")
    values = []
    for sample in samples:
        buffer = fraction * sample.limit
        over = len(sample.completion_ids) - (sample.limit - buffer)
        values.append(-penalty * min(1.0, over / buffer) if over > 0 else 0.0)
    return values
