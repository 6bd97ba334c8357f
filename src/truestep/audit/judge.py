"""From recovered weights to a verdict and a name.

A pattern is kept × normaliser × scale: which micro-batches reached the optimizer, what their tokens were divided by,
and one constant. Names come from the structure of the weights: a fault that nobody has seen is still described.

FAULT: the update depends on how the same batch is split, sharded, padded or packed, or data is lost. DEFAULT: it does
not, and yet is not the textbook step (clipping, weight decay, a constant scale). DOCUMENTED CHOICE: a fault's pattern
that the user asked for by an option away from its default.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from truestep.audit.adamw import errors
from truestep.audit.observe import Observation, Step
from truestep.audit.weights import Recovered, observed_gradient, recover
from truestep.reference import faults

TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "bfloat16": 0.15}  # of a weight; real faults start at 6e-2
NOISE_FACTOR = 10.0  # a right path's error may be so many times the measured noise
RESIDUAL = {"float64": 1e-6, "float32": 2e-3, "bfloat16": 0.2}
EXPLAINED = 20.0  # a cause must shrink the residual by this factor
ILL_CONDITIONED = 1e3  # beyond this single weights mean nothing


class Verdict(enum.StrEnum):
    RIGHT = "RIGHT"
    FAULT = "FAULT"
    DEFAULT = "DEFAULT"
    DOCUMENTED_CHOICE = "DOCUMENTED CHOICE"
    WITHIN_NOISE = "WITHIN NOISE"
    NOT_OBSERVABLE = "NOT OBSERVABLE"
    NOT_RUN = "NOT RUN"


NORMALISERS: dict[str, tuple[faults.WeightsOf, str]] = {
    "global": (faults.right, ""),
    "rank_mean": (faults.rank_mean, "rank-wise mean"),
    "micro_mean": (faults.micro_mean, "mean of micro-batch means"),
    "dp_token_mean": (faults.dp_token_mean, "mean over the tokens of each micro-step"),
}
CAUSES = {
    "prompt": "tokens outside the mask are trained",
    "shift_0": "labels are not shifted",
    "shift_2": "labels are shifted twice",
    "weight_decay": "weight decay",
    "momentum": "part of the step before is applied again (momentum, or gradients that were not cleared)",
}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """kept × normaliser × scale; ``deviation`` is the largest distance of a weight from it."""

    kept: tuple[tuple[bool, ...], ...]  # per rank
    normaliser: str
    scale: float
    deviation: float

    @property
    def is_right(self) -> bool:
        return all(map(all, self.kept)) and self.normaliser == "global" and self.scale == 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One subject in one configuration."""

    subject: str
    configuration: Mapping[str, Any]
    verdict: Verdict
    fault: str = ""  # in words; also says what a DEFAULT is
    reason: str = ""  # of NOT RUN, NOT OBSERVABLE
    versions: Mapping[str, str] = field(default_factory=dict)
    cases: Mapping[str, str] = field(default_factory=dict)  # case → what was seen there, in words
    tokens: Sequence[Sequence[int]] = ()  # of the step that is shown, per rank
    weights: Sequence[Sequence[float]] = ()
    standard_errors: Sequence[Sequence[float]] = ()
    relative_error: float | None = None
    residual: float | None = None
    noise: float | None = None
    condition: float | None = None
    logged_loss: float | None = None
    true_loss: float | None = None
    logged_loss_could_show_it: bool | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.value}


# ------------------------------------------------------------------------------------------------------------ patterns


def fit_pattern(recovered: Recovered, dtype: str) -> Pattern | None:
    """The simplest pattern that the weights obey within their errors; None where none does."""
    weights, errors = recovered.weights, np.maximum(5 * recovered.errors, TOLERANCE[dtype])
    kept = np.abs(weights) > np.maximum(errors, 0.02 * np.abs(weights).max())
    if not kept.any():
        return None
    shape = [len(rank) for rank in recovered.counts]
    for name, (weights_of, _) in NORMALISERS.items():
        try:
            predicted = weights_of(recovered.counts)
        except ValueError:
            continue  # ranks with unequal numbers of micro-batches have no micro-step
        scale = float(np.median(weights[kept] / predicted[kept]))
        deviation = np.abs(weights - scale * predicted * kept)
        if (deviation <= errors * max(1.0, abs(scale) * float(predicted[kept].max()))).all():
            return Pattern(
                kept=tuple(tuple(map(bool, part)) for part in np.split(kept, np.cumsum(shape)[:-1])),
                normaliser=name,
                scale=1.0 if abs(scale - 1) <= float(errors.max()) else scale,
                deviation=float(deviation.max()),
            )
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * abs(b)


