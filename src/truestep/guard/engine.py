"""Checks that the engine that samples (vLLM, SGLang or any callable) has the trainer's weights.

A difference between the log-probabilities of the two is mostly rounding. So only changes are compared: of the
tokens of a few fixed sequences, a is the change of the trainer's log-probabilities between two versions of its
weights, and e is the change of the engine's between two readings. The slope Σea / Σa² is 1 for an engine that
has the newer weights, 0 for one that was never updated, and in between for one that is late or got a part.

When it asks: before the optimizer takes a watched step. Then the trainer still has the weights from which this
step's samples should have come, and every loop has updated its engine if it ever does. A version is a number of
optimizer steps. The engine may have any of the last ``lag`` versions before the trainer's: it is only called
stale if it has none of them. A loop that takes K steps with the same samples needs lag ≥ K − 1, and K more for
each batch of samples that is made ahead.

What it compares with: the first reading, until the engine has followed a change; then that reading is the next
one to compare with. So an engine that stops being updated late is found as soon as one that never was.

Shapes: N tokens of all probe sequences, without the first of each. Units: nats.
Held by: tests/guard/test_guard_engine.py, tests/guard/test_engine_http.py"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Cause, cause
from truestep.guard.engine_http import SECONDS, Engine, Server
from truestep.guard.engine_read import MOST, Rounding, logprobs, probes, undisturbed
from truestep.guard.ranks import current_device
from truestep.guard.survive import Survive
from truestep.guard.tokens import Batch
from truestep.redaction import redact

FOLLOWED = 0.9  # slope below which the engine does not have the trainer's weights
REAL = 0.5  # share of the trainer's measured change that must not be its own rounding
# Share of it that a bfloat16 engine shows. A share of weights is only an estimate of that of log-probabilities
# (measured: slope of a right engine / share was 0.8 to 1.1 in benchmarks/guard_engine_power.py's models), so
# the limit is halved if it is not nearly 1. Below SEEN, nothing is judged; below VISIBLE, nothing is called right.
SEEN, VISIBLE, WHOLE = 0.1, 0.5, 0.9
SHARP = 0.4  # STANDARD_ERRORS of the slope must be less than this before an engine is called right
MISFIT = 0.3  # relative size of e − a, apart from the noise, from which an engine is not called right
NOISIER = 2.0  # times the noise at the start, up to which a later one is believed
# Largest ratio of the changes to two allowed versions at which the next reading is compared with this one: if
# they differ by more, a part of the newest change may be mistaken for the whole of an older one.
ALIKE = 1.25
FLOOR = 2e-6  # nats: rounding of a log-probability in float32
# Mean |difference| per token at the start, in nats, that rounding does not explain, by the trainer's precision.
# An engine computes in bfloat16 also if the trainer does not.
OTHER = {"float32": 0.1, "bfloat16": 0.2}
FEWEST = 16  # tokens
FAILURES = 3  # in a row, after which the engine is not asked again


@dataclass(frozen=True, kw_only=True)
class Slope:
    """How the engine followed one change of the trainer."""

    value: float
    error: float  # standard error
    limit: float  # the least slope of an engine with the trainer's weights; 0 if it is not known
    is_visible: bool  # most of the change reaches the engine
    misfit: float  # ‖e − a‖ / ‖a‖ without what the noise explains
    change: float  # root mean square of a

    @property
    def is_judged(self) -> bool:
        return self.limit > 0

    @property
    def is_stale(self) -> bool:
        return self.is_judged and self.value + thresholds.STANDARD_ERRORS * self.error < self.limit

    @property
    def is_right(self) -> bool:
        """0 is excluded, and the engine's change is the trainer's. The slope does not suffice for this: if one
        version was compared with another, or a part of the weights is old, it may be 1 as well."""
        wide = thresholds.STANDARD_ERRORS * self.error
        return (
            self.is_visible
            and self.misfit < MISFIT
            and self.value >= self.limit > 0
            and wide < SHARP * self.limit
        )


def slope(
    trainer: np.ndarray, engine: np.ndarray, groups: np.ndarray, *, noise: float, is_narrow: bool, kept: float
) -> Slope:
    """Regress the engine's change [N] on the trainer's [N], through the origin.

    ``groups`` [N] numbers the sequences. ``noise`` is the standard deviation of trainer − engine when both had
    the same weights. If ``is_narrow``, the trainer computes in 16 bits, and at most all of the noise is its own:
    this makes the slope of a right engine smaller than 1. ``kept`` is the share of the trainer's change that
    is left in the engine's precision.
    """
    count, noise = len(trainer), max(noise, FLOOR)
    total = float(trainer @ trainer)
    if total == 0:
        return Slope(value=0.0, error=math.inf, limit=0.0, is_visible=False, change=0.0, misfit=0.0)
    own = noise if is_narrow else FLOOR
    real = 1 - 2 * count * own**2 / total
    value = float(engine @ trainer) / total
    products = (engine - value * trainer) * trainer
    by_sequence = np.bincount(groups, products)
    pieces = max(2, len(by_sequence))
    error = max(
        # Of a right engine, whose noise is at most as large at both readings as it was at the first.
        math.sqrt(2 / total) * noise,
        math.sqrt(float(products @ products)) / total,
        # Tokens of a sequence depend on each other.
        math.sqrt(float(by_sequence @ by_sequence) * pieces / (pieces - 1)) / total,
    )
    apart = float((engine - trainer) @ (engine - trainer)) - 4 * count * noise**2
    limit = FOLLOWED * real * kept * (1.0 if kept >= WHOLE else 0.5)
    return Slope(
        value=value, error=error, limit=limit if real >= REAL and kept >= SEEN else 0.0,
        is_visible=kept >= VISIBLE, misfit=math.sqrt(max(0.0, apart) / total), change=math.sqrt(total / count),
    )  # fmt: skip


@dataclass(frozen=True)
class Version:
    """A reading of the trainer after ``number`` steps."""

    number: int
    logprobs: np.ndarray  # N


@dataclass(frozen=True)
class _Base:
    """A reading of the engine, and the versions that it could have had then."""

    versions: tuple[Version, ...]
    engine: np.ndarray  # N
    weights: Any  # entries of the trainer's parameters
    most_noise: float = math.inf  # that is not blamed on old weights

    @property
    def noise(self) -> float:
        """The least standard deviation of trainer − engine of the versions."""
        return min(self.most_noise, *(float(np.std(one.logprobs - self.engine)) for one in self.versions))


@dataclass(frozen=True, kw_only=True)
class EngineSeen:
    """The result of one check, the same on all ranks."""

    causes: tuple[Cause, ...] = ()
    notes: tuple[Cause, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)  # for the record

    @property
    def unread(self) -> tuple[Cause, ...]:
        """What kept the engine from being checked."""
        return tuple(n for n in self.notes if n.kinds != ("engine_change_small",))


# What a check came to, as sent to the other ranks.
NOTHING, RIGHT, STALE, OTHERWISE, SMALL, UNREACHABLE, UNREAD, AHEAD = range(8)
NUMBERS = ("slope", "error", "limit", "change", "noise", "gap", "lag", "tokens")


class EngineCheck:
    """Compares an engine with the trainer's model; see the top of this file for when and with what.

    ``engine`` is the address of a server (see ``engine_http.Server``), or a callable that gets token ids
    (list[list[int]]) and returns the log-probabilities of all tokens but the first of each sequence
    (list[list[float]], nats, at temperature 1). A server has ``seconds`` for an answer; a callable is not
    interrupted. Only the first rank of ``group`` asks it, but every rank must call ``before_step`` at the same
    steps. Errors of the engine become notes. The engine must have at least bfloat16's precision: weights of 8
    bits do not follow small changes. Raises ValueError for options that are not valid.
    """

    def __init__(
        self, engine: str | Engine, model: nn.Module, *, lag: int = 1, group: Any = None,
        seconds: float = SECONDS, tokens: int = 1024,
    ) -> None:  # fmt: skip
        if lag < 0 or tokens < FEWEST:
            raise ValueError(f"engine_lag = {lag}, tokens = {tokens}; use at least 0 and {FEWEST}")
        self.engine: Engine = Server(engine, seconds) if isinstance(engine, str) else engine
        self.model, self.lag, self.group, self.tokens = model, lag, group, tokens
        self.is_first = group is None or torch.distributed.get_rank(group) == 0
        self.device = torch.device("cpu")
        self.sequences: list[list[int]] | None = None
        self.history: deque[Version] = deque(maxlen=lag + 1)
        self.base: _Base | None = None
        self.rounding = Rounding(model)
        self.is_narrow = False
        self.is_off = False
        self.failures = 0
        self.reason = ""  # of a failure, without secrets

    def before_step(
        self, version: int, is_due: Callable[[int], bool], batches: Sequence[Batch]
    ) -> EngineSeen | None:
        """Call this after ``version`` steps, before the next one. It checks if that step is due, and reads the
        trainer at the ``lag`` versions before. ``batches`` are those of the first step, for the probes."""
        if self.is_off or not any(is_due(version + 1 + later) for later in range(self.lag + 1)):
            return None
        if self.sequences is None:
            self._keep(batches)
        if self.sequences:
            self._read(version)
        if not is_due(version + 1):
            return None
        found: tuple[int, dict[str, float]] = (UNREAD, {})
        with Survive(self._failed):
            found = self._judge(version) if self.is_first else (NOTHING, {})
        return self._shared(*found)

    def _failed(self, error: object) -> None:
        text = str(error) or type(error).__name__
        self.reason = " ".join(redact(text).split())[:300]

    def _keep(self, batches: Sequence[Batch]) -> None:
        """Take the first rank's probes to all ranks."""
        self.device = next(
            (b.ids.device for b in batches if b.ids is not None),
            next((p.device for p in self.model.parameters()), self.device),
        )
        found: list[list[int]] = []
        with Survive(self._failed):  # the other ranks wait
            found = probes(batches, self.tokens) if self.is_first else []
        sizes = self._sent([len(found), *map(len, found)], 1 + MOST, torch.int64)
        ids = self._sent([i for one in found for i in one], sum(sizes[1:]), torch.int64)
        ends = np.cumsum([0, *sizes[1 : 1 + sizes[0]]])
        self.sequences = [ids[a:b] for a, b in pairwise(ends)]
        counts = [len(one) - 1 for one in self.sequences]
        self.groups = np.repeat(np.arange(len(counts)), counts)

    def _sent(self, values: list[Any], size: int, dtype: torch.dtype) -> list[Any]:
        """Return the first rank's values, filled with zeros to ``size``, on all ranks."""
        if self.group is None:
            return [*values, *[0] * (size - len(values))]
        dist = torch.distributed
        is_gloo = "gloo" in str(dist.get_backend(self.group))
        sent = torch.zeros(size, dtype=dtype)
        sent[: len(values)] = torch.tensor(values, dtype=dtype)
        sent = sent.to("cpu" if is_gloo else current_device())
        dist.broadcast(sent, dist.get_global_rank(self.group, 0), group=self.group)
        return list(sent.tolist())

    def _read(self, version: int) -> None:
        values = None
        with Survive(self._failed):
            values, self.is_narrow = logprobs(self.model, self.sequences or [], self.device)
        if values is None:
            self.history.clear()
        else:
            self.history.append(Version(version, values))

    def _ask(self) -> np.ndarray:
        """Return the engine's log-probabilities [N]. Raises ValueError if they are not what was asked for."""
        asked = [list(one) for one in self.sequences or []]
        with undisturbed():
            answer = self.engine(asked)
        if [len(one) for one in answer] != [len(one) - 1 for one in asked]:
            raise ValueError("the engine returned another number of log-probabilities than of tokens")
        values = np.array([float(v) for one in answer for v in one])
        if not np.isfinite(values).all():
            raise ValueError("the engine returned a log-probability that is not finite")
        return values

    def _judge(self, version: int) -> tuple[int, dict[str, float]]:
        """Return what this check came to, and its numbers. Only on the first rank."""
        count = len(self.groups)
        if count < FEWEST:
            few = f"the model was called with {count} tokens that are known; {FEWEST} are needed"
            self.reason = self.reason or few
            return UNREAD, {}
        if not self.history or self.history[-1].number != version:
            return UNREAD, {}
        if self.base is None and version and len(self.history) <= self.lag:
            return NOTHING, {}  # the engine may have a version that was not read
        engine = None
        with Survive(self._failed):
            engine = self._ask()
        if engine is None:
            self.failures += 1
            return UNREACHABLE, {}
        self.failures = 0
        now = _Base(tuple(self.history), engine, self.rounding.read())
        if self.base is None:
            return self._first(now)
        kept = self.rounding.kept(self.base.weights, now.weights, is_narrow=self.is_narrow)
        found = [
            (self._slope(old, new, now, kept), new.number)
            for old in self.base.versions
            for new in now.versions
        ]
        stale = all(one.is_stale for one, _ in found)
        right = [pair for pair in found if pair[0].is_right]
        # The best of the versions: the one that is closest to what a right engine shows.
        best, number = min(right or found, key=lambda pair: abs(pair[0].value - 1))
        numbers = {name: getattr(best, name if name != "slope" else "value") for name in NUMBERS[:4]}
        numbers |= {"lag": version - number, "tokens": count, "noise": self.base.noise}
        if stale:
            return STALE, numbers
        if not right:
            return SMALL, numbers
        changes = [one.change for one, _ in found]
        if max(changes) <= ALIKE * min(changes):
            # Later readings differ by more if a part of the engine's weights is old.
            most = min(self.base.most_noise, NOISIER * max(FLOOR, self.base.noise))
            self.base = replace(now, most_noise=most)
        above = best.value - thresholds.STANDARD_ERRORS * best.error > 2 - FOLLOWED
        return (AHEAD if above else RIGHT), numbers

    def _slope(self, old: Version, new: Version, now: _Base, kept: float) -> Slope:
        assert self.base is not None
        return slope(
            new.logprobs - old.logprobs, now.engine - self.base.engine, self.groups,
            noise=self.base.noise, is_narrow=self.is_narrow, kept=kept,
        )  # fmt: skip

    def _first(self, now: _Base) -> tuple[int, dict[str, float]]:
        self.base = now
        gap = min(float(np.abs(one.logprobs - now.engine).mean()) for one in now.versions)
        numbers = {"gap": gap, "tokens": float(len(now.engine)), "noise": now.noise}
        limit = OTHER["bfloat16" if self.is_narrow else "float32"]
        return (OTHERWISE if gap > limit else NOTHING), numbers

    def _shared(self, code: int, numbers: dict[str, float]) -> EngineSeen:
        """Tell all ranks what the first one found."""
        off = code == UNREAD or self.failures >= FAILURES
        row = [float(code), float(off), *(float(numbers.get(name, math.nan)) for name in NUMBERS)]
        row = self._sent(row, len(row), torch.float64)
        code, self.is_off = int(row[0]), bool(row[1])
        known = {n: v if math.isfinite(v) else None for n, v in zip(NUMBERS, row[2:], strict=True)}
        reason = self.reason or "the first process has the reason"
        share, gap = known["slope"] or 0.0, known["gap"] or 0.0
        causes = {
            STALE: cause("stale_engine", "engine_frozen", share=max(0.0, share)),
            OTHERWISE: cause("stale_engine", "engine_other", gap=gap),
        }
        notes = {
            SMALL: cause("", "engine_change_small"),
            UNREACHABLE: cause("", "engine_not_reachable", reason=reason),
            UNREAD: cause("", "engine_not_checked", reason=reason),
            AHEAD: cause("", "engine_ahead", share=share),
        }
        return EngineSeen(
            causes=(causes[code],) if code in causes else (),
            notes=(notes[code],) if code in notes else (),
            numbers={name: value for name, value in known.items() if value is not None},
        )
