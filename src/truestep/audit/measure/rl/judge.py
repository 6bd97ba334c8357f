"""Turns the observations of an RL subject into a verdict, and the causes behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.findings import Causes, Differences, Finding, Verdict, cause
from truestep.audit.measure.rl.alternatives import OBJECTIVES, SPLITS
from truestep.audit.measure.rl.observed import RLObservation
from truestep.audit.measure.rl.search import Seen, explain

RESIDUAL = 5e-3  # share of the gradient that no coefficients explain; a correct float32 step is below 1e-4
PROMPT = 5e-3  # share of the gradient that is from prompt tokens
FACTORS = frozenset({"accumulation_factor", "rank_factor", "split_factor"})


def judge(
    subject: str,
    configuration: Mapping[str, Any],
    runs: Mapping[str, RLObservation],
    *,
    documented: str = "",
    without: Mapping[str, str] = MappingProxyType({}),
) -> Finding:
    """Judge all cases of one configuration together, because one objective must explain all of them."""
    nothing = Finding(subject=subject, configuration=configuration)
    if not runs:
        return replace(nothing, reasons=(cause("", "no_case"),))
    first = next(iter(runs.values()))
    ran = next((run for run in runs.values() if not run.not_run), first)
    seconds = {k: sum(r.seconds.get(k, 0.0) for r in runs.values()) for k in ("run", "reference")}
    nothing = replace(nothing, versions=ran.versions, location=ran.location, seconds=seconds)
    broken = {name: why for name, run in runs.items() if (why := _unusable(run))}
    hidden = [
        replace(why[0], values={**why[0].values, "case": n}) for n, why in broken.items() if not why[0].code
    ]
    faulty = {name: why for name, why in broken.items() if why[0].code}
    usable = {name: run for name, run in runs.items() if name not in broken}
    hidden += [cause("", "case_left_out", case=name, why=why) for name, why in without.items()]
    if not usable and not faulty:
        verdict = Verdict.NOT_RUN if all(run.not_run for run in runs.values()) else Verdict.NOT_OBSERVABLE
        return replace(nothing, verdict=verdict, reasons=tuple(hidden[:1]))
    seen = [Seen(name, s, run.batch(i)) for name, run in usable.items() for i, s in enumerate(run.steps)]
    asked = ran.asked
    nothing = replace(nothing, asked=asked.to_json() if asked else {"reference": "float64"})
    causes, error = _causes(asked, seen) if seen else ((), 0.0)
    lost = tuple(c for why in faulty.values() for c in why)
    finding = _verdict(nothing, causes, lost, documented)
    finding = replace(finding, reasons=tuple(hidden), documented=documented)
    if not seen:
        return finding
    worst = max(seen, key=lambda one: one.fit.residual / max(one.step.norm, 1e-300))
    return replace(
        finding,
        relative_error=error,
        residual=worst.fit.residual / max(worst.step.norm, 1e-300),
        noise=max(one.step.noise for one in seen),
        condition=max(one.fit.condition for one in seen),
    )


def _unusable(run: RLObservation) -> Causes:
    """Return why the steps of a case cannot be judged, as faults or as a cause without a code; () if they can."""
    if run.not_run:
        return (cause("", "case_not_run", why=run.not_run),)
    if not run.steps:
        return (cause("stale_parameters", "nothing_moved"),)
    if not all(step.finite for step in run.steps):
        return (cause("not_finite", "not_finite"),)
    if run.ranks_differ > thresholds.RANKS_EQUAL:
        return (cause("ranks_diverge", "ranks_diverge", difference=run.ranks_differ),)
    if run.unmatched:
        return (cause("", "unknown_lines", lines=run.unmatched),)
    repeated = sum(step.repeated for step in run.steps)
    if repeated:
        return (cause("data_lost", "rows_repeated", rows=repeated),)
    if run.steps[0].expected is not None:
        return ()
    if len(run.steps) != run.case.steps:
        return (cause("data_lost", "rl_steps", found=len(run.steps), asked=run.case.steps),)
    for begin in range(0, len(run.steps), run.case.updates):
        trained = sum((run.steps[begin + i].micro >= 0).astype(int) for i in range(run.case.updates))
        if np.any(np.asarray(trained) != run.case.passes):
            rows = int(np.sum(np.asarray(trained) < run.case.passes))
            return (cause("data_lost", "rl_rows", rows=rows, passes=run.case.passes),)
    worst = max((step.fit.condition for step in run.steps if step.fit.shift == 1), default=1.0)
    return (cause("", "ill_conditioned", condition=worst),) if worst > thresholds.ILL_CONDITIONED else ()


def _causes(asked: Any, seen: Sequence[Seen]) -> tuple[Causes, float]:
    """Return the differences of all steps from the asked objective, and the relative error of what explains them."""
    found: list[Any] = []
    temperature = seen[0].batch.case.temperature
    others = [one.fit for one in seen if one.fit.temperature != temperature]
    if others and others[0].shift == 1:
        found.append(cause("temperature", "rl_temperature", found=others[0].temperature, asked=temperature))
    if shifted := [one.fit.shift for one in seen if one.fit.shift != 1]:
        return (cause(f"shift_{shifted[0]}", "rl_shift", found=shifted[0]),), 1.0
    unexplained = max(one.fit.residual / max(one.step.norm, 1e-300) for one in seen)
    if unexplained > max(RESIDUAL, *(one.allowed for one in seen)):
        return (*found, cause("unexplained", "rl_unexplained", share=unexplained)), unexplained
    if (prompt := max(_prompt_share(one) for one in seen)) > PROMPT:
        found.append(cause("prompt_trained", "rl_prompt", share=prompt))
    if seen[0].step.expected is not None:
        return _against_expected(seen)
    explained = explain(asked, seen)
    if explained is not None and found and found[-1].code == "prompt_trained":
        # A mask that includes the prompts also counts them.
        counts = {"with_prompts", "with_prompt_targets"}
        kept = tuple(c for c in explained.causes if c.values.get("found") not in counts)
        explained = replace(explained, causes=kept)
    if explained is None:
        kind = "rl_unknown_split" if depends_on_split(seen) else "rl_unknown"
        found.append(cause("unknown_objective", kind))
        return tuple(found), 1.0
    return (*found, *explained.causes), explained.error


def _against_expected(seen: Sequence[Seen]) -> tuple[Causes, float]:
    """Compare with coefficients that the subject's own reference has computed."""
    wrong, worst = [], 0.0
    for one in seen:
        assert one.step.expected is not None
        error = one.fit.distance(one.step.expected) / max(one.step.norm, 1e-300)
        worst = max(worst, error)
        if not error <= one.allowed:
            wrong.append(one.step.label)
    names = tuple(dict.fromkeys(wrong))
    return ((cause("unknown_objective", "rl_reference", methods=names),) if names else ()), worst


