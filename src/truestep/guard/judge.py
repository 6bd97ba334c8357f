"""Judges one step from what all ranks saw of it. Every rank comes to the same verdict.

Shapes: R equations, M micro-batches of all ranks, rank after rank, D ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Cause, Verdict, cause
from truestep.audit.measure.patterns import Seen, fit_pattern, scale_cause
from truestep.audit.measure.weights import Recovered
from truestep.guard.given_up import OF_WEIGHTS, only_finite, without_given_up
from truestep.guard.options import Declared
from truestep.guard.ranks import MicroSeen, RankSeen
from truestep.guard.solve import RESIDUAL, TOLERANCE, Solved, solve
from truestep.guard.tokens import Tokens

# Relative distance from a weighted negative log-likelihood. Measured in right runs: 2e-7 and 2e-3.
FORM = {"float32": 5e-4, "bfloat16": 8e-3}
TOKEN_TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}  # relative error of a micro-batch's token weight
EQUATIONS = 2  # per unknown weight
# In place of the number of the backward pass that reached a micro-batch.
NO_BACKWARD, SEVERAL, UNTRAINED = -1, -2, -3
CLIPPED = 2e-2  # relative difference of two norms that are not the same
RANKS_EQUAL = 1e-5  # relative difference of the used gradient between two ranks
STOPS = 3  # untrained stop tokens that are not an accident


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The judgement of one step."""

    verdict: Verdict = Verdict.RIGHT
    causes: tuple[Cause, ...] = ()
    notes: tuple[Cause, ...] = ()  # what was not seen, and harmless factors
    # Per rank: the weight of each micro-batch's tokens (or, without logits, of what its backward pass gave) in the
    # used gradient, without a common factor; 1 is right.
    weights: tuple[tuple[float, ...], ...] = ()
    errors: tuple[tuple[float, ...], ...] = ()  # standard errors
    tokens: tuple[tuple[int, ...], ...] = ()  # per rank: trained tokens of each micro-batch
    token_weights: tuple[tuple[float, ...], ...] = ()  # per rank: mean weight of a trained token
    residual: float | None = None
    scale: float | None = None  # the common factor of what the backward passes gave
    condition: float | None = None
    dtype: str = "float32"
    given_up: int = 0  # micro-batches of a step that was left out before this one


@dataclass
class _Step:
    """The micro-batches with a gradient, and what is found on the way."""

    ranks: Sequence[RankSeen]
    declared: Declared
    causes: list[Cause] = field(default_factory=list)
    notes: list[Cause] = field(default_factory=list)
    token_scale: float = 1.0  # the common factor of the tokens' weights
    used: Solved | None = None  # if the gradient of the step before explains the rest

    def __post_init__(self) -> None:
        self.dtype = "bfloat16" if any(r.is_narrow for r in self.ranks) else "float32"
        self.by_rank: list[list[MicroSeen]] = [[m for m in r.micro if m.column.any()] for r in self.ranks]
        self.micro = [m for rank in self.by_rank for m in rank]

    @property
    def known(self) -> bool:
        return all(m.tokens is not None for m in self.micro)

    def split(self, values: np.ndarray) -> tuple[tuple[float, ...], ...]:
        ends = np.cumsum([len(rank) for rank in self.by_rank])[:-1]
        return tuple(tuple(map(float, part)) for part in np.split(values, ends))


def judge(ranks: Sequence[RankSeen], modules: np.ndarray, declared: Declared) -> Judged:
    """Judge one step. ``modules`` [R] numbers each equation's module."""
    judged = _judge(ranks, modules, declared)
    finite = only_finite(ranks)
    weights = (judged if finite is None else _judge(finite, modules, declared)).weights
    found = without_given_up(ranks, weights, declared.accumulation, judged.dtype) if judged.causes else None
    again = _judge(found.ranks, modules, declared) if found else judged
    if found is None or OF_WEIGHTS & {c.code for c in again.causes}:
        return judged
    note = cause("", "begun_again" if found.comes_again else "given_up", count=found.count)
    return replace(again, notes=(*again.notes, note), given_up=0 if found.comes_again else found.count)


