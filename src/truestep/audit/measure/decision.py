"""Decides on a verdict: by the relations between the cases first, and by the reference second.

A step whose update is the same however its rows are split, ordered and padded has no fault, whatever it computes,
unless data or tokens are lost or added. Only if it also is the mean over all trained tokens, it is RIGHT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from truestep.audit.measure import objectives, thresholds
from truestep.audit.measure.cases import RELATIONS
from truestep.audit.measure.findings import Cause, Causes, Differences, Finding, Verdict, cause
from truestep.audit.measure.one_case import CaseSeen
from truestep.audit.measure.patterns import Seen
from truestep.audit.measure.relations import Compared

Cases = Mapping[str, Differences]
OF_PARTS = {
    "clip_of_micro_batches",
    "clip_of_ranks",
    "clip_after_every_micro_batch",
}  # these depend on how a batch is split
CHOICES = {"rank_mean", "micro_mean", "dp_token_mean", "sequence_mean", "scale"}
# Codes of what a step may compute instead of a mean over all tokens. Nothing else has gradients like the first group;
# the second can also come from how a batch is split or ordered, so it needs relations.
KNOWN = {
    "label_smoothing", "z_loss", "entropy", "logits_squared", "focal", "dft", "token_weights", "sequence_mean", "sum",
    "other_count", "clip", "weight_decay",
}  # fmt: skip
BY_SPLIT = {"scale", "unexplained"}
BY_ORDER = {"unknown_weights", "accumulation_factor", "empty_counted", "micro_mean"}
KINDS = {
    "unsplit": ("split", "differs_by_split"), "masked_unsplit": ("split", "differs_by_split"),
    "reordered": ("order", "differs_by_order"), "padded": ("padding", "differs_by_padding"),
}  # fmt: skip
VAGUE = KNOWN - {"sequence_mean"} | {"unexplained", "padding", "packing"}
RANDOM = "repeated"  # the case that repeats another one exactly


@dataclass(frozen=True)
class Evidence:
    """What is known of one configuration."""

    cases: Cases
    seen: Mapping[str, CaseSeen]
    compared: Mapping[str, Compared]
    documented: str
    objective: str

    @property
    def broken(self) -> list[Compared]:
        return [c for c in self.compared.values() if not c.equal]

    @property
    def invariant(self) -> bool:
        """Whether the update is the same for every split that was run."""
        return "unsplit" in self.compared and not self.broken

    @property
    def allowed(self) -> set[str]:
        """The codes that are another objective and not a fault."""
        if not self.invariant:
            return set()
        return KNOWN | BY_SPLIT | (BY_ORDER if "reordered" in self.compared else set())


def decide(nothing: Finding, evidence: Evidence) -> Finding:
    """Return the verdict with its causes."""
    evidence = replace(evidence, cases=_alike(evidence))
    cases = evidence.cases
    wrong = {name: case for name, case in cases.items() if case.codes}
    if not wrong:
        return _declared(replace(nothing, verdict=Verdict.RIGHT, cases=cases), evidence.objective)
    codes, first = _main(wrong)
    nothing = replace(nothing, codes=codes, found=first, cases=cases)
    if evidence.documented and set(codes) <= CHOICES:
        return replace(nothing, verdict=Verdict.DOCUMENTED_CHOICE)
    if evidence.invariant and evidence.objective == "other" and not any(c.data for c in wrong.values()):
        return replace(nothing, verdict=Verdict.RIGHT, codes=(), found=Differences())
    if set(codes) <= evidence.allowed | {"grouping"} and _is_default(wrong, evidence):
        if set(codes) == {"scale"} and "scale" in wrong.get("ragged", Differences()).codes:
            told = _constant(evidence) if first.steps[0][0].kinds == ("scale",) else None
            nothing = replace(nothing, found=Differences(steps=((told,),)) if told else first)
        return _declared(replace(nothing, verdict=Verdict.DEFAULT), evidence.objective)
    if found := _default_by_reference(codes, first, wrong, evidence):
        return _declared(replace(nothing, verdict=Verdict.DEFAULT, found=found), evidence.objective)
    if RANDOM in {c.case for c in evidence.broken} and set(codes) <= VAGUE | BY_SPLIT | BY_ORDER:
        share = evidence.compared[RANDOM].difference
        return replace(
            nothing, verdict=Verdict.NOT_OBSERVABLE, codes=(), found=Differences(),
            reasons=(cause("", "random", share=share),),
        )  # fmt: skip
    if "not_finite" in codes and "not_finite" not in first.codes:
        lost = next(step for case in wrong.values() for step in case.steps if step[0].code == "not_finite")
        first = replace(first, steps=(*first.steps, lost))
    return _with_relation(replace(nothing, verdict=Verdict.FAULT, found=first), evidence)


def _alike(evidence: Evidence) -> dict[str, Differences]:
    """Return the differences of the cases, by what their relations tell: a case with the same update as its base
    has the same differences, and if all splits give the same update, a mean over each micro-batch of one row is
    a mean over each row."""

    def renamed(c: Cause, seen: Seen) -> Cause:
        if c.code == "micro_mean":
            return cause("sequence_mean", "sequence_mean")
        by_part = c.code in ("decaying_weights", "unknown_weights") or OF_PARTS & {*c.kinds}
        if by_part and seen.recovered is not None and "reordered" in evidence.compared:
            return cause("unknown_weights", "rows_weighted", weights=seen.recovered.weights.tolist())
        return c

    cases = dict(evidence.cases)
    if evidence.invariant:
        for name, seen in evidence.seen.items():
            pairs = [(s.causes, tuple(renamed(c, s) for c in s.causes)) for s in seen.steps]
            steps = [next((new for old, new in pairs if old == step), step) for step in cases[name].steps]
            distinct = tuple(step for i, step in enumerate(steps) if step not in steps[:i])
            cases[name] = replace(cases[name], steps=distinct)
    vague = KNOWN | BY_SPLIT | BY_ORDER | {"padding", "packing"}
    for name, found in evidence.compared.items():
        if found.equal and name in cases and set(cases[name].codes) <= vague and cases[name].codes:
            cases[name] = cases.get(found.base, cases[name])
    return cases


def _main(wrong: Cases) -> tuple[tuple[str, ...], Differences]:
    """Return all codes, the main one first, and the case that shows it."""
    counted = Counter(c for case in wrong.values() for c in case.codes)
    first = next(iter(wrong.values()))
    codes = tuple(dict.fromkeys([*first.codes, *(c for c, _ in counted.most_common())]))
    for telling, implied in (
        ("sequence_mean", "micro_mean"),
        ("padding", "other_count"),
        ("momentum", "scale"),
        ("not_cleared", "scale"),
    ):
        # The fault looks like a simpler one if a micro-batch has one row, or if there was no step before.
        if telling in codes:
            told = next(case for case in wrong.values() if telling in case.codes)
            first = told if implied in first.codes else first
            codes = (telling, *(c for c in codes if c not in (telling, implied)))
    return codes, first


def _is_default(wrong: Cases, evidence: Evidence) -> bool:
    """Return whether differences with allowed codes are the same for every split, also at the end of an epoch."""
    kinds = {kind for case in wrong.values() for step in case.steps for c in step for kind in c.kinds}
    data = {kind for case in wrong.values() for c in case.data for kind in c.kinds}
    if kinds & OF_PARTS or data - {"window_over_end"}:
        return False
    usual, window = wrong.get("ragged", Differences()), evidence.cases.get("window", Differences())
    if not set(window.codes) <= {*usual.codes, "grouping"}:
        return False
    return "scale" not in usual.codes or (usual.in_every_step and _constant(evidence) is not None)


def _constant(evidence: Evidence) -> Cause | None:
    """Return what the sum over all trained tokens is multiplied by, if it is a constant: of the mean, of the sum,
    or of the sum divided by the number of rows."""
    steps = [s for name in ("ragged", "window") if name in evidence.seen for s in evidence.seen[name].steps]
    found = [(s.scale, s.recovered) for s in steps if s.recovered is not None]
    tokens = np.array([sum(map(sum, r.counts)) for _, r in found], dtype=float)
    rows = np.array([max(1, len(r.lengths)) for _, r in found], dtype=float)
    scales = np.array([scale for scale, _ in found])
    for kind, divided_by in (
        ("scale_of_every_split", 1.0),
        ("constant_divisor", tokens),
        ("divisor_per_row", tokens / rows),
    ):
        constant = scales / divided_by
        if len(constant) and np.ptp(constant) <= thresholds.CLOSE * abs(constant[0]):
            return cause("scale", kind, scale=float(constant[0]), divisor=float(1 / constant[0]))
    return None


def _same_scale(names: tuple[str, ...] | list[str], evidence: Evidence) -> bool:
    scales = [s.scale for name in names if name in evidence.seen for s in evidence.seen[name].steps]
    return bool(scales) and bool(np.ptp(scales) <= thresholds.CLOSE * abs(scales[0]))


def _default_by_reference(
    codes: tuple[str, ...], first: Differences, wrong: Cases, evidence: Evidence
) -> Differences | None:
    """Return what differs if it is the same in every case, although no two cases could be compared."""
    plain = [name for name in evidence.cases if name not in RELATIONS]
    everywhere = bool(plain) and set(plain) <= set(wrong)
    if set(codes) == {"scale"} and everywhere and len(plain) > 1 and _same_scale(plain, evidence):
        return Differences(steps=((first.steps[0][0],),))
    kinds = {kind for step in first.steps for c in step for kind in c.kinds}
    if set(codes) == {"other_count"} or {kind for c in first.data for kind in c.kinds} == {"window_over_end"}:
        return first if set(codes) <= {"other_count", "grouping"} else None
    if set(codes) <= KNOWN - {"sequence_mean", "token_weights"} and everywhere and not kinds & OF_PARTS:
        return first
    return None


def _with_relation(finding: Finding, evidence: Evidence) -> Finding:
    """Add how the update depends on the split, if nothing else says so."""
    # What a step computes is no fault, so the faults come first.
    codes = tuple(sorted(finding.codes, key=lambda c: c in objectives.CODES | {"unexplained"}))
    finding = replace(finding, codes=codes)
    kinds = {kind for step in finding.found.steps for c in step for kind in c.kinds}
    if not set(codes) <= VAGUE or codes[0] in ("padding", "packing") or kinds & OF_PARTS:
        return finding
    worst = next((c for c in evidence.broken if c.case in KINDS), None)
    if worst is None:
        return finding
    code, kind = KINDS[worst.case]
    told: Causes = (cause(code, kind, share=worst.difference),)
    codes = tuple(dict.fromkeys((*codes, code)))
    return replace(finding, codes=codes, found=replace(finding.found, data=(*told, *finding.found.data)))


def _declared(finding: Finding, objective: str) -> Finding:
    """Turn RIGHT and DEFAULT around if the step should compute something other than the mean over all tokens."""
    if objective in ("token_mean", "other"):
        return finding
    if finding.verdict is Verdict.RIGHT:
        told = Differences(steps=((cause("token_mean", "token_mean"),),))
        return replace(finding, verdict=Verdict.DEFAULT, codes=("token_mean",), found=told)
    if set(finding.codes) == {objective}:
        return replace(finding, verdict=Verdict.RIGHT, codes=(), found=Differences())
    return finding
