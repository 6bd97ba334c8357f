"""What an optimizer step of RL was given: samples, rewards, log-probabilities and micro-batches, as arrays.

Shapes: M tokens of all completions (row by row), R rows, K columns (M tokens, prompt tokens, R entropies).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from truestep.audit.measure.rl.cases import RLCase


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step. ``micro`` has the number of each row's micro-batch, counted over all ranks, or −1 if the row is
    not in this step. Log-probabilities are at the temperature of the fit. ``old`` is the policy at the start of
    the rollout batch, ``stale`` the policy at the start of the one before."""

    case: RLCase
    micro: np.ndarray  # R
    rank: np.ndarray  # R
    num_ranks: int
    now: np.ndarray  # M
    old: np.ndarray  # M
    stale: np.ndarray  # M
    engine: np.ndarray  # M
    reference: np.ndarray  # M
    initial: np.ndarray  # M: the policy before the first step

    @cached_property
    def lengths(self) -> np.ndarray:
        """R: tokens of each completion."""
        return np.array([len(row.completion) for row in self.case.rows])

    @cached_property
    def row(self) -> np.ndarray:
        """M: the row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def position(self) -> np.ndarray:
        """M: the place of each token in its completion."""
        return np.concatenate([np.arange(n) for n in self.lengths])

    @cached_property
    def is_stop(self) -> np.ndarray:
        """M: whether the token is the stop token of its completion."""
        ends = self.position == self.lengths[self.row] - 1
        return np.asarray(ends & ~np.array([row.truncated for row in self.case.rows])[self.row])

    @cached_property
    def rewards(self) -> np.ndarray:
        return np.array([row.reward for row in self.case.rows])

    @cached_property
    def groups(self) -> np.ndarray:
        return np.array([row.group for row in self.case.rows])

    @cached_property
    def truncated(self) -> np.ndarray:
        return np.array([row.truncated for row in self.case.rows])

    @cached_property
    def present(self) -> np.ndarray:
        """R: whether the row is in this step."""
        return self.micro >= 0

    @cached_property
    def prompt_tokens(self) -> list[int]:
        """Prompt tokens of each group that have a column (all but the first)."""
        first = {row.group: len(row.prompt) - 1 for row in reversed(self.case.rows)}
        return [first[group] for group in sorted(first)]

    @property
    def size(self) -> int:
        """K."""
        return len(self.row) + sum(self.prompt_tokens) + len(self.lengths)

    def of_row(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over each row of values [M]. Shape: R."""
        return np.bincount(self.row, weights=values, minlength=len(self.lengths))
