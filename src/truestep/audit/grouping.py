"""Was the optimizer stepped when it was asked to be, on all trained rows, each as often as there are epochs?

Rows are counted, never forward passes: how many of them a pass holds does not change the step, and a row
without trained tokens adds nothing to it. Frameworks shuffle: a step is told by its number of rows, not by
which they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from truestep.audit.causes import Cause
from truestep.audit.observe import Observation, Step


def find(run: Observation) -> list[Cause]:
    """What is wrong with it, the cause before its consequence."""
    found: list[Cause] = []
    if any(not np.isfinite(s.after).all() for s in run.steps):
        return found  # changes of what is not a number are no steps
    epochs, untrained = run.asked.epochs, set(run.asked.untrained_rows)
    lost_whole = False
    seen = Counter(row for s in run.steps for m in s.microbatches for row in m.rows)
    trained = [row for row in range(run.asked.num_rows) if row not in untrained]
    lost = sum(max(0, epochs - seen[row]) for row in trained)
    packed = any(len(line) > 1 for s in run.steps for m in s.microbatches for line in m.lines)
    never = sum(not seen[row] for row in untrained)
    if not packed:
        sizes = [_rows_of(step) for step in run.steps]
        asked = _asked_sizes(run, run.asked.num_rows)
        filtered = _asked_sizes(run, run.asked.num_rows - never)  # left out before rows were put into windows
        if sizes != filtered and not _skipped(sizes, asked, never * epochs):
            lost_whole = sizes == [
                n for n in filtered if n == run.asked.accumulation * run.asked.rows_per_microbatch
            ]
            text = f"steps were taken after {_listed(sizes)} rows, asked for were {_listed(filtered)}"
            found.append(("grouping", text))
    twice = sum(max(0, seen[row] - epochs) for row in trained)
    if lost:
        cause = "data_lost", f"data is lost: {lost} rows reached no optimizer step"
        found.insert(0 if lost_whole else len(found), cause)
    elif twice > _evened_out(run, run.asked.num_rows - never):
        found.append(("data_lost", f"{twice} rows were trained more often than asked"))
    return found


def _rows_of(step: Step) -> int:
    """On the busiest rank: samplers may give the others rows twice."""
    return max(Counter(m.rank for m in step.microbatches for _ in m.rows).values())


def _skipped(sizes: Sequence[int], asked: Sequence[int], untrained: int) -> bool:
    """Whether the windows are the asked ones but for rows without trained tokens that were passed over."""
    missing = [a - s for a, s in zip(asked, sizes, strict=False)]
    return len(sizes) == len(asked) and min(missing) >= 0 and sum(missing) <= untrained


def _num_ranks(run: Observation) -> int:
    return 1 + max(m.rank for s in run.steps for m in s.microbatches)


def _evened_out(run: Observation, num_rows: int) -> int:
    """Rows that a sampler may repeat, so that all ranks have equally many batches."""
    return -num_rows % (_num_ranks(run) * run.asked.rows_per_microbatch) * run.asked.epochs


def _asked_sizes(run: Observation, num_rows: int) -> list[int]:
    """Rows of each step, on the busiest rank: whole windows and what is left at the end of an epoch."""
    size = run.asked.rows_per_microbatch
    mine = min(num_rows, size * math.ceil(math.ceil(num_rows / size) / _num_ranks(run)))
    window = run.asked.accumulation * size
    whole, rest = divmod(mine, window)
    return ([window] * whole + ([rest] if rest else [])) * run.asked.epochs


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:6])) + (" …" if len(sizes) > 6 else "")