def describe_scale(scale: float, accumulation: int, ranks: int, kept_share: float = 1.0) -> str:
    """The constant in words; several readings where they coincide."""
    if scale == 1.0:
        return ""
    known = {
        "the division by the accumulation steps is missing": float(accumulation),
        "divided by the accumulation steps twice": 1 / accumulation,
        "summed over ranks instead of averaged": float(ranks),
        "divided by the number of ranks twice": 1 / ranks,
        "multiplied by ranks and accumulation steps": float(ranks * accumulation),
        "divided by ranks and accumulation steps twice": 1 / (ranks * accumulation),
        "divided by the tokens that were kept": 1 / kept_share,
    }
    fitting = [text for text, value in known.items() if value != 1.0 and _close(scale, value)]
    return " or ".join(fitting[:2]) if fitting else f"everything is multiplied by {scale:.4g}"


def describe_kept(kept: Sequence[Sequence[bool]]) -> str:
    """Which micro-batches are missing, in words."""
    flat = [k for rank in kept for k in rank]
    if all(flat):
        return ""
    if len({tuple(rank) for rank in kept}) > 1:
        gone = [f"rank {r}: {_numbers(rank)}" for r, rank in enumerate(kept) if not all(rank)]
        return f"micro-batches dropped ({'; '.join(gone)})"
    rank = list(kept[0])
    size = len(rank)
    if size > 2 and rank == [True] + [False] * (size - 2) + [True]:
        return "the intermediate micro-batches are dropped"
    if rank == [False] * (size - 1) + [True]:
        return "every backward overwrote the one before: only the last micro-batch counts"
    if rank == [True] + [False] * (size - 1):
        return "only the first micro-batch counts"
    return f"micro-batches dropped ({_numbers(rank)} of {size})"


def _numbers(rank: Sequence[bool]) -> str:
    return ", ".join(str(i + 1) for i, k in enumerate(rank) if not k)


def describe(pattern: Pattern, recovered: Recovered) -> str:
    """The pattern in words; "" if it is right."""
    counts = recovered.counts
    total = sum(map(sum, counts))
    kept = sum(n for ns, ks in zip(counts, pattern.kept, strict=True) for n, k in zip(ns, ks, strict=True) if k)
    accumulation = max(len(rank) + sum(r == i for r, _ in recovered.empty) for i, rank in enumerate(counts))
    parts = [
        describe_kept(pattern.kept),
        NORMALISERS[pattern.normaliser][1],
        describe_scale(pattern.scale, accumulation, len(counts), kept / total),
    ]
    return ", and ".join(p for p in parts if p)


