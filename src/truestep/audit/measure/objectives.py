"""Names the objective of a step that no weights of its rows explain, from the gradients of smaller parts.

A part is a token, or a term that other objectives add (``recorder.terms_of``). The simplest combination that
leaves nothing beyond the noise names the objective. Shapes: P parameters, R rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Cause, cause
from truestep.audit.measure.observations import Step, Token
from truestep.audit.measure.weights import observed_gradient
from truestep.faults import recover_weights

TERMS = ("label_smoothing", "z_loss", "entropy", "logits_squared")
# The positions that a term may be added at, the fewest first.
WHERE = (("",), ("", " other"), ("", " other", " last"))
EVERYWHERE = {"z_loss": "z_loss_everywhere", "entropy": "entropy_everywhere"}
EVERYWHERE["logits_squared"] = "logits_squared_everywhere"
CODES = {*TERMS, "focal", "dft", "token_weights"}
POWERS = np.arange(0.25, 5.01, 0.25)


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a step computes, and the weight that it gives to each row [R]: 1 is a mean over all tokens."""

    cause: Cause
    weights: dict[int, float]  # by row


def name(step: Step, limit: float) -> Named | None:
    """Return the objective, or None if no known one leaves at most ``limit`` of the gradient unexplained."""
    solver = _Solver(step, limit)
    if not solver.rows.keys() <= {row for _, row in step.parts.terms}:
        return None
    return _of_probability(solver) or _added_term(solver) or _token_weights(solver)