def _judge(ranks: Sequence[RankSeen], modules: np.ndarray, declared: Declared) -> Judged:
    step = _Step(ranks, declared)
    if not step.micro:
        ran = any(m.backward not in (NO_BACKWARD, UNTRAINED) for r in ranks for m in r.micro)
        notes = (cause("", "zero_gradient" if ran else "no_micro_batch"),)
        return _again(step) or Judged(verdict=Verdict.NOT_OBSERVABLE, notes=notes)
    if any(not np.isfinite(m.column).all() for m in step.micro):
        not_finite = (cause("not_finite", "gradient_not_finite"),)
        return Judged(verdict=Verdict.FAULT, causes=not_finite, dtype=step.dtype)
    _data(step)
    limit = declared.max_grad_norm
    if limit and ranks[0].norm > limit * (1 + CLIPPED):
        step.causes.append(cause("clip", "clip_missing", asked=limit))
    solved = _sum(step, modules)
    weighed = _tokens(step)
    _name(step, solved, weighed)
    judges = solved is not None or declared.gradient != "sum"
    verdict = Verdict.FAULT if step.causes else Verdict.RIGHT if judges else Verdict.NOT_OBSERVABLE
    counts = np.array([m.tokens.trained if m.tokens else 0 for m in step.micro])
    shown = np.ones(len(step.micro)) if weighed is None else weighed * counts.sum() / step.token_scale
    common = _common(solved, step.dtype) if solved else 1.0
    return Judged(
        verdict=verdict, causes=tuple(step.causes), notes=tuple(step.notes),
        weights=step.split(shown * solved.weights / common) if solved else (),
        errors=step.split(np.abs(shown) * solved.errors / abs(common)) if solved else (),
        tokens=tuple(tuple(map(int, part)) for part in step.split(counts)) if step.known else (),
        token_weights=step.split(weighed) if weighed is not None else (),
        residual=solved.residual if solved else None, scale=common if solved else None,
        condition=solved.condition if solved else None, dtype=step.dtype,
    )  # fmt: skip


def _again(step: _Step) -> Judged | None:
    """Judge a step without a backward pass, if it used the gradient of the step before."""
    now, before = step.ranks[0].target, step.ranks[0].previous
    read = np.isfinite(now) & np.isfinite(before)
    if not now[read].any() or not before[read].any():
        return None
    share = float(now[read] @ before[read]) / float(before[read] @ before[read])
    if np.linalg.norm(now[read] - share * before[read]) > RESIDUAL["float32"] * np.linalg.norm(now[read]):
        return None
    found = (cause("momentum", "carried", coefficient=share),)
    return Judged(verdict=Verdict.FAULT, causes=found, dtype=step.dtype)


def _common(solved: Solved, dtype: str) -> float:
    """Return the weight that most of the micro-batches with a weight have."""
    if not solved.differ(dtype).any():
        return solved.scale
    size = np.abs(solved.weights)
    return float(np.median(solved.weights[size >= size.max() / 2])) or 1.0


def _passes(step: _Step) -> None:
    """Judge the number of micro-batches. One may run the model several times, so both the forward and the
    backward passes must differ from what was declared."""
    asked = step.declared.accumulation
    for rank in step.ranks:
        reached = [m.backward for m in rank.micro if m.backward not in (NO_BACKWARD, UNTRAINED)]
        untrained = sum(m.backward == UNTRAINED for m in rank.micro)
        found = len(set(reached))  # each is one run of the model or more
        if asked and SEVERAL not in reached and found > asked:
            step.causes.append(cause("grouping", "too_many_micro_batches", found=found, asked=asked))
            return
        if asked and len(rank.micro) == asked and 0 < len(reached) < asked - untrained:
            lost = [i + 1 for i, m in enumerate(rank.micro) if m.backward == NO_BACKWARD]
            step.causes.append(cause("kept", "without_backward", lost=lost, of=asked))
            return
    if missing := sum(m.backward == NO_BACKWARD for rank in step.ranks for m in rank.micro):
        step.notes.append(cause("", "forward_only", found=missing))


