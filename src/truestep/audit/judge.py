"""From observations to a verdict and a name.

FAULT: the update depends on how the same batch is split, sharded, padded or packed, or data is lost. DEFAULT:
it does not, and yet is not the textbook step (clipping, weight decay, a constant scale). DOCUMENTED CHOICE: a
fault's pattern that the user asked for by an option away from its default.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from truestep import faults
from truestep.audit import causes, grouping, relations
from truestep.audit.adamw import errors
from truestep.audit.cases import RELATIONS
from truestep.audit.observe import Observation, Step
from truestep.audit.patterns import fit_pattern, hides_weights
from truestep.audit.weights import Recovered, condition_of, recover

NOISE_FACTOR = 10.0  # a right path's error may be so many times the measured noise
RESIDUAL = {"float64": 1e-6, "float32": 2e-3, "bfloat16": 0.2}  # beyond this something else is in the step
ILL_CONDITIONED = 1e3  # beyond this single weights mean nothing
ADAMW_ERROR = 1e-2  # relative; entries whose gradient is noise move by a full step in a random direction
RANKS_EQUAL = 1e-6
CONSTANTS = {"scale", "accumulation_factor", "rank_factor", "empty_counted"}
OF_WEIGHTS = CONSTANTS | {"kept", "micro_mean", "rank_mean", "dp_token_mean"}


class Verdict(enum.StrEnum):
    RIGHT = "RIGHT"
    FAULT = "FAULT"
    DEFAULT = "DEFAULT"
    DOCUMENTED_CHOICE = "DOCUMENTED CHOICE"
    WITHIN_NOISE = "WITHIN NOISE"
    NOT_OBSERVABLE = "NOT OBSERVABLE"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One subject in one configuration."""

    subject: str
    configuration: Mapping[str, Any]
    verdict: Verdict
    fault: str = ""  # in words; also says what a DEFAULT is
    codes: Sequence[str] = ()  # the same for programs, the main one first
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
    location: str = ""  # FILE:LINE where what is audited runs the model
    remedy: str = ""  # a change that was audited again and is RIGHT
    reproducer: str = ""  # a script that shows it, and was run
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.value}


# --------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One step, judged from its own start. No codes: it is right."""

    codes: tuple[str, ...] = ()
    text: str = ""
    recovered: Recovered | None = None
    scale: float = 1.0
    hidden: bool = False  # right as far as one can tell: the noise hides single weights


def see(step: Step, previous: Step | None, dtype: str, parameters: causes.Parameters = ()) -> Seen:
    """Judge one SGD step."""
    if not np.isfinite(step.after).all():
        empty = any(m.num_trained == 0 for m in step.microbatches)
        where = " after a micro-batch without trained tokens" if empty else ""
        return Seen(codes=("not_finite",), text=f"the parameters are no longer finite{where}")
    if not step.num_trained:
        return Seen(codes=("unexplained",), text="a step was taken without any trained token")
    found = recover(step, dtype)
    if found.relative_error <= min(NOISE_FACTOR * found.noise, RESIDUAL[dtype]):
        return Seen(recovered=found)
    limit = max(RESIDUAL[dtype], NOISE_FACTOR * found.noise)
    if found.residual > limit:
        code, text = causes.find(step, previous, found, parameters, limit)
        return Seen(codes=(code,), text=text, recovered=found)
    pattern = fit_pattern(found, dtype)
    if (
        pattern is not None
        and len(pattern.codes) > 1
        and pattern.codes[-1] in CONSTANTS
        and relations.reaches_clip(step)
    ):
        # Other weights have another norm, and were clipped to the right one: the constant says nothing more.
        text = pattern.text.rpartition(", and ")[0]
        return Seen(codes=pattern.codes[:-1], text=text, recovered=found)
    if pattern is not None:
        hidden = not pattern.codes and hides_weights(found)
        return Seen(
            codes=pattern.codes, text=pattern.text, recovered=found, scale=pattern.scale, hidden=hidden
        )
    cause = causes.clipped_parts(step, found)
    shown = ", ".join(f"{w:.3g}" for w in found.weights)
    code, text = cause or ("unknown_weights", f"an unknown pattern of weights [{shown}]")
    return Seen(codes=(code,), text=text, recovered=found)


