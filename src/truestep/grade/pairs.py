"""Grades a list or file of gold and predicted answers, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truestep.grade.extract import gold_answer
from truestep.grade.formula import refusal, symbolic_form
from truestep.grade.policy import Judgment
from truestep.grade.score import Grader
from truestep.records import Message, Problem, Verdict


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A gold answer and a prediction, which is a bare answer or a whole completion."""

    id: str
    gold: str
    pred: str | None  # None if the model gave no answer, because of a failure
    kind: str = ""  # "choice" if the gold answer is a letter among choices
    choices: tuple[str, ...] = ()


def grade_pairs(
    pairs: Sequence[Pair], *, workers: int = 2, seconds: float = 1.5, second_opinion: bool = False
) -> dict[str, Any]:
    """Grade pairs, and return ``samples`` (one per pair, in order) and ``counts`` in a form that JSON can
    store. ``verdict`` is from the default policy; ``strict`` and ``lenient`` are from ``grade.policy``. If
    ``second_opinion`` is True, math-verify also grades all answers that our rules decided, and
    ``counts["second_opinion"]`` counts the differences."""
    with Grader(workers=workers, seconds=seconds) as grader:
        judged = iter(grader.judge_many([(_problem(p), p.pred) for p in pairs if p.pred is not None]))
        samples = [_nothing(pair) if pair.pred is None else _sample(pair, next(judged)) for pair in pairs]
        second = _second_opinion(grader, pairs, samples) if second_opinion else None
    counts: dict[str, Any] = {"n": len(samples)}
    for policy in ("verdict", "strict", "lenient"):
        found = Counter(sample[policy] for sample in samples)
        counts |= {policy: {verdict.value: found[verdict.value] for verdict in Verdict}}
    counts["extracted"] = sum(bool(sample["extracted"]) for sample in samples)
    return {"samples": samples, "counts": counts | ({"second_opinion": second} if second else {})}


def _problem(pair: Pair) -> Problem:
    checker = "choice" if pair.kind == "choice" or pair.choices else "math"
    messages, meta = (Message(role="user", content=""),), {"choices": pair.choices}
    return Problem(id=pair.id or "?", messages=messages, answer=pair.gold, checker=checker, meta=meta)


def _nothing(pair: Pair) -> dict[str, Any]:
    """Return the sample of a pair without a prediction, which is a failure and not a wrong answer."""
    verdicts = dict.fromkeys(("verdict", "strict", "lenient"), Verdict.UNSCORED.value)
    return {"id": pair.id, **verdicts, "reason": "the prediction is null", "extracted": "", "how": "none"}


def _sample(pair: Pair, judged: Judgment) -> dict[str, Any]:
    return {
        "id": pair.id, "verdict": judged.score.label, "strict": judged.strict.value,
        "lenient": judged.lenient.value,
        "reason": judged.reason, "extracted": judged.score.extracted, "how": judged.answer.how,
    }  # fmt: skip


def _second_opinion(grader: Grader, pairs: Sequence[Pair], samples: list[dict[str, Any]]) -> dict[str, Any]:
    both = zip(pairs, samples, strict=True)
    asked = [(p, s) for p, s in both if s["extracted"] and "algebra" not in s["reason"]]
    texts = [(symbolic_form(gold_answer(p.gold)), symbolic_form(s["extracted"])) for p, s in asked]
    safe = [i for i, pair in enumerate(texts) if not any(map(refusal, pair))]
    outcomes = grader.pool.compare_many([texts[i] for i in safe]) if safe else []
    for i, outcome in zip(safe, outcomes, strict=True):
        asked[i][1]["second"] = {True: "correct", False: "incorrect", None: "unscored"}[outcome.equal]
    given = [s for _, s in asked if s.get("second", "unscored") != "unscored"]
    differ = [s["id"] for s in given if s["second"] != s["verdict"]]
    return {"asked": len(asked), "answered": len(given), "disagree": len(differ), "ids": differ}


def table(result: dict[str, Any]) -> str:
    """Return the samples as lines, with the counts below them."""
    width = max(len(s["id"][:24]) for s in result["samples"])
    lines = [f"{'id':<{width}}  verdict    strict     lenient    reason"]
    for s in result["samples"]:
        policies = "  ".join(f"{s[policy]:<9}" for policy in ("verdict", "strict", "lenient"))
        lines.append(f"{_inert(s['id'][:24]):<{width}}  {policies}  {_inert(s['reason'])}")
    for name, count in result["counts"].items():
        several = ", ".join(f"{k} {v}" for k, v in count.items()) if type(count) is dict else count
        lines.append(f"{name}: {several}")
    return "\n".join(lines)


def _inert(text: str) -> str:
    """Return text without control characters, because a terminal would interpret them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