class _Solver:
    """The columns of one step, and what they leave unexplained."""

    def __init__(self, step: Step, limit: float) -> None:
        self.step, self.limit = step, limit
        self.observed = observed_gradient(step)
        pairs = [
            (row, gradient)
            for m in step.microbatches
            for row, n, gradient in zip(m.rows, m.row_counts, m.row_gradients, strict=True)
            if n
        ]
        self.rows = dict(pairs)
        self.tokens = step.parts.tokens
        self.residual = 1.0  # of the last solution

    def solve(self, columns: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return the columns' weights if they explain the step. Unit: 1 is a mean over all trained tokens."""
        used = [i for i, c in enumerate(columns) if np.linalg.norm(c)]
        if not used:
            return None
        parts = [columns[i] / self.step.num_trained for i in used]
        found, self.residual, _ = recover_weights(self.observed, parts)
        weights = np.zeros(len(columns))
        weights[used] = found
        return weights if self.residual <= self.limit else None

    def term(self, key: str) -> list[np.ndarray]:
        """Return a term's columns, one for each row of the step that has any."""
        return [column for (term, _), column in self.step.parts.terms.items() if term == key]

    def of_tokens(self, weight: Callable[[Token], float]) -> list[np.ndarray]:
        """Return Σ weight · gradient over each row's trained tokens."""
        chosen = {row: [t for t in self.tokens if t.row == row and t.trained] for row in self.rows}
        return [np.sum([weight(t) * t.gradient for t in tokens], axis=0) for tokens in chosen.values()]


def _of_probability(solver: _Solver) -> Named | None:
    """A loss in which a token's weight depends on its probability p: DFT (p), focal ((1 − p)^γ)."""
    forms: list[tuple[Cause, list[np.ndarray]]] = []
    for key in sorted({key for key, _ in solver.step.parts.terms if key.startswith("focal ")}):
        columns = [solver.step.parts.terms[key, row] for row in solver.rows]
        forms.append((cause("focal", "focal", gamma=float(key.removeprefix("focal "))), columns))
    if solver.tokens:
        forms.append((cause("dft", "dft"), solver.of_tokens(lambda t: float(np.exp(t.log_p)))))
        for power in POWERS:
            about = cause("focal", "focal_weights", gamma=float(power))
            forms.append((about, solver.of_tokens(lambda t, g=power: float((1 - np.exp(t.log_p)) ** g))))  # type: ignore[misc]
    found = [(about, solver.solve(columns), solver.residual) for about, columns in forms]
    fitting = [(missed, about, weights) for about, weights, missed in found if weights is not None]
    if not fitting:
        return None
    _, about, weights = min(fitting, key=lambda f: f[0])
    return Named(cause=about, weights=dict(zip(solver.rows, weights, strict=True)))


def _added_term(solver: _Solver) -> Named | None:
    """The negative log-likelihood and one term of a known form, at the fewest positions that explain the step."""
    own = list(solver.rows.values())
    for where in WHERE:
        found = []
        for term in TERMS:
            added = [column for part in where for column in solver.term(term + part)]
            if (weights := solver.solve([*own, *added])) is not None:
                found.append((solver.residual, term, weights[: len(own)], weights[len(own) :]))
        if found:
            _, term, rows, extra = min(found, key=lambda f: f[0])
            return _with_term(solver, term, where == WHERE[0], rows, extra)
    return None


def _with_term(solver: _Solver, term: str, only_trained: bool, rows: np.ndarray, extra: np.ndarray) -> Named:
    """``rows`` [R] are the weights of the negative log-likelihoods, ``extra`` those of the term's columns."""
    by_row = dict(zip([row for t, row in solver.step.parts.terms if t == term], extra, strict=False))
    here = np.array([by_row[row] for row in solver.rows])
    if term == "label_smoothing":
        # (1 − ε) of the weight is on the label, and ε on all tokens alike.
        about = cause(term, term, epsilon=float(np.median(here / (rows + here))))
        return Named(cause=about, weights=dict(zip(solver.rows, rows + here, strict=True)))
    size = float(np.median(here) if only_trained else np.median(extra[extra != 0]))
    about = cause(term, term if only_trained else EVERYWHERE[term], weight=size)
    return Named(cause=about, weights=dict(zip(solver.rows, rows, strict=True)))


def _token_weights(solver: _Solver) -> Named | None:
    """A weight for every token, by which tokens are lost, added or weighted."""
    trained = [t for t in solver.tokens if t.trained]
    if not trained:
        return None
    weights = solver.solve([t.gradient for t in trained])
    if weights is None:
        everything = solver.solve([t.gradient for t in solver.tokens])
        if everything is None:
            return None
        added = [w for t, w in zip(solver.tokens, everything, strict=True) if not t.trained]
        largest = max(added, key=abs)
        kept = [w for t, w in zip(solver.tokens, everything, strict=True) if t.trained]
        about = cause("prompt_trained", "prompt_trained", coefficient=float(largest))
        return Named(cause=about, weights=_by_row(trained, np.array(kept)))
    return Named(cause=_of_weights(trained, weights), weights=_by_row(trained, weights))


def _by_row(tokens: Sequence[Token], weights: np.ndarray) -> dict[int, float]:
    """Return the median weight of each row's tokens that have any."""
    small = thresholds.CLOSE * np.abs(weights).max()
    rows = dict.fromkeys(t.row for t in tokens)
    own = {
        r: [w for t, w in zip(tokens, weights, strict=True) if t.row == r and abs(w) > small] for r in rows
    }
    return {row: float(np.median(values)) if values else 0.0 for row, values in own.items()}


def _of_weights(tokens: Sequence[Token], weights: np.ndarray) -> Cause:
    """Name the weights of tokens, relative to those of most tokens in their row."""
    usual, places = _by_row(tokens, weights), {(t.row, t.place) for t in tokens}
    relative = np.array(
        [w / usual[t.row] if usual[t.row] else 1.0 for t, w in zip(tokens, weights, strict=True)]
    )
    off, lost = np.abs(relative - 1) > thresholds.CLOSE, np.abs(relative) <= thresholds.CLOSE
    for step in (1, -1):  # the last and the first token of each trained part
        at_edge = np.array([(t.row, t.place + step) not in places for t in tokens])
        if not off.any() or (off & ~at_edge).any():
            continue
        if (lost == off).all():
            code = "stop_untrained" if step == 1 and (lost == at_edge).all() else "tokens_untrained"
            return cause(code, "tokens_untrained", tokens=int(lost.sum()))
        if step == 1 and np.ptp(relative[off]) <= thresholds.CLOSE * np.abs(relative[off]).max():
            return cause("stop_overweighted", "stop_overweighted", weight=float(relative[off][0]))
    return cause("token_weights", "token_weights", least=float(weights.min()), most=float(weights.max()))