# ------------------------------------------------------------------------------------------------------------ one step


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One step, judged from its own start."""

    text: str  # "" if it is right
    kind: str  # right, kept, normaliser, scale, cause, unknown, broken
    recovered: Recovered | None
    scale: float = 1.0


def see(step: Step, previous: Step | None, dtype: str) -> Seen:
    """Judge one SGD step."""
    if not np.isfinite(step.after).all():
        empty = any(m.num_trained == 0 for m in step.microbatches)
        text = "the parameters are no longer finite" + (" after a micro-batch without trained tokens" if empty else "")
        return Seen(text=text, kind="broken", recovered=None)
    if not step.num_trained:
        return Seen(text="a step was taken without any trained token", kind="broken", recovered=None)
    found = recover(step, dtype)
    if found.relative_error <= min(NOISE_FACTOR * found.noise, RESIDUAL[dtype]):
        return Seen(text="", kind="right", recovered=found)
    if found.residual > max(RESIDUAL[dtype], NOISE_FACTOR * found.noise):
        cause = _cause(step, previous, found)
        return cause or Seen(
            text=f"{100 * found.residual:.1f} % of the gradient is explained by no weights of the micro-batches",
            kind="unknown",
            recovered=found,
        )
    pattern = fit_pattern(found, dtype)
    if pattern is None:
        shown = ", ".join(f"{w:.3g}" for w in found.weights)
        return Seen(text=f"an unknown pattern of weights [{shown}]", kind="unknown", recovered=found)
    text = describe(pattern, found)
    kind = "right" if not text else "kept" if not all(map(all, pattern.kept)) else "normaliser"
    if kind == "normaliser" and pattern.normaliser == "global":
        kind = "scale"
    return Seen(text=text, kind=kind, recovered=found, scale=pattern.scale)


def _cause(step: Step, previous: Step | None, found: Recovered) -> Seen | None:
    """The one addition that explains what the weights do not, if there is one."""
    observed = observed_gradient(step)
    used = [m.gradient / step.num_trained for m in step.microbatches if m.num_trained]
    candidates = {k: v / step.num_trained for k, v in step.extras.items()} | {"weight_decay": step.before}
    if previous is not None:
        candidates["momentum"] = observed_gradient(previous)
    best: tuple[float, str, float] | None = None
    for name, column in candidates.items():
        if not np.linalg.norm(column):
            continue
        weights, residual, _ = faults.recover_weights(observed, [*used, column])
        if residual * EXPLAINED <= found.residual and (best is None or residual < best[0]):
            best = (residual, name, float(weights[-1]))
    if best is None:
        return None
    _, name, amount = best
    return Seen(text=f"{CAUSES[name]} (coefficient {amount:.3g})", kind="cause:" + name, recovered=found)


# --------------------------------------------------------------------------------------------------------- the verdict


def judge(
    subject: str, configuration: Mapping[str, Any], runs: Mapping[str, Observation], *, documented: str = ""
) -> Finding:
    """All cases of one configuration together. ``documented`` names the option that the user has set away from its
    default, if it is known to change how a step is normalised."""
    dtype = str(configuration.get("dtype", "float32"))
    if configuration.get("optimizer") == "adamw":
        return judge_adamw(subject, configuration, runs)
    shown: Seen | None = None
    step: Step | None = None
    texts: dict[str, str] = {}
    seen: dict[str, list[Seen]] = {}
    for name, run in runs.items():
        problem = _unusable(run)
        if problem:
            return Finding(
                subject=subject,
                configuration=configuration,
                verdict=Verdict.FAULT if problem.startswith("fault: ") else Verdict.NOT_OBSERVABLE,
                fault=problem.removeprefix("fault: ") if problem.startswith("fault: ") else "",
                reason="" if problem.startswith("fault: ") else f"{name}: {problem}",
                versions=run.versions,
            )
        seen[name] = [see(s, run.steps[i - 1] if i else None, dtype) for i, s in enumerate(run.steps)]
        texts[name] = _summary(seen[name], run)
        wrong = [i for i, s in enumerate(seen[name]) if s.kind != "right"]
        if shown is None or (shown.kind == "right" and wrong):
            index = wrong[0] if wrong else 0
            shown, step = seen[name][index], run.steps[index]
    if shown is None or step is None:
        return Finding(subject=subject, configuration=configuration, verdict=Verdict.NOT_RUN, reason="no case was run")
    verdict, fault = _verdict(seen, texts, documented)
    found = shown.recovered
    return Finding(
        subject=subject,
        configuration=configuration,
        verdict=verdict,
        fault=fault,
        versions=next(iter(runs.values())).versions,
        cases=texts,
        tokens=[] if found is None else [list(c) for c in found.counts],
        weights=[] if found is None else _by_rank(found.weights, found.counts),
        standard_errors=[] if found is None else _by_rank(found.errors, found.counts),
        relative_error=None if found is None else found.relative_error,
        residual=None if found is None else found.residual,
        noise=None if found is None else found.noise,
        condition=None if found is None else found.condition,
        logged_loss=step.logged_loss,
        true_loss=step.true_loss,
        logged_loss_could_show_it=_loss_shows_it(step) if shown.kind != "right" else None,
        seconds={k: sum(r.seconds.get(k, 0.0) for r in runs.values()) for k in ("run", "reference")},
    )


ADAMW_ERROR = 1e-2  # relative; entries whose gradient is noise move by a full step in a random direction


def judge_adamw(subject: str, configuration: Mapping[str, Any], runs: Mapping[str, Observation]) -> Finding:
    """The known weight vector whose textbook AdamW updates come closest to the observed ones, over all cases."""
    texts: dict[str, str] = {}
    worst = 0.0
    for name, run in runs.items():
        found = errors(run.steps)
        if not found:
            problem = _unusable(run).removeprefix("fault: ") or "no step was observed"
            return Finding(subject=subject, configuration=configuration, verdict=Verdict.FAULT, fault=problem)
        best = next(iter(found))
        worst = max(worst, found["right"])
        if found["right"] <= ADAMW_ERROR:
            texts[name] = ""
        elif found[best] <= ADAMW_ERROR:
            texts[name] = faults.FAULTS[best][1]
        else:
            texts[name] = f"AdamW's update is {100 * found['right']:.0f} % off, and no known weights explain it"
    wrong = [text for text in texts.values() if text]
    return Finding(
        subject=subject,
        configuration=configuration,
        verdict=Verdict.FAULT if wrong else Verdict.RIGHT,
        fault=wrong[0] if wrong else "",
        versions=next(iter(runs.values())).versions,
        cases=texts,
        relative_error=worst,
        seconds={k: sum(r.seconds.get(k, 0.0) for r in runs.values()) for k in ("run", "reference")},
    )


def _unusable(run: Observation) -> str:
    if not run.steps:
        if run.forwards_without_step:
            return "fault: no parameter moved: the optimizer does not hold the parameters that the model uses"
        return "the model was never run in training mode"
    if run.unmatched:
        return f"{run.unmatched} lines that the model was given hold none of the case's rows"
    if run.ranks_differ > 1e-6:
        return f"fault: the ranks hold different parameters (by up to {run.ranks_differ:.1e})"
    worst = max((recover(s).condition for s in run.steps if s.num_trained and np.isfinite(s.after).all()), default=1.0)
    if worst > ILL_CONDITIONED:
        return f"the micro-batches' gradients are nearly parallel (condition {worst:.0e})"
    return ""


def _summary(steps: Sequence[Seen], run: Observation) -> str:
    texts = list(dict.fromkeys(s.text for s in steps if s.kind != "right"))
    lost = run.forwards_without_step
    if lost:
        texts.append(f"data is lost: {lost} micro-batch{'es' if lost > 1 else ''} reached no optimizer step")
    if texts and any(s.kind == "right" for s in steps) and not lost:
        texts.append("(not in every step)")
    return "; ".join(texts)


def _verdict(seen: Mapping[str, list[Seen]], texts: Mapping[str, str], documented: str) -> tuple[Verdict, str]:
    wrong = {name: text for name, text in texts.items() if text}
    if not wrong:
        return Verdict.RIGHT, ""
    kinds = {s.kind for steps in seen.values() for s in steps if s.kind != "right"}
    first = next(iter(wrong.values()))
    if documented and kinds <= {"normaliser", "scale"}:
        return Verdict.DOCUMENTED_CHOICE, f"{first} ({documented})"
    if kinds == {"scale"} and len(seen) > 1 and set(wrong) == set(seen):
        scales = [s.scale for steps in seen.values() for s in steps]
        if max(scales) - min(scales) <= 0.01 * abs(scales[0]):
            return Verdict.DEFAULT, f"everything is multiplied by {scales[0]:.4g}, however a batch is split"
    if kinds == {"cause:weight_decay"}:
        return Verdict.DEFAULT, first
    return Verdict.FAULT, first


def _loss_shows_it(step: Step) -> bool | None:
    """Whether the loss that the framework logged for this step is off; None where it logged none."""
    if step.logged_loss is None or not math.isfinite(step.logged_loss):
        return None
    return abs(step.logged_loss - step.true_loss) > 0.02 * abs(step.true_loss)


def _by_rank(values: np.ndarray, counts: Sequence[Sequence[int]]) -> list[list[float]]:
    cuts = np.cumsum([len(c) for c in counts])[:-1]
    return [[float(v) for v in part] for part in np.split(values, cuts)]