def same_rows(ranks: Sequence[RankSeen]) -> bool:
    """Return whether all ranks, of two or more, had the same micro-batches."""
    marks = [[m.mark for m in rank.micro] for rank in ranks]
    return len(marks) > 1 and all(rank == marks[0] and rank and all(rank) for rank in marks)


def _data(step: _Step) -> None:
    _passes(step)
    # A single micro-batch may be the same by chance.
    if same_rows(step.ranks) and len(step.ranks[0].micro) > 1:
        step.causes.append(cause("data_lost", "ranks_have_same_rows"))


def _sum(step: _Step, modules: np.ndarray) -> Solved | None:
    """Solve for the weights of the micro-batches, and judge what they do not explain."""
    target = step.ranks[0].target
    read = np.isfinite(target)
    if not read.any():
        step.notes.append(cause("", "gradient_unread"))
        return None
    size = float(np.linalg.norm(target[read]))
    apart = max(float(np.linalg.norm(r.target[read] - target[read])) for r in step.ranks)
    if apart > RANKS_EQUAL * size:
        step.causes.append(
            cause("ranks_diverge", "ranks_use_other_gradients", difference=apart / max(size, 1e-300))
        )
    columns = np.stack([m.column[read] for m in step.micro], axis=1)
    _, order = np.unique(modules[read], return_inverse=True)
    limit = max(RESIDUAL[step.dtype], thresholds.STANDARD_ERRORS * max(r.noise for r in step.ranks))
    solved = _grouped(step, columns, target[read], order, limit)
    if step.declared.gradient == "any":
        step.notes.append(cause("", "gradient_not_judged", share=solved.residual))
        return None
    if solved.residual > limit and apart <= RANKS_EQUAL * size:
        step.causes.append(_rest(step, solved, columns, target[read], order))
    return step.used or solved


def _grouped(step: _Step, columns: np.ndarray, target: np.ndarray, order: np.ndarray, limit: float) -> Solved:
    """Solve for the weight of every micro-batch. If there are too many of them for the probes, solve for one
    common weight, for one of each place in a rank's step, or for one of each rank: the first that explains the
    gradient, else the best."""
    if len(columns) >= EQUATIONS * columns.shape[1]:
        return solve(columns, target, order)
    places = np.array([k for rank in step.by_rank for k in range(len(rank))])
    ranks = np.array([r for r, rank in enumerate(step.by_rank) for _ in rank])
    best: Solved | None = None
    for groups in (ranks * 0, places, ranks):
        summed = np.stack([columns[:, groups == g].sum(1) for g in range(groups.max() + 1)], axis=1)
        if len(columns) < EQUATIONS * summed.shape[1]:
            continue
        found = solve(summed, target, order)
        found = replace(found, weights=found.weights[groups], errors=found.errors[groups])
        if best is None or found.residual < best.residual:
            best = found
        if found.residual <= limit:
            return found
    assert best is not None  # one common weight can always be solved
    return best


def _rest(step: _Step, solved: Solved, columns: np.ndarray, target: np.ndarray, order: np.ndarray) -> Cause:
    """Return the best explanation of a residual."""
    previous = step.ranks[0].previous[np.isfinite(step.ranks[0].target)]
    if np.isfinite(previous).all() and previous.any():
        many = len(columns) < EQUATIONS * (columns.shape[1] + 1)
        again = solve(np.c_[columns.sum(1) if many else columns, previous], target, order)
        if again.residual * thresholds.EXPLAINED <= solved.residual:
            own = again.weights[:-1], again.errors[:-1]
            weights, errors = (np.broadcast_to(v, len(step.micro)).copy() for v in own)
            step.used = replace(again, weights=weights, errors=errors)
            return cause("momentum", "carried", coefficient=float(again.weights[-1]))
    counts = np.bincount(order)
    if len(counts) > 1 and counts.min() >= EQUATIONS * columns.shape[1]:
        parts = [
            solve(columns[order == m], target[order == m], order[order == m] * 0) for m in range(len(counts))
        ]
        if max(part.residual for part in parts) <= RESIDUAL[step.dtype]:
            return cause("unknown_weights", "modules_differ", weights=list(solved.by_module))
    return cause("unexplained", "unexplained", share=solved.residual)