def _prompt_share(one: Seen) -> float:
    part = np.zeros(one.batch.size)
    begin = len(one.batch.row)
    prompts = slice(begin, begin + sum(one.batch.prompt_tokens))
    part[prompts] = one.fit.coefficients[prompts]
    return float(np.sqrt(max(0.0, part @ one.fit.gram @ part)) / max(one.step.norm, 1e-300))


def depends_on_split(seen: Sequence[Seen]) -> bool:
    """Return whether the first step, which trains on the same samples in several cases, has other coefficients
    if the samples are split into other micro-batches. No objective is assumed."""
    firsts: dict[str, Seen] = {}
    for one in seen:
        firsts.setdefault(one.name, one)
    whole = [one for one in firsts.values() if one.batch.present.all()]
    for other in whole[1:]:
        norm = max(whole[0].step.norm, 1e-300)
        if whole[0].fit.distance(other.fit.coefficients) / norm > whole[0].allowed + other.allowed:
            return True
    return False


def _verdict(nothing: Finding, causes: Causes, lost: Causes, documented: str) -> Finding:
    codes = tuple(dict.fromkeys(c.code for c in (*lost, *causes)))
    if not codes:
        return replace(nothing, verdict=Verdict.RIGHT)
    found = Differences(data=lost, steps=(causes,) if causes else ())
    nothing = replace(nothing, codes=codes, found=found)
    if documented and not lost and set(codes) <= SPLITS | FACTORS | OBJECTIVES:
        return replace(nothing, verdict=Verdict.DOCUMENTED_CHOICE)
    if set(codes) <= OBJECTIVES:
        return replace(nothing, verdict=Verdict.DEFAULT)
    return replace(nothing, verdict=Verdict.FAULT)
