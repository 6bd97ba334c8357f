"""Says when training is worthless although it runs: nothing can be learned, or what was learned is lost.

A stage's metrics are judged after every step. Each kind of warning is given once for each stage. The thresholds
come from right runs: the 1,340 stages of the cells and trials in results/study (717 of them RL), and recipes/demo.toml.
Held by: tests/contract/test_watch.py"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Steps that are judged together. Without a mixed group there were at most 7 steps in a row (in trials with twice the
# chosen learning rate; 4 in cells), so 10 are no accident. A shorter stage is judged by all of its steps.
WINDOW = 10
# A new model's loss is above ln V, by 0.04 nats (the built-in model). After ten steps of the demo it is 0.4 below.
ABOVE_UNIFORM = 0.1
# The lowest entropy of a right RL stage was 0.23 of its start (UFT); of all other methods, 0.51.
COLLAPSED = 0.1
# A stage that solves nearly everything has little entropy and is right.
SOLVED = 0.9
# The mean reward of ten steps was at most 3.2 standard errors below that of the first ten (cells; trials: 4.7).
ERRORS_BELOW = 5.0

Row = Mapping[str, float]
_KEPT = (
    "reward", "reward_std", "unscored", "mixed_groups", "solved", "completions/truncated", "entropy", "nll", "grad_norm",
)  # fmt: skip


class WorthlessError(RuntimeError):
    """Raised by --strict, after saving, for a stage that is worthless. Its message says why."""


@dataclass(kw_only=True)
class Watch:
    """Judges one stage. ``vocabulary`` is the number of tokens that the model can predict. ``is_own`` is True if
    only samples of the step are trained on, and ``is_steady`` if they are sampled in the same way in all steps."""

    stage: str
    kind: str
    num_steps: int
    vocabulary: int
    is_own: bool = True
    is_steady: bool = True
    num_seen: int = 0
    first: list[Row] = field(default_factory=list)  # of the first and the last steps, at most WINDOW each
    last: list[Row] = field(default_factory=list)
    jumps: float = 0.0  # sum of the squared differences of the rewards of neighboring steps
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def see(self, step: int, metrics: Row) -> list[dict[str, Any]]:
        """Take a step's metrics. Return the new warnings, each with stage, kind, step and text. A warning whose reason
        has gone since gets ``until``, the last step at which it held."""
        row = {key: metrics[key] for key in _KEPT if key in metrics}
        if self.last and "reward" in row and "reward" in self.last[-1]:
            self.jumps += (row["reward"] - self.last[-1]["reward"]) ** 2
        self.num_seen += 1
        self.first = [*self.first, row] if self.num_seen <= WINDOW else self.first
        self.last = [*self.last, row][-WINDOW:]
        new: list[dict[str, Any]] = []
        size = min(WINDOW, self.num_steps)
        if self.num_seen >= size:
            last, given = self.last[-size:], {w["kind"]: w for w in self.warnings}
            for kind, judge in (_OF_RL if self.kind == "rl" else _OF_SFT).items():
                if kind in given and judge(self, last):
                    given[kind].pop("until", None)
                elif kind in given:
                    given[kind].setdefault("until", step - 1)
            for kind, judge in (_OF_RL if self.kind == "rl" else _OF_SFT).items():
                if kind not in given and (text := judge(self, last)):
                    new.append({"stage": self.stage, "kind": kind, "step": step, "text": text})
                    break  # one reason for one state: an equal reward leaves no group mixed
        self.warnings += new
        return new


def _equal(watch: Watch, last: Sequence[Row]) -> str:
    if not _learns_nothing(watch, last) or any(row.get("reward_std") != 0 for row in last):
        return ""
    if all(row["unscored"] == 1 for row in last):
        return f"no sample had a reward in {_steps(last)}; check the reward function"
    rewards = sorted({row["reward"] for row in last})
    value = (
        f"{rewards[0]:g}"
        if len(rewards) == 1
        else f"the same within each step, {rewards[0]:g} to {rewards[-1]:g}"
    )
    return f"all rewards were {value} in {_steps(last)}, so nothing can be learned; use problems that are sometimes solved"


def _unmixed(watch: Watch, last: Sequence[Row]) -> str:
    if not _learns_nothing(watch, last) or any(row.get("mixed_groups") != 0 for row in last):
        return ""
    if all(row.get("reward_std") == 0 for row in last):
        return ""  # see above
    return (
        f"no group had different rewards in {_steps(last)}, so no sample had an advantage; use problems that are "
        "sometimes solved, or more samples_per_prompt"
    )


def _learns_nothing(watch: Watch, last: Sequence[Row]) -> bool:
    """Return whether equal rewards leave nothing to learn: demonstrations and stored samples can still teach."""
    return watch.is_own or all(row.get("grad_norm") == 0 for row in last)


def _cut(watch: Watch, last: Sequence[Row]) -> str:
    if any(row.get("completions/truncated") != 1 for row in last):
        return ""
    return f"every completion was cut in {_steps(last)}; set a larger sampling.max_new_tokens, or train the model to stop"


def _collapsed(watch: Watch, last: Sequence[Row]) -> str:
    start, now = _ends(watch, "entropy")
    if (
        not now
        or mean(row.get("solved", 0.0) for row in last) >= SOLVED
        or mean(now) >= COLLAPSED * mean(start)
    ):
        return ""
    return (
        f"the entropy collapsed from {mean(start):.3g} to {mean(now):.3g} nats, so the samples of a group are the same; "
        "set a smaller optimizer.lr, or method_options.entropy_bonus"
    )


def _below_start(watch: Watch, last: Sequence[Row]) -> str:
    start, now = _ends(watch, "reward")
    if len(now) < WINDOW or not watch.is_steady:
        return ""
    # From the differences of neighboring steps, so that learning is not counted as noise.
    error = math.sqrt(watch.jumps / (2 * (watch.num_seen - 1)) * 2 / WINDOW)
    if mean(start) - mean(now) <= ERRORS_BELOW * error:
        return ""
    return (
        f"the reward fell from {mean(start):.3f} to {mean(now):.3f} (means of {WINDOW} steps, standard error {error:.3f}); "
        "set a smaller optimizer.lr"
    )


def _above_uniform(watch: Watch, last: Sequence[Row]) -> str:
    uniform, now = math.log(watch.vocabulary), mean(row.get("nll", 0.0) for row in last)
    if now <= uniform + ABOVE_UNIFORM:
        return ""
    return (
        f"the loss, {now:.2f} nats in {_steps(last)}, is above that of a uniform guess, ln {watch.vocabulary} = "
        f"{uniform:.2f}; set a smaller optimizer.lr, and check the data and the model"
    )


_OF_RL: Mapping[str, Callable[[Watch, Sequence[Row]], str]] = {
    "cut": _cut, "equal": _equal, "unmixed": _unmixed, "collapsed": _collapsed, "below": _below_start,
}  # fmt: skip
_OF_SFT: Mapping[str, Callable[[Watch, Sequence[Row]], str]] = {"uniform": _above_uniform}


def _ends(watch: Watch, key: str) -> tuple[list[float], list[float]]:
    """Return a metric's first and last values: WINDOW of each, or fewer that do not overlap in a short stage."""
    size = min(WINDOW, watch.num_steps // 2)
    if not size or watch.num_seen < 2 * size:
        return [], []
    first, last = (
        [row[key] for row in rows if key in row] for rows in (watch.first[:size], watch.last[-size:])
    )
    return (first, last) if len(first) == len(last) == size else ([], [])


def _steps(rows: Sequence[Row]) -> str:
    return f"{len(rows)} steps" if len(rows) > 1 else "the only step"


def mean(values: Any) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
