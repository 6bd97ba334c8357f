"""Decides which weights a sampler has, from what it sampled before and after updates of known size.

A candidate is one rule for the weights of every round: the new ones, those of one step before, those without the
adapter, the new ones without one tensor … For each, the log-probabilities of the sampled tokens are known in float64.
There are two kinds of evidence:

* The sampler reports log-probabilities. The distance of a candidate is the root mean square of the differences, in
  units of the noise: the same for the new weights in the sampler's own precision.
* It reports none. For two candidates, S = Σ (log π_one − log π_other) over the tokens is known. If the first has sampled
  them, the terms minus their expectations at each token are a martingale, so S is compared with its expectation. The
  distance of a candidate, in standard errors, is the largest over all others.

Shapes: N tokens of all rounds, K candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Cause, Differences, Finding, Verdict, cause
from truestep.audit.measure.observations import ObservationError, read_plain
from truestep.seeding import Purpose, generator

ROUNDS = 4  # before the first and after each of three steps, so that old weights differ from older ones
PROMPTS, SAMPLES, NEW_TOKENS = 4, 8, 24
SHARED = 64  # tokens that all prompts begin with: whole blocks of a prefix cache; one more token follows
VOCABULARY, FIRST_TOKEN, STOP = 48, 3, 2  # fewer tokens than the usual top-k of 50
TEMPERATURE = 0.9
LEARNING_RATE = 0.05
MOST_NAMED = 3
TINY = 1e-12
NEW, PART = "new", "part"
# The kind of a candidate → the code of its fault, and the kind of its sentence.
FAULTS = {
    "start": ("nothing_sent", "delivery_start"),
    "behind": ("stale_weights", "delivery_behind"),
    "first": ("stale_weights", "delivery_first"),
    "dropped": ("adapter_dropped", "delivery_dropped"),
    "twice": ("adapter_twice", "delivery_twice"),
    "part": ("tensors_missing", "delivery_part"),
    "cache": ("cache_kept", "delivery_cache"),
}
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class DeliveryCase:
    """The prompts that are sampled in every round, as rows without a trained token."""

    name: str
    rows: tuple[dict[str, Any], ...]
    rounds: int = ROUNDS
    samples: int = SAMPLES
    new_tokens: int = NEW_TOKENS
    temperature: float = TEMPERATURE
    vocabulary: int = VOCABULARY
    stop: int = STOP
    accumulation: int = 1
    epochs: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return the case in the form in which it is read back from JSON."""
        sizes = {"rows_per_microbatch": len(self.rows) * self.samples, "steps": self.rounds}
        return json.loads(json.dumps({**asdict(self), **sizes}))