# --------------------------------------------------------------------------------------------------- one case


@dataclass(frozen=True, kw_only=True)
class CaseSeen:
    """All steps of one case, and what their number and data tell."""

    steps: Sequence[Seen]
    codes: tuple[str, ...]
    text: str


def see_case(run: Observation, dtype: str) -> CaseSeen:
    steps = [see(s, run.steps[i - 1] if i else None, dtype, run.parameters) for i, s in enumerate(run.steps)]
    steps = _related(steps, run, dtype)
    # A schedule that has reached zero moves nothing any more: the rows after that are lost to it.
    stopped = len(run.steps) < run.asked.steps and any("schedule" in s.codes for s in steps)
    order = [] if stopped else grouping.find(run)
    # A step on other rows than asked, divided by the tokens of those that were asked for, is off by a
    # constant.
    regrouped = any(code == "grouping" for code, _ in order)
    named = [s for s in steps if s.codes and not (regrouped and set(s.codes) <= CONSTANTS)]
    texts = list(dict.fromkeys(s.text for s in named))
    codes = list(dict.fromkeys(c for s in named for c in s.codes))
    if texts and len(named) < len(steps):
        texts.append("(not in every step)")
    if codes == ["unexplained"]:
        codes = [_layout_code(run)]
    return CaseSeen(
        steps=steps,
        codes=tuple(dict.fromkeys([*(c for c, _ in order), *codes])),
        text="; ".join([*(t for _, t in order), *texts]),
    )


def _related(steps: Sequence[Seen], run: Observation, dtype: str) -> list[Seen]:
    """Steps with what became of the clip, the schedule and a resume in place of the constants that these look
    like."""
    named: dict[int, causes.Cause] = {}
    if found := relations.resume(run, RESIDUAL[dtype]):
        named = dict.fromkeys(range(run.asked.resume_after, len(steps)), found)
    else:
        scales = [s.scale if set(s.codes) <= OF_WEIGHTS else None for s in steps]
        named |= relations.schedule(run, scales)
        only = [i for i, s in enumerate(steps) if s.codes and s.codes[-1] in ("scale", "accumulation_factor")]
        named = named or dict(relations.clip(run, only)) or _clipped_parts(steps, run)
    result = list(steps)
    for i, (code, text) in named.items():
        kept = tuple(c for c in steps[i].codes if c in OF_WEIGHTS - CONSTANTS)
        parts = steps[i].text.split(", and ")
        if steps[i].codes and steps[i].codes[-1] in CONSTANTS:
            parts.pop()
        words = ", and ".join([*parts, text] if kept else [text])
        result[i] = replace(steps[i], codes=(*kept, code), text=words)
    return result


def _clipped_parts(steps: Sequence[Seen], run: Observation) -> dict[int, causes.Cause]:
    wrong = [i for i, s in enumerate(steps) if s.codes and s.recovered and run.asked.max_grad_norm]
    found = {i: relations.clip_of_parts(run.steps[i], run.asked.accumulation) for i in wrong}
    return {i: cause for i, cause in found.items() if cause}


def _layout_code(run: Observation) -> str:
    """An unexplained rest comes from the layout if lines hold several rows, or rows of different lengths."""
    batches = [m for s in run.steps for m in s.microbatches]
    if any(len(line) > 1 for m in batches for line in m.lines):
        return "packing"
    return "padding" if any(len(m.lines) > 1 for m in batches) else "unexplained"


# ------------------------------------------------------------------------------------------------ the verdict


