"""Reads what a subject wrote, as one ``Step`` per optimizer step for all ranks together.

Shapes: P parameters, M micro-batches of a step over all ranks (rank after rank).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from truestep.audit.measure.cases import Case
from truestep.audit.measure.findings import cause

SCHEMA = 1
MOST_BYTES = 256 << 20  # of one file; the largest ones of our subjects have a few MiB


class ObservationError(ValueError):
    """The subject ran, but what it wrote cannot be judged."""

    def __init__(self, kind: str, **values: Any) -> None:
        super().__init__(kind, values)
        self.cause = cause("", kind, **values)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward pass in training mode."""

    rank: int
    index: int  # within its rank and step
    lines: tuple[tuple[int, ...], ...]  # rows of each line: several if lines are packed
    row_counts: tuple[int, ...]  # trained tokens of each row
    row_gradients: tuple[np.ndarray, ...]  # P each: gradient of −Σ log p over the row's trained tokens
    loss_sum: float  # Σ −log p over its trained tokens, float64
    size: int  # P
    row_lengths: tuple[int, ...] = ()  # tokens of each row
    num_first: int = 0  # rows whose first token is marked as trained, although nothing predicts it

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(row for line in self.lines for row in line)

    @property
    def num_trained(self) -> int:
        return sum(self.row_counts)

    def slots(self, shift: int = 0) -> int:
        """Return the number of lines times the width of the longest, less ``shift``. 0 if it is not known."""
        if not self.row_lengths:
            return 0
        lengths = iter(self.row_lengths)
        return len(self.lines) * max(sum(next(lengths) for _ in line) - shift for line in self.lines)

    @cached_property
    def gradient(self) -> np.ndarray:
        return np.sum([np.zeros(self.size), *self.row_gradients], axis=0)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a step that the model predicts, and its gradient."""

    row: int
    place: int  # in the row
    trained: bool
    log_p: float
    gradient: np.ndarray  # P: of −log p


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A step's gradient in smaller parts, which tell other objectives: written if the rows do not explain it."""

    tokens: tuple[Token, ...] = ()
    terms: dict[tuple[str, int], np.ndarray] = field(
        default_factory=dict
    )  # (term, row) → P, summed over tokens


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step, its parameters before and after, and exact gradient sums of its micro-batches."""

    before: np.ndarray  # P
    after: np.ndarray  # P
    learning_rate: float
    microbatches: tuple[MicroBatch, ...]
    control: np.ndarray  # P: the whole step's gradient sum in the subject's own precision
    extras: dict[str, np.ndarray]  # what a wrong mask or a wrong shift would have added
    masks: dict[str, tuple[MicroBatch, ...]] = field(default_factory=dict)  # the same under other masks
    logged_loss: float | None = None
    max_grad_norm: float = 0.0  # as configured
    carried: np.ndarray | float = 0.0  # P: what the configured momentum and other losses add to the gradient
    added: np.ndarray | None = None  # P: the part of other losses
    used: np.ndarray | None = None  # P: the gradient that the optimizer was seen to use, if it was seen
    read_back: bool = True  # whether the gradient was read from the change of the rounded parameters
    narrow: str = ""  # the dtype that something was cast to, if narrower than the parameters
    parts: Parts = Parts()

    @property
    def clip_scale(self) -> float:
        """The factor by which the configured clip scales the correct gradient."""
        limit = self.max_grad_norm
        return min(1.0, limit / float(np.linalg.norm(self.expected))) if limit else 1.0

    @cached_property
    def direction(self) -> np.ndarray:
        """(before − after) / lr: the gradient that plain SGD would have used for this step."""
        if self.used is not None:
            return self.used
        return (self.before - self.after) / self.learning_rate

    @cached_property
    def stored(self) -> str:
        """The narrowest of the dtypes that hold the parameters before and after the step."""
        values = np.concatenate([self.before, self.after])
        single = np.ascontiguousarray(values, dtype=np.float32)
        if (single != values).any():
            return "float64"
        return "float32" if (single.view(np.uint32) & 0xFFFF).any() else "bfloat16"

    @property
    def num_trained(self) -> int:
        return sum(m.num_trained for m in self.microbatches)

    @property
    def counts(self) -> list[list[int]]:
        """Trained tokens of each rank's micro-batches, in the form that ``truestep.faults`` takes."""
        ranks = sorted({m.rank for m in self.microbatches})
        return [[m.num_trained for m in self.microbatches if m.rank == r] for r in ranks]

    @cached_property
    def expected(self) -> np.ndarray:
        """The gradient of the mean over all trained tokens of the step."""
        return np.asarray(np.sum([m.gradient for m in self.microbatches], axis=0) / max(1, self.num_trained))

    @property
    def true_loss(self) -> float:
        return sum(m.loss_sum for m in self.microbatches) / max(1, self.num_trained)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One run of a subject."""

    asked: Case
    versions: dict[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    ranks_differ: float = 0.0  # largest difference of a parameter between two ranks after any step
    forwards_without_step: int = 0
    unmatched: int = 0
    num_cut: int = (
        0  # rows that no line has whole, but one line ends inside of the row and another one goes on there
    )
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name and shape, in the order of the vectors
    location: str = ""  # FILE:LINE where the audited code runs the model
    autocast: str = ""  # the dtype that the model was run in, if different from its parameters'
    dtype: str = ""  # of the parameters, as seen
    num_calls: int | None = None  # of the optimizer, if they were counted
    not_run: str = ""  # why only this case could not be run
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return 1 + max(m.rank for s in self.steps for m in s.microbatches)


def read_plain(path: Path) -> bytes:
    """Return the content of a file that an audited program wrote. Raises OSError if it is a link, a device or
    a pipe, which could be endless, or is too large."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise OSError(f"{path.name} is not a plain file of at most {MOST_BYTES >> 20} MiB")
        return file.read(MOST_BYTES)