def _tokens(step: _Step) -> np.ndarray | None:
    """Judge which tokens are trained. Return the mean weight of a trained token [M], if it can be judged."""
    if not step.known:
        step.notes.append(cause("", "no_logits"))
        return None
    seen = [m.tokens for m in step.micro if m.tokens is not None]
    if max(t.form for t in seen) > FORM[step.dtype]:
        step.notes.append(cause("", "other_loss"))
        return None
    if not _masks(step, seen) or step.declared.loss == "any":
        return None
    if any(t.negative for t in seen):
        step.notes.append(cause("", "signed_weights"))
        return None
    tolerance = 2 * TOKEN_TOLERANCE[step.dtype]
    if any(t.token_spread > tolerance for t in seen) and all(t.spread <= tolerance for t in seen):
        step.notes.append(cause("", "weights_by_token"))
        return None
    uneven = [t for t in seen if t.spread > tolerance]
    if uneven and any(t.sequence_spread > tolerance for t in uneven):
        step.notes.append(cause("", "weights_by_row"))
        return None
    if uneven:
        step.notes.append(cause("sequence_mean", "sequence_mean"))
        return None
    return np.array([t.weight for t in seen])


def _masks(step: _Step, seen: Sequence[Tokens]) -> bool:
    """Judge which tokens are trained. Return whether each is the next one of its position."""
    shifts = {t.shift for t in seen if t.trained}
    named = {frozenset({0}): ("shift_0", "targets_shift_0"), frozenset({2}): ("shift_2", "targets_shift_2")}
    if wrong := named.get(frozenset(shifts)):
        step.causes.append(cause(*wrong))
    elif shifts - {1}:  # a masked or a classifying model, and not one of the next token
        step.notes.append(cause("", "other_targets"))
    if shifts - {1}:
        return False
    if outside := sum(t.outside for t in seen):
        step.causes.append(cause("prompt_trained", "outside_trained", tokens=outside))
    missing, ends = sum(t.missing for t in seen), sum(t.missing_ends for t in seen)
    # In reinforcement learning, an advantage of 0 leaves a whole answer untrained.
    if missing and step.declared.loss != "any" and not any(t.negative for t in seen):
        code = "stop_untrained" if missing == ends else "unexplained"
        step.causes.append(cause(code, "tokens_untrained", tokens=missing))
    stops, trained = sum(t.stops for t in seen), sum(t.stops_trained for t in seen)
    if stops >= STOPS and not trained and not missing:
        step.causes.append(cause("stop_untrained", "stop_never_trained", stops=stops))
    return True


def _name(step: _Step, solved: Solved | None, weighed: np.ndarray | None) -> None:
    """Name the pattern of the micro-batches' weights, and that of the tokens' weights."""
    if (
        solved is not None
        and not any(c.code in ("momentum", "unexplained", "ranks_diverge") for c in step.causes)
        and solved.differ(step.dtype).any()
    ):
        ones = [[1] * len(rank) for rank in step.by_rank]
        pattern, _ = _fit(step, solved.weights, solved.errors, ones, TOLERANCE[step.dtype])
        kept = [c for c in pattern.causes if c.code == "kept"] if pattern else []
        step.causes += kept or [_unknown(solved.weights)]
    if weighed is None:
        return
    counts = [[m.tokens.trained if m.tokens else 0 for m in rank] for rank in step.by_rank]
    total, tolerance = sum(map(sum, counts)), TOKEN_TOLERANCE[step.dtype]
    pattern, largest = _fit(step, weighed * total, tolerance / 2 * weighed * total, counts, tolerance)
    if pattern is None:
        step.causes.append(_padding(step, weighed) or _unknown(weighed))
        return
    step.causes += _normalisers(step, pattern)
    if solved is not None:
        _clip(step, solved, pattern.scale * largest)
        _constant(step, solved, pattern, largest)


def _unknown(weights: np.ndarray) -> Cause:
    relative = weights / max(1e-300, float(np.median(np.abs(weights))))
    return cause("unknown_weights", "unknown_weights", weights=relative.tolist())