def judge(
    subject: str,
    configuration: Mapping[str, Any],
    runs: Mapping[str, Observation],
    *,
    documented: str = "",
    without: Mapping[str, str] = MappingProxyType({}),
) -> Finding:
    """All cases of one configuration together. ``documented`` names the option that the user has set away
    from its default, if it is known to change how a step is normalised; ``without`` the cases that it has no
    way to run, and why."""
    if autocast := next((run.autocast for run in runs.values() if run.autocast), ""):
        configuration = {**configuration, "autocast": autocast}
    general: dict[str, Any] = {"subject": subject, "configuration": configuration}
    if not runs:
        return Finding(**general, verdict=Verdict.NOT_RUN, reason="no case was run")
    general["versions"] = next(iter(runs.values())).versions
    general["location"] = next(iter(runs.values())).location
    general["seconds"] = {k: sum(r.seconds.get(k, 0.0) for r in runs.values()) for k in ("run", "reference")}
    some_moved = any(run.steps for run in runs.values())
    unusable = {name: why for name, run in runs.items() if (why := _unusable(run, some_moved))}
    hidden = [f"{name}: {text}" for name, (code, text) in unusable.items() if not code]
    usable = {name: run for name, run in runs.items() if name not in unusable}
    if hidden and not usable:
        return Finding(**general, verdict=Verdict.NOT_OBSERVABLE, reason=hidden[0])
    broken = {n: CaseSeen(steps=(), codes=(code,), text=text) for n, (code, text) in unusable.items() if code}
    if configuration.get("optimizer") == "adamw":
        return _judge_adamw(general, usable, broken)
    dtype = str(configuration.get("dtype", "float32"))
    seen = {name: see_case(run, dtype) for name, run in usable.items()}
    if any(
        _layout_code(run) == "unexplained" and "unexplained" in seen[name].codes
        for name, run in usable.items()
    ):
        seen = {
            name: CaseSeen(
                steps=case.steps,
                codes=tuple("unexplained" if c in ("padding", "packing") else c for c in case.codes),
                text=case.text,
            )
            for name, case in seen.items()
        }  # it is there without padding or packing too
    every = {name: (seen | broken)[name] for name in runs if name in seen | broken}
    verdict, codes, fault = _verdict(every, documented)
    general["cases"] = {name: case.text for name, case in every.items()}
    noisy = [
        f"{n}: rounding in {dtype} hides single weights"
        for n, c in seen.items()
        if any(s.hidden for s in c.steps)
    ]
    general["reason"] = "; ".join([*hidden, *(f"{name}: {why}" for name, why in without.items()), *noisy])
    if not seen:
        return Finding(**general, verdict=verdict, fault=fault, codes=codes)
    name, index = _shown(seen)
    step, found = runs[name].steps[index], seen[name].steps[index].recovered
    if found is None:
        return Finding(**general, verdict=verdict, fault=fault, codes=codes)
    return Finding(
        **general,
        verdict=verdict,
        fault=fault,
        codes=codes,
        tokens=[list(c) for c in found.counts],
        weights=_by_rank(found.weights, found.counts),
        standard_errors=_by_rank(found.errors, found.counts),
        relative_error=found.relative_error,
        residual=found.residual,
        noise=found.noise,
        condition=found.condition,
        logged_loss=step.logged_loss,
        true_loss=step.true_loss,
        logged_loss_could_show_it=_loss_shows_it(step) if codes else None,
    )


def _shown(seen: Mapping[str, CaseSeen]) -> tuple[str, int]:
    """The first step that is wrong, or the first of all."""
    wrong = [(name, i) for name, case in seen.items() for i, s in enumerate(case.steps) if s.codes]
    return wrong[0] if wrong else (next(iter(seen)), 0)


def _unusable(run: Observation, some_moved: bool) -> causes.Cause | None:
    """What makes single steps not worth judging: (code of a fault or "", why). ``some_moved``: in any of the
    cases."""
    if run.not_run:
        return "", f"not run ({run.not_run})"
    if not run.steps:
        if run.forwards_without_step and some_moved:
            return (
                "data_lost",
                f"no optimizer step was taken: {run.forwards_without_step} micro-batches are lost",
            )
        if run.forwards_without_step:
            return "stale_parameters", "no parameter moved: the optimizer does not hold what the model uses"
        return "", "the model was never run in training mode"
    if any(not np.isfinite(s.after).all() for s in run.steps):
        return None
    if run.ranks_differ > RANKS_EQUAL:
        return "ranks_diverge", f"the ranks hold different parameters (by up to {run.ranks_differ:.1e})"
    if run.unmatched:
        return "", f"{run.unmatched} lines that the model was given hold none of the case's rows"
    worst = max((condition_of(s) for s in run.steps if s.num_trained), default=1.0)
    if worst > ILL_CONDITIONED:
        if order := grouping.find(run):  # the same row twice in a step has the same gradient
            return order[0][0], "; ".join(text for _, text in order)
        return "", f"the micro-batches' gradients are nearly parallel (condition {worst:.0e})"
    return None