def build(name: str, *, seed: int = 0) -> DeliveryCase:
    """Return the case. All prompts have the same beginning and the same length."""
    draw = generator(seed, Purpose.PROBE, 0, "delivery")
    shared = draw.integers(FIRST_TOKEN, VOCABULARY, SHARED).tolist()
    last = draw.choice(np.arange(FIRST_TOKEN, VOCABULARY), PROMPTS, replace=False).tolist()
    rows = tuple({"ids": [*shared, token], "trained": [0] * (SHARED + 1)} for token in last)
    return DeliveryCase(name=name, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One rule for the sampler's weights. ``names`` are the tensors that were not sent. ``moments`` are the expectation
    and the variance of Σ (log π_this − log π_other), if these weights have sampled, for all candidates."""

    kind: str
    logps: np.ndarray  # N
    moments: np.ndarray  # K, 2
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeliveryObservation:
    """What a sampler sampled in all rounds. The first candidate is the new weights."""

    candidates: Sequence[Candidate] = ()
    reported: np.ndarray | None = None  # N, by the sampler
    rounded: np.ndarray | None = None  # N, of the new weights in the sampler's precision
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    not_run: str = ""

    @cached_property
    def noise(self) -> float:
        """Nats; 1 if the evidence is in standard errors."""
        if self.rounded is None:
            return 1.0
        return max(thresholds.NOISE_FLOOR, _rms(self.rounded - self.candidates[0].logps))

    @property
    def limit(self) -> float:
        """The largest distance of the weights that the sampler has."""
        return thresholds.STANDARD_ERRORS if self.reported is None else thresholds.NOISE_FACTOR

    def distance(self, index: int) -> float:
        """Return how far the samples are from those of a candidate."""
        one = self.candidates[index]
        if self.reported is not None:
            return _rms(self.reported - one.logps) / self.noise
        return max(
            abs(float((one.logps - other.logps).sum()) - mean) / math.sqrt(max(variance, TINY))
            for other, (mean, variance) in zip(self.candidates, one.moments, strict=True)
        )

    def separation(self, index: int) -> float:
        """Return how far a candidate is from the new weights. Beyond 2 · ``limit``, both cannot fit the samples."""
        new, one = self.candidates[0], self.candidates[index]
        if self.reported is not None:
            return _rms(new.logps - one.logps) / self.noise
        (mean, variance), (back, other) = new.moments[index], one.moments[0]
        return float(2 * (mean + back) / max(math.sqrt(variance) + math.sqrt(other), TINY))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def judge(
    subject: str,
    configuration: Mapping[str, Any],
    runs: Mapping[str, DeliveryObservation],
    *,
    documented: str = "",
    without: Mapping[str, str] = MappingProxyType({}),
) -> Finding:
    """Judge the samples of all rounds together, because one rule must explain all of them."""
    nothing = Finding(subject=subject, configuration=configuration, documented=documented)
    for run in runs.values():
        nothing = replace(nothing, versions=run.versions, seconds=run.seconds)
        if run.not_run:
            return replace(nothing, reasons=(cause("", "case_not_run", why=run.not_run),))
        return _judged(nothing, run)
    return replace(nothing, reasons=(cause("", "no_case"),))


def _judged(nothing: Finding, run: DeliveryObservation) -> Finding:
    values = [c.logps for c in run.candidates] + [x for x in (run.reported, run.rounded) if x is not None]
    if len(run.candidates) < 2 or not run.candidates[0].logps.size:
        return replace(nothing, verdict=Verdict.NOT_OBSERVABLE, reasons=(cause("", "delivery_nothing"),))
    if not all(np.isfinite(v).all() for v in values):
        found = Differences(data=(cause("not_finite", "not_finite"),))
        return replace(nothing, verdict=Verdict.FAULT, codes=found.codes, found=found)
    distances = [run.distance(i) for i in range(len(run.candidates))]
    nothing = replace(nothing, delivery=_numbers(run, distances), noise=run.noise)
    if distances[0] <= run.limit:
        hidden = [c for i, c in enumerate(run.candidates) if i and run.separation(i) <= 2 * run.limit]
        whole = [cause("", "delivery_close", what=_fault(c)) for c in hidden if c.kind != PART]
        names = tuple(c.names[0] for c in hidden if len(c.names) == 1)
        reasons = (*whole, *([cause("", "delivery_parts_close", names=names)] if names else []))
        verdict = Verdict.NOT_OBSERVABLE if whole else Verdict.RIGHT
        return replace(nothing, verdict=verdict, reasons=reasons)
    fitting = sorted((d, i) for i, d in enumerate(distances) if d <= run.limit)
    if fitting:
        main, *rest = [_fault(run.candidates[i]) for _, i in fitting[:MOST_NAMED]]
        main = replace(main, values={**main.values, "others": tuple(rest)}) if rest else main
    else:
        nearest = min(range(len(distances)), key=distances.__getitem__)
        known = {"nearest": _fault(run.candidates[nearest])} if nearest else {}
        limits = {"distance": distances[nearest], "limit": run.limit}
        main = cause("other_weights", "delivery_unknown", **limits, **known)
    found = Differences(data=(main,))
    return replace(nothing, verdict=Verdict.FAULT, codes=found.codes, found=found)


def _fault(one: Candidate) -> Cause:
    code, kind = FAULTS[one.kind]
    return cause(code, kind, names=one.names) if one.names else cause(code, kind)


def _numbers(run: DeliveryObservation, distances: Sequence[float]) -> dict[str, Any]:
    apart = [run.separation(i) if i else 0.0 for i in range(len(distances))]
    each = zip(run.candidates, distances, apart, strict=True)
    return {
        "evidence": "tokens" if run.reported is None else "reported",
        "tokens": int(run.candidates[0].logps.size),
        "limit": run.limit,
        "distance": distances[0],
        "candidates": [
            {"kind": c.kind, "names": c.names, "distance": d, "separation": s} for c, d, s in each
        ],
    }


def load(folder: Path, case: DeliveryCase, *, learning_rate: float = 0.0) -> DeliveryObservation:
    """Read what a subject has written. Raises ObservationError if it cannot be read."""
    try:
        if (refused := folder / "not-run.txt").is_symlink() or refused.exists():
            return DeliveryObservation(not_run=read_plain(refused)[:1000].decode("utf-8", "replace"))
        if not (path := folder / "delivery.json").exists():
            raise ObservationError("no_observation")
        found = json.loads(read_plain(path))
        reported, rounded = (
            found[key] and np.array(found[key], dtype=float) for key in ("reported", "rounded")
        )
        made = [_candidate(item) for item in found["candidates"]]
        if len({len(x) for x in (*(c.logps for c in made), reported, rounded) if x is not None}) > 1:
            raise ValueError("lists of different lengths")
        if any(c.moments.shape != (len(made), 2) for c in made):
            raise ValueError("moments of other candidates")
        return DeliveryObservation(
            candidates=made, reported=reported, rounded=rounded, versions=found["versions"], seconds=found["seconds"]
        )  # fmt: skip
    except ObservationError:
        raise
    except BROKEN as error:
        raise ObservationError("unreadable", error=f"{type(error).__name__}: {error}"[:200]) from None


def _candidate(item: Mapping[str, Any]) -> Candidate:
    if item["kind"] not in (NEW, *FAULTS):
        raise ValueError(f"unknown kind {item['kind']}")
    logps, moments = np.array(item["logps"], dtype=float), np.array(item["moments"], dtype=float)
    return Candidate(kind=item["kind"], logps=logps, names=tuple(map(str, item["names"])), moments=moments)