def load(folder: Path, case: Case, *, learning_rate: float) -> Observation:
    """Read all ranks' files. Raises ObservationError if a rank is missing, ranks disagree on the steps, or a
    file cannot be read. The files come from the audited program, so anything can be in them."""
    try:
        return _load(folder, case, learning_rate)
    except ObservationError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ObservationError("unreadable", error=f"{type(error).__name__}: {error}"[:200]) from None


def _load(folder: Path, case: Case, learning_rate: float) -> Observation:
    if (refused := folder / "not-run.txt").is_symlink() or refused.exists():
        return Observation(asked=case, not_run=read_plain(refused)[:1000].decode("utf-8", "replace"))
    paths = sorted(folder.glob("rank-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    if not paths:
        raise ObservationError("no_observation")
    ranks = [json.loads(read_plain(p)) for p in paths]
    if any(r["schema"] != SCHEMA for r in ranks) or len(ranks) != ranks[0]["world_size"]:
        raise ObservationError("ranks_missing", ranks=len(ranks), of=ranks[0]["world_size"], schema=SCHEMA)
    num_cut = len({row for r in ranks for row in r.get("cut_rows", ())})
    if num_cut and any(part["gradients"] is None for r in ranks for part in r["steps"]):
        return Observation(asked=case, num_cut=num_cut)
    num_steps = {len(r["steps"]) for r in ranks}
    if len(num_steps) > 1:
        raise ObservationError("ranks_disagree", steps=sorted(num_steps))
    steps: list[Step] = []
    worst = 0.0
    for index in range(num_steps.pop()):
        parts = [r["steps"][index] for r in ranks]
        afters = [_read(folder, p["after"]) for p in parts]
        worst = max([worst, *(float(np.abs(a - afters[0]).max()) for a in afters)])
        logged = ranks[0]["logged"]
        rate = learning_rate * case.rate(min(index, case.steps - 1))
        if not case.decay:
            rate = _at(logged["learning_rate"], index) or rate
        micro = [m for rank, p in enumerate(parts) for m in _microbatches(folder, p, rank, case)]
        masks = {
            k: [m for rank, p in enumerate(parts) for m in _masked(folder, p, rank, k, case)]
            for k in parts[0]["masks"]
        }
        extras = {k: [_read(folder, p["extras"][k]) for p in parts] for k in parts[0]["extras"]}
        used = parts[0].get("used")
        others = [_read(folder, p["added"]) for p in parts if p.get("added")]
        added = np.mean(others, axis=0) if others else None
        momentum = case.momentum * steps[-1].direction if steps and case.momentum else 0.0
        step = Step(
            before=_read(folder, parts[0]["before"]),
            after=afters[0],
            learning_rate=rate,
            max_grad_norm=case.max_grad_norm,
            carried=momentum if added is None else momentum + added,
            added=added,
            microbatches=tuple(micro),
            control=np.sum([_read(folder, p["control"]) for p in parts], axis=0),
            extras={k: np.sum(values, axis=0) for k, values in extras.items()},
            masks={k: tuple(found) for k, found in masks.items()},
            logged_loss=_at(logged["loss"], index),
            used=_read(folder, used["gradient"]) if used else None,
            read_back=not (used and used["exact"]),
            narrow=ranks[0]["autocast"],
            parts=_parts(folder, parts),
        )
        batches = [*micro, *(m for found in step.masks.values() for m in found)]
        vectors = (step.after, step.control, *step.extras.values(), *(m.gradient for m in batches))
        vectors += (step.direction, *step.parts.terms.values(), *(t.gradient for t in step.parts.tokens))
        if step.before.ndim != 1 or any(v.shape != step.before.shape for v in vectors):
            raise ValueError("the parameters and gradients of a step have different shapes")
        steps.append(step)
    return Observation(
        asked=case,
        steps=tuple(steps),
        ranks_differ=worst,
        forwards_without_step=max(r["forwards_without_step"] for r in ranks),
        unmatched=sum(r["unmatched_lines"] for r in ranks),
        num_cut=num_cut,
        parameters=tuple((name, tuple(shape)) for name, shape in ranks[0]["parameters"]),
        num_calls=ranks[0].get("about", {}).get("calls"),
        **{key: ranks[0][key] for key in ("versions", "location", "autocast", "dtype", "seconds")},
    )


def _at(values: list[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _read(folder: Path, header: dict[str, Any]) -> np.ndarray:
    name = str(header["file"])
    if Path(name).name != name or header["dtype"] != "<f8":
        raise ValueError(f"{name} is not a file of this case, or has another dtype")
    return np.frombuffer(read_plain(folder / name), dtype="<f8").reshape(header["shape"])


def _microbatches(folder: Path, part: dict[str, Any], rank: int, case: Case) -> Iterator[MicroBatch]:
    if part["gradients"] is None:
        raise ObservationError("no_row_found")
    gradients = dict(zip(part["rows"], _read(folder, part["gradients"]), strict=True))
    losses = dict(zip(part["rows"], part["row_losses"], strict=True))
    counts = {row: case.rows[row].num_trained for row in part["rows"]}
    return _grouped(part["microbatches"], rank, case, counts, gradients, losses)


def _masked(folder: Path, part: dict[str, Any], rank: int, mask: str, case: Case) -> Iterator[MicroBatch]:
    """Yield the micro-batches as they would be under a different mask of the trained tokens."""
    gradients = dict(zip(part["rows"], _read(folder, part["masks"][mask]["gradients"]), strict=True))
    counts = {row: int(n) for row, n in zip(part["rows"], part["masks"][mask]["counts"], strict=True)}
    return _grouped(part["microbatches"], rank, case, counts, gradients, dict.fromkeys(part["rows"], 0.0))


def _grouped(
    microbatches: Sequence[Sequence[Sequence[int]]],
    rank: int,
    case: Case,
    counts: Mapping[int, int],
    gradients: Mapping[int, np.ndarray],
    losses: Mapping[int, float],
) -> Iterator[MicroBatch]:
    for index, lines in enumerate(microbatches):
        rows = [row for line in lines for row in line]
        yield MicroBatch(
            rank=rank,
            index=index,
            lines=tuple(map(tuple, lines)),
            row_counts=tuple(counts[row] for row in rows),
            row_gradients=tuple(gradients[row] for row in rows),
            loss_sum=sum(losses[row] for row in rows),
            size=next(iter(gradients.values())).shape[0],
            row_lengths=tuple(len(case.rows[row].ids) for row in rows),
            num_first=sum(case.rows[row].num_first for row in rows),
        )


def _parts(folder: Path, ranks: list[dict[str, Any]]) -> Parts:
    """Read the parts of a step's gradient from all ranks that have written them."""
    tokens: list[Token] = []
    terms: dict[tuple[str, int], np.ndarray] = {}
    for part in (p["parts"] for p in ranks if p.get("parts")):
        names = ("row", "place", "trained", "log_p")
        for about, gradient in zip(part["tokens"], _read(folder, part["token_gradients"]), strict=True):
            tokens.append(Token(**dict(zip(names, about, strict=True)), gradient=gradient))
        keys = [(str(name), int(row)) for name, row in part["terms"]]
        terms |= dict(zip(keys, _read(folder, part["term_gradients"]), strict=True))
    return Parts(tokens=tuple(tokens), terms=terms)