def _verdict(seen: Mapping[str, CaseSeen], documented: str) -> tuple[Verdict, tuple[str, ...], str]:
    wrong = {name: case for name, case in seen.items() if case.codes}
    if not wrong:
        return Verdict.RIGHT, (), ""
    counted = Counter(c for case in wrong.values() for c in case.codes)
    first = next(iter(wrong.values()))
    codes = tuple(dict.fromkeys([*first.codes, *(c for c, _ in counted.most_common())]))
    for telling, implied in (("sequence_mean", "micro_mean"), ("momentum", "scale")):
        if (
            telling in codes
        ):  # it shows as something simpler where a micro-batch has one row, or no step was before
            told = next(case for case in wrong.values() if telling in case.codes)
            first = told if implied in first.codes else first
            codes = (telling, *(c for c in codes if c not in (telling, implied)))
    text = first.text
    if "not_finite" in codes and "not_finite" not in first.codes:
        text += "; " + next(s.text for case in wrong.values() for s in case.steps if "not_finite" in s.codes)
    plain = {name: case for name, case in seen.items() if name not in RELATIONS}
    everywhere = bool(plain) and set(plain) <= set(wrong)
    if documented and set(codes) <= {"rank_mean", "micro_mean", "dp_token_mean", "sequence_mean", "scale"}:
        return Verdict.DOCUMENTED_CHOICE, codes, f"{first.text} ({documented})"
    scales = [s.scale for case in plain.values() for s in case.steps]
    if set(codes) == {"scale"} and everywhere and len(plain) > 1 and np.ptp(scales) <= 0.01 * abs(scales[0]):
        return (
            Verdict.DEFAULT,
            codes,
            f"everything is multiplied by {scales[0]:.4g}, however a batch is split",
        )
    if set(codes) <= {"clip", "weight_decay"} and everywhere and "own norm" not in first.text:
        return Verdict.DEFAULT, codes, first.text
    return Verdict.FAULT, codes, text


def _judge_adamw(
    general: Mapping[str, Any], runs: Mapping[str, Observation], broken: Mapping[str, CaseSeen]
) -> Finding:
    """The known weight vector whose textbook AdamW updates come closest to the observed ones, over all
    cases."""
    texts = {name: case.text for name, case in broken.items()}
    codes, worst = [], 0.0
    for name, run in runs.items():
        found = errors(run.steps)
        best = next(iter(found), "right")
        worst = max(worst, found.get("right", math.inf))
        texts[name] = ""
        if found.get("right", math.inf) > ADAMW_ERROR:
            named = found.get(best, math.inf) <= ADAMW_ERROR
            texts[name] = faults.FAULTS[best][1] if named else "no known weights explain AdamW's update"
            codes.append(best if named else "unexplained")
    wrong = [text for text in texts.values() if text]
    codes += [code for case in broken.values() for code in case.codes]
    verdict = Verdict.FAULT if wrong else Verdict.RIGHT
    fault = next((texts[name] for name in runs if texts[name]), next(iter(wrong), ""))
    unique = tuple(dict.fromkeys(codes))
    return Finding(**general, verdict=verdict, fault=fault, codes=unique, cases=texts, relative_error=worst)


def _loss_shows_it(step: Step) -> bool | None:
    """Whether the loss that the framework logged for this step is off; None where it logged none."""
    if step.logged_loss is None or not math.isfinite(step.logged_loss):
        return None
    return abs(step.logged_loss - step.true_loss) > 0.02 * abs(step.true_loss)


def _by_rank(values: np.ndarray, counts: Sequence[Sequence[int]]) -> list[list[float]]:
    cuts = np.cumsum([len(c) for c in counts])[:-1]
    return [[float(v) for v in part] for part in np.split(values, cuts)]
