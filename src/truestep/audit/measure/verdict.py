"""Turns observations into a verdict and the causes behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from truestep.audit.measure import thresholds
from truestep.audit.measure.decision import Cases, Evidence, decide
from truestep.audit.measure.findings import Causes, Differences, Finding, Verdict, cause
from truestep.audit.measure.observations import Observation, Step
from truestep.audit.measure.one_case import CaseSeen, data_coverage, see_case
from truestep.audit.measure.patterns import by_ranks
from truestep.audit.measure.relations import compare
from truestep.audit.measure.weights import adamw_errors, condition_of

OBJECTIVES = ("token_mean", "sequence_mean", "sum", "other")


def check_objective(name: str) -> None:
    if name not in OBJECTIVES:
        raise ValueError(f"the objective {name!r} is unknown; use {', '.join(OBJECTIVES)}")


def judge(
    subject: str,
    configuration: Mapping[str, Any],
    runs: Mapping[str, Observation],
    *,
    documented: str = "",
    without: Mapping[str, str] = MappingProxyType({}),
    objective: str = "token_mean",
) -> Finding:
    """Judge all cases of one configuration. ``documented`` names an option that is not at its default and is
    known to change how a step is normalized. ``without`` has the cases that cannot be run, and why.
    ``objective`` is what the step should compute; "other" is any that does not depend on the split."""
    if autocast := next((run.autocast for run in runs.values() if run.autocast), ""):
        configuration = {**configuration, "autocast": autocast}
    nothing = Finding(subject=subject, configuration=configuration)
    if not runs:
        return replace(nothing, reasons=(cause("", "no_case"),))
    first = next(iter(runs.values()))
    seconds = {k: sum(r.seconds.get(k, 0.0) for r in runs.values()) for k in ("run", "reference")}
    nothing = replace(nothing, versions=first.versions, location=first.location, seconds=seconds)
    some_moved = any(run.steps for run in runs.values())
    unusable = {name: why for name, run in runs.items() if (why := _unusable(run, some_moved))}
    broken = {name: Differences(data=why) for name, why in unusable.items() if why[0].code}
    reasons = {name: why[0] for name, why in unusable.items() if not why[0].code}
    hidden = [replace(why, values={**why.values, "case": name}) for name, why in reasons.items()]
    usable = {name: run for name, run in runs.items() if name not in unusable}
    if hidden and not usable:
        return replace(nothing, verdict=Verdict.NOT_OBSERVABLE, reasons=(hidden[0],))
    if configuration.get("optimizer") == "adamw":
        return _judge_adamw(nothing, usable, broken)
    dtype = str(configuration.get("dtype", "float32"))
    if first.num_calls is not None:
        dtype = first.dtype or dtype
    seen = _name_layouts({name: see_case(run, dtype) for name, run in usable.items()}, usable)
    differences = broken | {name: case.differences for name, case in seen.items()}
    cases = {name: differences[name] for name in runs if name in differences}
    hidden += [cause("", "case_left_out", case=name, why=why) for name, why in without.items()]
    rounded = [name for name, case in seen.items() if any(s.hidden for s in case.steps)]
    hidden += [cause("", "hidden_by_rounding", case=name, dtype=dtype) for name in rounded]
    compared = compare(usable, dtype)
    finding = decide(nothing, Evidence(cases, seen, compared, documented, objective))
    if finding.verdict is Verdict.NOT_OBSERVABLE:
        hidden = [*finding.reasons, *hidden]
    finding = replace(finding, cases=finding.cases or cases, reasons=tuple(hidden), documented=documented)
    return _with_numbers(finding, seen, runs) if seen else finding


def _with_numbers(finding: Finding, seen: Mapping[str, CaseSeen], runs: Mapping[str, Observation]) -> Finding:
    """Add the weights and sizes of the first wrong step, or of the first step if none is wrong."""
    wrong = [(name, i) for name, case in seen.items() for i, s in enumerate(case.steps) if s.causes]
    name, index = wrong[0] if wrong else (next(iter(seen)), 0)
    step, found = runs[name].steps[index], seen[name].steps[index].recovered
    if found is None:
        return finding
    return replace(
        finding,
        tokens=[list(rank) for rank in found.counts],
        weights=[rank.tolist() for rank in by_ranks(found.weights, found.counts)],
        standard_errors=[rank.tolist() for rank in by_ranks(found.errors, found.counts)],
        **{key: getattr(found, key) for key in ("relative_error", "residual", "noise", "condition")},
        **{key: getattr(step, key) for key in ("logged_loss", "true_loss")},
        logged_loss_could_show_it=loss_shows_it(step) if finding.codes else None,
    )


def _layout_code(run: Observation) -> str:
    """Return the code of an unexplained residual in this layout, which is packing, padding or unexplained."""
    batches = [m for s in run.steps for m in s.microbatches]
    if any(len(line) > 1 for m in batches for line in m.lines):
        return "packing"
    return "padding" if any(len(m.lines) > 1 for m in batches) else "unexplained"


def _name_layouts(seen: Mapping[str, CaseSeen], runs: Mapping[str, Observation]) -> dict[str, CaseSeen]:
    """Give unexplained residuals the code of their layout, unless a plain layout has such a residual too."""
    layouts = {name: _layout_code(run) for name, run in runs.items()}
    if any(layouts[n] == "unexplained" and "unexplained" in c.differences.codes for n, c in seen.items()):
        return dict(seen)
    named = {}
    for name, case in seen.items():
        steps = case.differences.steps
        if {c.code for step in steps for c in step} == {"unexplained"}:
            recoded = tuple(tuple(replace(c, code=layouts[name]) for c in step) for step in steps)
            case = replace(case, differences=replace(case.differences, steps=recoded))
        named[name] = case
    return named


def _unusable(run: Observation, some_moved: bool) -> Causes:
    """Return why single steps cannot be judged, as a fault or a cause without a code. Return () if they can
    be. ``some_moved`` says whether any case took a step."""
    if run.not_run:
        return (cause("", "case_not_run", why=run.not_run),)
    if run.num_cut:
        return (cause("data_lost", "rows_cut", rows=run.num_cut),)
    if not run.steps and not run.forwards_without_step:
        return (cause("", "never_trained"),)
    if not run.steps and run.num_calls == 0:
        return (cause("data_lost", "never_stepped"),)
    if not run.steps and some_moved:
        return (cause("data_lost", "no_step", microbatches=run.forwards_without_step),)
    if not run.steps:
        return (cause("stale_parameters", "nothing_moved"),)
    if any(not np.isfinite(s.after).all() for s in run.steps):
        return ()
    if run.ranks_differ > thresholds.RANKS_EQUAL:
        return (cause("ranks_diverge", "ranks_diverge", difference=run.ranks_differ),)
    if run.unmatched:
        return (cause("", "unknown_lines", lines=run.unmatched),)
    worst = max((condition_of(s) for s in run.steps if s.num_trained), default=1.0)
    if worst <= thresholds.ILL_CONDITIONED:
        return ()
    # If a row is in a step twice, both have the same gradient.
    return data_coverage(run) or (cause("", "ill_conditioned", condition=worst),)


def _judge_adamw(nothing: Finding, runs: Mapping[str, Observation], broken: Cases) -> Finding:
    """Judge AdamW by the known weight vector whose textbook updates come closest to the observed ones."""
    cases, worst = dict(broken), 0.0
    for name, run in runs.items():
        found = adamw_errors(run.steps)
        best, missed = next(iter(found), "right"), found.get("right", math.inf)
        worst, cases[name] = max(worst, missed), Differences()
        if missed > thresholds.ADAMW_ERROR:
            known = found.get(best, math.inf) <= thresholds.ADAMW_ERROR
            named = cause(best, "catalogued", fault=best) if known else cause("unexplained", "unknown_adamw")
            cases[name] = Differences(steps=((named,),))
    wrong = [cases[name] for name in (*runs, *broken) if cases[name].codes]
    codes = tuple(dict.fromkeys(c for case in wrong for c in case.codes))
    verdict, first = (Verdict.FAULT, wrong[0]) if wrong else (Verdict.RIGHT, Differences())
    return replace(nothing, verdict=verdict, found=first, codes=codes, cases=cases, relative_error=worst)


def loss_shows_it(step: Step) -> bool | None:
    """Return whether the loss that the framework logged for this step is wrong, or None if it logged none."""
    if step.logged_loss is None or not math.isfinite(step.logged_loss):
        return None
    return abs(step.logged_loss - step.true_loss) > thresholds.LOSS * abs(step.true_loss)
