"""Finds the objective to which the observed coefficients of all steps belong.

The asked objective is tried first, then one change, then free weights of its parts, then lost micro-batches, and
then two changes. Errors are relative norms of gradients, so that every token counts as much as it moves the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from truestep.audit.measure.findings import Cause, Causes, cause
from truestep.audit.measure.rl.alternatives import alternatives
from truestep.audit.measure.rl.batch import Batch
from truestep.audit.measure.rl.objective import Objective, Parts, coefficients
from truestep.audit.measure.rl.observed import Fit, RLStep

FIT = (
    5e-4  # relative; a correct step in float32 misses less than 1e-4, the smallest known fault more than 1e-3
)
NOISE_FACTOR = 3.0
CLOSE = 0.01  # relative: two factors this close are the same
# A term was not asked for; it has the wrong sign; it is missing; it has a different weight.
WEIGHTS = {
    "kl": ("rl_kl_added", "rl_kl_sign", "rl_kl_missing", "rl_kl_weight"),
    "entropy": ("rl_entropy_added", "rl_entropy_sign", "rl_entropy_missing", "rl_entropy_weight"),
}
UNNAMED = {"split_factor", "unknown_weights"}


@dataclass(frozen=True)
class Seen:
    """A step, what it was given, and the name of its case."""

    name: str
    step: RLStep
    batch: Batch

    @property
    def fit(self) -> Fit:
        return self.step.fit

    @property
    def allowed(self) -> float:
        return max(FIT, NOISE_FACTOR * self.step.noise)

    def error(self, parts: Parts, coefficients: np.ndarray) -> float:
        """Return the relative error of coefficients [K]. Tokens at the edge of a clip and prompt tokens, which
        have causes of their own, are taken as observed."""
        wanted, known = coefficients.copy(), self.fit.coefficients
        num_tokens = len(self.batch.row)
        wanted[:num_tokens][parts.edge] = known[:num_tokens][parts.edge]
        prompts = slice(num_tokens, num_tokens + sum(self.batch.prompt_tokens))
        wanted[prompts] = known[prompts]
        return self.fit.distance(wanted) / max(self.step.norm, 1e-300)


@dataclass(frozen=True)
class Explanation:
    """What explains all steps; no causes if the asked objective does. ``error`` is the worst relative error."""

    objective: Objective
    causes: Causes
    error: float


def explain(asked: Objective, seen: Sequence[Seen]) -> Explanation | None:
    """Return the simplest explanation of all steps, or None if nothing known explains them."""
    if (error := _exact(asked, seen)) is not None:
        return Explanation(asked, (), error)
    single = list(alternatives(asked))
    if all(len(one.step.sizes) == 1 for one in seen):  # then a rank has the whole batch
        single = [a for a in single if a.objective.grouping != "rank"]
    plain = (_one_change, _free_weights, _lost, _two_changes, _change_and_weights, _change_and_lost)
    for named in (True, False):  # first only if all factors are known ones
        for stage in plain if named else (_free_weights, _lost, _change_and_weights):
            found = stage(asked, single, seen)
            if found and not (named and UNNAMED & {c.code for c in found.causes}):
                return found
    return None


def _exact(o: Objective, seen: Sequence[Seen]) -> float | None:
    """Return the worst relative error, or None as soon as a step is not explained."""
    worst = 0.0
    for one in seen:
        parts = coefficients(o, one.batch)
        error = one.error(parts, parts.whole)
        if not error <= one.allowed:
            return None
        worst = max(worst, error)
    return worst


def _merged(found: Sequence[tuple[Objective, Cause, float]]) -> Explanation:
    """Return one explanation for changes that cannot be told apart: the closest one, and up to two others."""
    found = sorted(found, key=lambda item: item[2])
    first = found[0]
    near = [c for _, c, error in found[1:] if error <= 3 * first[2] + 1e-6 and c.code != first[1].code]
    told = first[1] if not near else replace(first[1], values={**first[1].values, "others": tuple(near[:2])})
    return Explanation(first[0], (told,), first[2])


def _one_change(asked: Objective, single: list, seen: Sequence[Seen]) -> Explanation | None:
    fitting = [
        (a.objective, a.cause, error) for a in single if (error := _exact(a.objective, seen)) is not None
    ]
    return _merged(fitting) if fitting else None


# ------------------------------------------------------------------------------------------------ free weights


def _weights_of_parts(o: Objective, seen: Sequence[Seen]) -> tuple[list[np.ndarray], float] | None:
    """Return the weights of the parts in every step (1 is as given), or None if no weights explain a step."""
    found, worst = [], 0.0
    for one in seen:
        parts = coefficients(o, one.batch)
        vectors = [parts.policy, parts.kl, parts.entropy]
        used = [i for i, v in enumerate(vectors) if v.any()]
        if not used:
            return None
        columns = np.stack([vectors[i] for i in used], axis=1)
        inner = columns.T @ one.fit.gram @ columns
        size = np.sqrt(np.diag(inner))
        right = columns.T @ one.fit.gram @ one.fit.coefficients
        solved = np.linalg.lstsq(inner / np.outer(size, size), right / size, rcond=1e-10)[0] / size
        error = one.error(parts, columns @ solved)
        if not error <= one.allowed:
            return None
        every = np.full(3, np.nan)
        every[used] = solved
        found.append(every)
        worst = max(worst, error)
    return found, worst


def _added(asked: Objective) -> Iterator[Objective]:
    """Yield the objective, and the objective with a term that was not asked for, of weight 1."""
    yield asked
    if asked.kl == "none":
        for kind in ("k3", "k2", "k1"):
            for anchor in ("reference", "old", "initial"):
                yield replace(asked, kl=kind, beta=1.0, anchor=anchor)
    if not asked.entropy:
        for scope in ("step", "micro_batch"):
            yield replace(asked, entropy=1.0, entropy_scope=scope)


def _named_weights(
    o: Objective, asked: Objective, weights: list[np.ndarray], seen: Sequence[Seen]
) -> Causes | None:
    """Return causes for weights that are the same in all steps, or that follow the split."""
    table = np.array(weights)
    steady = []
    for column in table.T:
        known = column[~np.isnan(column)]
        steady.append(float(np.median(known)) if len(known) else 1.0)
    policy = table[:, 0]
    spread = float(np.nanmax(policy) - np.nanmin(policy))
    if spread > CLOSE * abs(steady[0]):
        return _factor_of_split(table, seen)
    causes = []
    both = [w for w in steady[1:] if abs(w - 1) > CLOSE]
    if abs(steady[0] - 1) > CLOSE / 2:
        same = all(abs(w / steady[0] - 1) <= 2 * CLOSE for w in both) and (
            len(both) == sum(bool(np.isfinite(c).any()) for c in table.T[1:])
        )
        kind = "scale_of_every_split" if same else "rl_policy_weight"
        ranks = {len(one.step.sizes) for one in seen}
        number = max(ranks) if len(ranks) == 1 else 1
        if abs(steady[0] + 1) <= CLOSE:
            causes.append(cause("sign", "rl_loss_sign"))
        elif number > 1 and abs(steady[0] / number - 1) <= CLOSE:
            causes.append(cause("rank_factor", "ranks_summed"))
        elif number > 1 and abs(steady[0] * number - 1) <= CLOSE:
            causes.append(cause("rank_factor", "ranks_twice"))
        else:
            causes.append(cause("scale", kind, scale=steady[0]))
        if same:
            return tuple(causes)
    for name, weight, given in (("kl", steady[1], asked.beta), ("entropy", steady[2], asked.entropy)):
        was_asked = (asked.kl != "none") if name == "kl" else bool(asked.entropy)
        if abs(weight - 1) <= CLOSE and was_asked:
            continue
        present = o.kl != "none" if name == "kl" else bool(o.entropy)
        if not present:
            continue
        amount = weight * (o.beta if name == "kl" else o.entropy)
        values = {"found": amount, "asked": given, "estimate": o.kl, "anchor": o.anchor}
        kinds = WEIGHTS[name]
        if not was_asked:
            causes.append(cause(f"{name}_weight", kinds[0], **values))
        elif abs(weight + 1) <= CLOSE:
            causes.append(cause("sign", kinds[1], **values))
        else:
            causes.append(cause(f"{name}_weight", kinds[2 if abs(weight) <= CLOSE else 3], **values))
    return tuple(causes) or None


def _factor_of_split(table: np.ndarray, seen: Sequence[Seen]) -> Causes | None:
    """Name a factor that is different for different splits."""
    micro = np.array([float(max(one.step.sizes)) for one in seen])
    ranks = np.array([float(len(one.step.sizes)) for one in seen])
    known = {"accumulation_missing": micro, "accumulation_twice": 1 / micro, "ranks_summed": ranks,
             "ranks_twice": 1 / ranks, "both_missing": micro * ranks}  # fmt: skip
    for kind, factors in known.items():
        if np.all(np.abs(table[:, 0] / factors - 1) <= CLOSE):
            return (cause("accumulation_factor" if "accumulation" in kind else "rank_factor", kind),)
    shown = sorted({round(float(w), 4) for w in table[:, 0]})
    return (cause("split_factor", "rl_split_factor", factors=shown),)


def _free_weights(asked: Objective, single: list, seen: Sequence[Seen]) -> Explanation | None:
    for o in _added(asked):
        if (found := _weights_of_parts(o, seen)) and (named := _named_weights(o, asked, found[0], seen)):
            return Explanation(o, named, found[1])
    return None


def _change_and_weights(asked: Objective, single: list, seen: Sequence[Seen]) -> Explanation | None:
    unnamed = None
    for a in single:
        if found := _weights_of_parts(a.objective, seen):
            named = _named_weights(a.objective, a.objective, found[0], seen) or ()
            told = Explanation(a.objective, (a.cause, *named), found[1])
            if not UNNAMED & {c.code for c in named}:
                return told
            unnamed = unnamed or told
    return unnamed


def _two_changes(asked: Objective, single: list, seen: Sequence[Seen]) -> Explanation | None:
    few = [a for a in single if "rl_clip_range" not in a.cause.kinds]
    unclipped = [one for one in seen if np.array_equal(one.batch.now, one.batch.old)]  # all ratios are 1
    for first in few:
        clips = bool(unclipped) and _exact(first.objective, unclipped) is not None
        for second in alternatives(first.objective):
            if second.cause.kinds == first.cause.kinds or (
                "rl_clip_range" in second.cause.kinds and not clips
            ):
                continue
            error = _exact(second.objective, seen)
            if error is not None:
                return Explanation(second.objective, (first.cause, second.cause), error)
    return None


# ------------------------------------------------------------------------------------------- lost micro-batches


def _factors(o: Objective, seen: Sequence[Seen]) -> tuple[list[np.ndarray], float] | None:
    """Return a factor for every micro-batch of every step, or None if no factors explain a step."""
    found, worst = [], 0.0
    for one in seen:
        parts = coefficients(o, one.batch)
        tail = one.batch.size - len(one.batch.lengths)
        columns = []
        for number in range(sum(one.step.sizes)):
            rows = one.batch.micro == number
            part = np.zeros(one.batch.size)
            part[: len(one.batch.row)] = parts.whole[: len(one.batch.row)] * rows[one.batch.row]
            part[tail:] = parts.whole[tail:] * rows
            columns.append(part)
        matrix = np.stack(columns, axis=1)
        solved = np.linalg.lstsq(matrix.T @ one.fit.gram @ matrix, matrix.T @ one.fit.gram @ one.fit.coefficients,
                                 rcond=1e-9)[0]  # fmt: skip
        error = one.error(parts, matrix @ solved)
        if not error <= one.allowed:
            return None
        zero = [not column.any() for column in columns]
        found.append(np.where(zero, np.nan, solved))
        worst = max(worst, error)
    return found, worst


def _lost(asked: Objective, single: list, seen: Sequence[Seen]) -> Explanation | None:
    if (found := _factors(asked, seen)) is None:
        return None
    return Explanation(asked, (_pattern(found[0], seen),), found[1])


def _change_and_lost(asked: Objective, single: list, seen: Sequence[Seen]) -> Explanation | None:
    for a in single:
        if "rl_clip_range" not in a.cause.kinds and (found := _factors(a.objective, seen)):
            lost = _pattern(found[0], seen)
            if lost.code not in UNNAMED:
                return Explanation(a.objective, (a.cause, lost), found[1])
    return None


def _pattern(factors: list[np.ndarray], seen: Sequence[Seen]) -> Cause:
    """Name the factors of the step with the most micro-batches in which they differ."""
    wrong = [(len(f), i) for i, f in enumerate(factors) if np.nanmax(np.abs(f - np.nanmax(f))) > CLOSE]
    index = max(wrong)[1] if wrong else 0
    values, size = factors[index], max(seen[index].step.sizes)
    lost = [int(i) for i in np.flatnonzero(np.abs(values) <= CLOSE)]
    if not lost or any(abs(v - 1) > CLOSE for i, v in enumerate(values) if i not in lost and not np.isnan(v)):
        return cause("unknown_weights", "unknown_weights", weights=[round(float(v), 4) for v in values])
    kept = [i % size for i in range(len(values)) if i not in lost and not np.isnan(values[i])]
    if set(kept) == {size - 1}:
        return cause("kept", "kept_last")
    if set(kept) == {0}:
        return cause("kept", "kept_first")
    if size > 2 and set(kept) == {0, size - 1}:
        return cause("kept", "kept_first_and_last")
    return cause("kept", "dropped", dropped=lost, of=len(values))
