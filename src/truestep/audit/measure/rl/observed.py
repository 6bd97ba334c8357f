"""Reads what an RL subject wrote, and solves for the coefficient of every token.

Shapes: M tokens of all completions, R rows, K columns (see ``Batch``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from truestep.audit.measure.observations import ObservationError, read_plain
from truestep.audit.measure.rl.batch import Batch
from truestep.audit.measure.rl.cases import RLCase
from truestep.audit.measure.rl.objective import Objective

BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The inner products of the columns at one temperature, with labels at one shift."""

    temperature: float
    shift: int
    gram: np.ndarray  # K, K
    projection: np.ndarray  # K
    logps: np.ndarray  # M
    residual: float  # norm of the part of the gradient that no coefficients explain
    rounding: float  # norm of the error of the same coefficients in the subject's own precision

    @cached_property
    def coefficients(self) -> np.ndarray:
        """K: positive pushes the token's probability up."""
        return -np.linalg.lstsq(self.gram, self.projection, rcond=1e-12)[0]

    @cached_property
    def condition(self) -> float:
        """The condition number of the columns, each scaled to unit length."""
        used = np.diag(self.gram) > 0  # a column is 0 if its tokens have no entropy bonus
        size = np.sqrt(np.diag(self.gram)[used])
        values = np.linalg.eigvalsh(self.gram[np.ix_(used, used)] / np.outer(size, size))
        return math.sqrt(values[-1] / values[0]) if values[0] > 1e-14 * values[-1] else math.inf

    def distance(self, coefficients: np.ndarray) -> float:
        """Return the norm of the gradient that differs between these coefficients [K] and the observed ones."""
        missed = coefficients - self.coefficients
        return math.sqrt(max(0.0, float(missed @ self.gram @ missed)))


@dataclass(frozen=True, kw_only=True)
class RLStep:
    """One optimizer step of all ranks."""

    fits: tuple[Fit, ...]
    norm: float  # of the gradient that was used
    read_back: float  # error of reading it back from the parameters
    finite: bool
    micro: np.ndarray  # R: the number of the row's micro-batch over all ranks, or −1
    rank: np.ndarray  # R
    repeated: int  # rows that are in this step more than once
    sizes: tuple[int, ...]  # micro-batches of each rank
    expected: np.ndarray | None = None  # K, if the subject has a reference for its own objective
    label: str = ""  # what is trained in this step, if the steps of a subject differ

    @cached_property
    def fit(self) -> Fit:
        """The fit with the smallest residual."""
        return min(self.fits, key=lambda fit: fit.residual)

    @property
    def noise(self) -> float:
        """Relative error of a correct step."""
        return (self.fit.rounding + self.read_back) / max(self.norm, 1e-300)