def _fit(
    step: _Step, weights: np.ndarray, errors: np.ndarray, counts: list[list[int]], tolerance: float
) -> tuple[Seen | None, float]:
    """Return the simplest pattern of the weights, as large as they are relative to the largest, which is also
    returned."""
    largest = float(np.abs(weights).max()) or 1.0
    errors = np.maximum(errors / largest, tolerance / thresholds.STANDARD_ERRORS)
    recovered = Recovered(
        weights=weights / largest, errors=errors, residual=0.0, condition=1.0, relative_error=0.0, noise=0.0,
        counts=tuple(map(tuple, counts)), empty=(),
    )  # fmt: skip
    return fit_pattern(recovered, "float32"), largest


def _normalisers(step: _Step, pattern: Seen) -> list[Cause]:
    """Return the causes of a denominator that is not the one that was declared."""
    found = [c for c in pattern.causes if c.code in ("micro_mean", "rank_mean", "dp_token_mean")]
    if not all(m.tokens is None or m.tokens.sequence_spread == 0 for m in step.micro):
        return found
    # If every micro-batch is one row, a mean of the rows' means looks the same.
    if step.declared.loss == "sequence_mean":
        return [c for c in found if c.code != "micro_mean"]
    return [
        cause("micro_mean", "micro_mean", "sequence_mean") if c.code == "micro_mean" else c for c in found
    ]


def _padding(step: _Step, weights: np.ndarray) -> Cause | None:
    slots = np.array([m.tokens.slots if m.tokens else 0 for m in step.micro], dtype=np.float64)
    if not slots.all() or np.ptp(slots) == 0:
        return None
    by_slot = weights * slots
    close = 2 * TOKEN_TOLERANCE[step.dtype] * np.abs(by_slot).max()
    return cause("padding", "padding_counted") if np.ptp(by_slot) <= close else None


def _clip(step: _Step, solved: Solved, token_scale: float) -> None:
    """Name a clip to another norm than the declared one. It is certain only if the loss is exactly a mean over
    all tokens, so that nothing else can have made the gradient smaller."""
    limit, norm = step.declared.max_grad_norm, step.ranks[0].norm
    ranks, close = len(step.ranks), CLIPPED if step.dtype == "float32" else TOKEN_TOLERANCE[step.dtype]
    whole = any(abs(token_scale / f - 1) <= close for f in (1, ranks)) and not step.causes
    was_clipped = _common(solved, step.dtype) * ranks < 1 - close
    if limit and whole and was_clipped and 0 < norm < limit * (1 - close):
        step.causes.append(cause("clip", "clip_to_other", norm=norm, asked=limit))


def _constant(step: _Step, solved: Solved, pattern: Seen, largest: float) -> None:
    """Name a common factor of all tokens. A known one is a fault, if nothing else, such as a clip, could have
    made it: then the weights of the micro-batches are exactly a sum, or a mean over ranks."""
    ranks = len(step.ranks)
    common = _common(solved, step.dtype)
    by_sum = [ranks**p for p in (0, -1) if abs(common * ranks**-p - 1) <= thresholds.KNOWN_FACTOR]
    scale = pattern.scale * largest * (by_sum[0] if by_sum else common)
    close = thresholds.CLOSE if step.dtype == "float32" else TOKEN_TOLERANCE[step.dtype]
    if abs(scale - 1) <= close:
        step.token_scale = pattern.scale * largest
        return
    kept = np.ones(len(step.micro), dtype=bool)
    step.token_scale = pattern.scale * largest
    known = None
    if by_sum and not step.causes and pattern.recovered is not None:
        known = scale_cause(_rounded(step, scale, close), pattern.recovered, kept, "global")
    if known is not None and known.code != "scale":
        step.token_scale = 1.0
        step.causes.append(known)
    else:
        step.notes.append(cause("", "common_factor", scale=scale))


def _rounded(step: _Step, scale: float, close: float) -> float:
    """Return the known factor that the scale is within the noise of the token weights, or the scale."""
    ranks, micro = len(step.ranks), max(len(rank) for rank in step.by_rank)
    known = [float(f) for n in (ranks, micro, ranks * micro) if n > 1 for f in (n, 1 / n)]
    return next((f for f in known if abs(scale - f) <= close * f), scale)
