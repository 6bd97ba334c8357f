"""Plans: what is sampled for a prompt, round by round.

A plan is a pure function of the prompt's history, so that it can be replayed after a kill: no generator objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truestep.records import Group, Kind, Prompt


@dataclass(frozen=True, kw_only=True)
class Round:
    """``num_samples`` completions to be sampled of ``kind``, after ``prefix_fraction`` of the demonstration (PREFIX),
    or under ``hint`` in the prompt (HINT). With ``context_only`` a prefix is not trained."""

    num_samples: int
    kind: Kind = Kind.ON
    prefix_fraction: float = 0.0
    hint: str = ""
    context_only: bool = False


# (prompt, the groups of earlier rounds, samples per prompt) → the next round, or None when the prompt is done.
Plan = Callable[[Prompt, Sequence[Group], int], Round | None]


def own(prompt: Prompt, history: Sequence[Group], samples_per_prompt: int) -> Round | None:
    """All samples from the current policy, in one round: every on-policy method."""
    return None if history else Round(num_samples=samples_per_prompt)


def demonstration(prompt: Prompt, history: Sequence[Group], samples_per_prompt: int) -> Round | None:
    """Nothing is sampled: the demonstration alone is trained on (SFT)."""
    return None


PLANS: dict[str, Plan] = {"own": own, "demonstration": demonstration}