@dataclass(frozen=True, kw_only=True)
class RLObservation:
    """One run of a subject on one case."""

    case: RLCase
    asked: Objective | None = None
    steps: tuple[RLStep, ...] = ()
    engine: tuple[np.ndarray, ...] = ()  # M each, per rollout batch
    reference: np.ndarray | None = None  # M
    versions: dict[str, str] = field(default_factory=dict)
    ranks_differ: float = 0.0
    unmatched: int = 0
    location: str = ""
    not_run: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def batch(self, index: int) -> Batch:
        """Return what step ``index`` was given. Log-probabilities are at the temperature of its best fit."""
        step, size = self.steps[index], self.case.updates
        start = index - index % size
        before = max(0, start - size)
        wanted = step.fit.temperature

        def logps(number: int) -> np.ndarray:
            fits = self.steps[number].fits
            return next(
                (f for f in fits if f.temperature == wanted and f.shift == step.fit.shift), fits[0]
            ).logps

        engine = self.engine[min(index // size, len(self.engine) - 1)] if self.engine else logps(start)
        return Batch(
            case=self.case,
            micro=step.micro,
            rank=step.rank,
            num_ranks=len(step.sizes),
            now=logps(index),
            old=logps(start),
            stale=logps(before),
            engine=engine,
            reference=logps(0) if self.reference is None else self.reference,
            initial=logps(0),
        )


def load(folder: Path, case: RLCase, *, learning_rate: float = 0.0) -> RLObservation:
    """Read all ranks' files. Raises ObservationError if they cannot be read. The files come from the audited
    program, so anything can be in them."""
    try:
        return _load(folder, case)
    except ObservationError:
        raise
    except BROKEN as error:
        raise ObservationError("unreadable", error=f"{type(error).__name__}: {error}"[:200]) from None


def _load(folder: Path, case: RLCase) -> RLObservation:
    if (refused := folder / "not-run.txt").is_symlink() or refused.exists():
        return RLObservation(case=case, not_run=read_plain(refused)[:1000].decode("utf-8", "replace"))
    paths = sorted(folder.glob("rank-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    if not paths:
        raise ObservationError("no_observation")
    ranks = [json.loads(read_plain(path)) for path in paths]
    if len(ranks) != ranks[0]["world_size"]:
        raise ObservationError("ranks_missing", ranks=len(ranks), of=ranks[0]["world_size"], schema=1)
    num_steps = {len(rank["steps"]) for rank in ranks}
    if len(num_steps) > 1:
        raise ObservationError("ranks_disagree", steps=sorted(num_steps))
    first, differ, steps = ranks[0], 0.0, []
    for index in range(num_steps.pop()):
        parts = [rank["steps"][index] for rank in ranks]
        afters = [_array(folder, part["after"]) for part in parts]
        differ = max([differ, *(float(np.abs(a - afters[0]).max()) for a in afters)])
        expected = first["expected"][index] if index < len(first["expected"]) else None
        made = _step(folder, parts, len(case.rows), expected)
        steps.append(replace(made, label=str(first["labels"][index]) if first["labels"] else ""))
    if first["expected"] and len(first["expected"]) != len(steps):
        raise ObservationError("rl_steps", found=len(steps), asked=len(first["expected"]))
    return RLObservation(
        case=case,
        asked=Objective.from_json(first["asked"]) if first["asked"] is not None else None,
        steps=tuple(steps),
        engine=tuple(np.array(line, dtype=float) for line in first["engine"]),
        reference=np.array(first["reference"], dtype=float) if "reference" in first else None,
        ranks_differ=differ,
        unmatched=sum(rank["unmatched_lines"] for rank in ranks),
        **{key: first[key] for key in ("versions", "location", "seconds")},
    )


def _step(folder: Path, parts: Sequence[dict[str, Any]], num_rows: int, expected: Any) -> RLStep:
    micro, rank = np.full(num_rows, -1), np.zeros(num_rows, dtype=int)
    number = repeated = 0
    for place, part in enumerate(parts):
        for rows in part["microbatches"]:
            for row in rows:
                repeated += int(micro[row] >= 0)
                micro[row], rank[row] = number, place
            number += 1
    fits = [
        Fit(
            gram=_array(folder, found["gram"]),
            projection=_array(folder, found["projection"]),
            logps=np.array(found["logps"], dtype=float),
            **{key: found[key] for key in ("temperature", "shift", "residual", "rounding")},
        )
        for found in parts[0].get("fits", [])
    ]
    return RLStep(
        fits=tuple(fits),
        norm=math.sqrt(parts[0]["square"]),
        read_back=float(parts[0].get("read_back", 0.0)),
        finite=bool(parts[0]["finite"]),
        micro=micro,
        rank=rank,
        repeated=repeated,
        sizes=tuple(len(part["microbatches"]) for part in parts),
        expected=None if expected is None else np.array(expected, dtype=float),
    )


def _array(folder: Path, header: dict[str, Any]) -> np.ndarray:
    name = str(header["file"])
    if Path(name).name != name or header["dtype"] != "<f8":
        raise ValueError(f"{name} is not a file of this case, or has another dtype")
    return np.frombuffer(read_plain(folder / name), dtype="<f8").reshape(header["shape"])
