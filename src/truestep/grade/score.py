"""Grades completions as correct, incorrect, or unscored with a reason.

Grading a completion raises an error only if no completion of its problem could be scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

from truestep.errors import UserError
from truestep.grade.choices import choice_letter, choice_letters, extract_choice, extract_truth
from truestep.grade.countdown import check_countdown
from truestep.grade.equivalent import Decision, decide, questions, same_integer
from truestep.grade.extract import Extraction, extract_answer, gold_answer
from truestep.grade.formula import symbolic_form
from truestep.grade.normal import canonical, normalise, plain
from truestep.grade.policy import Judgment, judgment
from truestep.grade.pool import Pool
from truestep.grade.rational import same_formula
from truestep.records import Problem, Score, Verdict, judged

MAX_SHOWN = 2_000  # characters of an answer that are kept in a score


# A question that only algebra can answer: is each of these pairs of formulas equal?
Question = list[tuple[str, str]]


def find_answer(problem: Problem, text: str) -> Extraction:
    """Return the answer that a completion gives to a problem, by the rules for the kind of problem. A completion
    that is the gold answer is the answer."""
    gold = gold_answer(problem.answer)
    whole = normalise(text) if len(text) <= min(MAX_SHOWN, 100 + 4 * len(gold)) else ""
    if whole and canonical(whole) == canonical(gold):
        return Extraction(answer=whole, how="whole")
    if problem.checker == "choice":
        return extract_choice(text, _choices(problem))
    if plain(gold).casefold() in ("yes", "no", "true", "false"):
        return extract_truth(text)
    return extract_answer(text)


def _choices(problem: Problem) -> list[str]:
    choices = problem.meta.get("choices")
    return [str(choice) for choice in choices] if isinstance(choices, list | tuple) else []


def _score(equal: bool | None, extracted: str, reason: str, *, unreadable: bool = False) -> Score:
    verdict = {True: Verdict.CORRECT, False: Verdict.INCORRECT, None: Verdict.UNSCORED}[equal]
    return judged(verdict, extracted=extracted[:MAX_SHOWN], reason=reason, unreadable=unreadable)


def _check_math(problem: Problem, found: str) -> Score | Question:
    gold = gold_answer(problem.answer)
    decision = decide(gold, found)
    if decision.equal is None and not decision.reason:
        return [(symbolic_form(a), symbolic_form(b)) for a, b in questions(gold, found)]
    return _score(decision.equal, found, decision.reason, unreadable=decision.unreadable)


def _check_exact(problem: Problem, found: str) -> Score | Question:
    return _score(canonical(gold_answer(problem.answer)) == canonical(found), found, "compared as text")


def _check_integer(problem: Problem, found: str) -> Score | Question:
    equal = same_integer(gold_answer(problem.answer), found)
    unread = f"the gold answer {problem.answer[:80]!r} is not a number"
    return _score(equal, found, unread if equal is None else "compared as numbers")


def _check_choice(problem: Problem, found: str) -> Score | Question:
    gold, texts = gold_answer(problem.answer), [normalise(choice) for choice in _choices(problem)]
    if several := choice_letters(gold):
        return _score(choice_letters(found) == several, found, "compared as choices")
    letter = _lettered(gold)
    if not letter:
        equal = same_integer(gold, found)  # the choices are numbered
        unread = f"{gold[:80]!r} does not name a choice"
        return _score(equal, found, unread if equal is None else "compared as choices")
    named = choice_letter(found)
    if not named:  # the text of a choice, or its number
        same = [place for place, text in enumerate(texts) if decide(text, found).equal]
        if not same and re.fullmatch(r"[1-9]", found) and int(found) <= len(texts):
            same = [int(found) - 1]
        named = chr(ord("A") + same[0]) if len(same) == 1 else _lettered(found)
    return _score(named == letter, found, "compared as choices")


def _lettered(text: str) -> str:
    """Return the letter of "(b)", "[b]" or "b) 42" as a capital, or what ``choice_letter`` finds."""
    small = re.fullmatch(r"[(\[]?([a-j])(?:[)\]]?|[).:]\s.*)", text)
    return small[1].upper() if small else choice_letter(text)


def _check_countdown(problem: Problem, found: str) -> Score | Question:
    numbers: Any = problem.meta.get("numbers")
    target: Any = problem.meta.get("target")
    if not isinstance(numbers, list | tuple) or not all(type(n) is int for n in (*numbers, target)):
        raise UserError(
            f'{problem.row or problem.id}: the checker "countdown" needs numbers (whole numbers) and target '
            '(a whole number); set, for example, "numbers": [3, 4, 5], "target": 35'
        )
    fault = check_countdown(found, numbers, target)
    return _score(not fault, found, fault or "every number is used once, and the target is reached")


CHECKERS: dict[str, Callable[[Problem, str], Score | Question]] = {
    "math": _check_math, "exact": _check_exact, "integer": _check_integer, "choice": _check_choice,
    "countdown": _check_countdown,
}  # fmt: skip


class Grader:
    """A grader of completions, which must not be used from several threads. Algebra runs in child processes
    that start on first use. Each process has ``seconds`` of processor time per comparison, and ``memory_mb``
    in addition to what its libraries use."""

    def __init__(self, workers: int = 1, seconds: float = 1.5, memory_mb: int = 384) -> None:
        self.pool = Pool(workers=workers, seconds=seconds, memory_mb=memory_mb)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes. If the grader is used again, it starts new ones."""
        self.pool.close()

    def score(self, problem: Problem, completion: str) -> Score:
        """Return the verdict on one completion. Raises UserError if the problem cannot be scored at all."""
        return self.score_many([(problem, completion)])[0]

    def score_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[Score]:
        """Return one score per (problem, completion), in order. A pair of formulas is compared only once."""
        return self.score_answers([(p, find_answer(p, text)) for p, text in pairs])

    def judge(self, problem: Problem, completion: str) -> Judgment:
        """Return the default, strict and lenient verdicts on one completion."""
        return self.judge_many([(problem, completion)])[0]

    def judge_many(self, pairs: Sequence[tuple[Problem, str]]) -> list[Judgment]:
        answers = [(problem, find_answer(problem, text)) for problem, text in pairs]
        scores = self.score_answers(answers)
        return [judgment(*answer, score) for answer, score in zip(answers, scores, strict=True)]

    def score_answers(self, pairs: Sequence[tuple[Problem, Extraction]]) -> list[Score]:
        """Return one score per (problem, extracted answer), in order."""
        results: list[Score | Question] = []
        outcomes: dict[tuple[str, str], Decision] = {}
        for problem, found in pairs:
            results.append(result := self._check(problem, found))
            for part in () if isinstance(result, Score) else result:
                if part not in outcomes:
                    equal = same_formula(*part)
                    outcomes[part] = Decision(equal=equal, reason="compared as rational functions")
                    if equal is None:
                        self.pool.prepare()  # the import runs while the remaining samples are graded
        asked = [part for part, outcome in outcomes.items() if outcome.equal is None]
        outcomes |= zip(asked, self.pool.compare_many(asked) if asked else [], strict=True)
        return [
            r if isinstance(r, Score) else _conclude([outcomes[part] for part in r], found.answer)
            for r, (_, found) in zip(results, pairs, strict=True)
        ]

    def check_gold(self, problem: Problem) -> Score:
        """Grade the gold answer as if it were a completion; if it is not correct, the data row is bad."""
        if problem.checker == "countdown" and problem.answer.strip() == str(problem.meta.get("target")):
            return _score(True, problem.answer, "the row names its target, not a solution")
        gold = Extraction(answer=gold_answer(problem.answer), how="whole")
        return self.score_answers([(problem, gold)])[0]

    def _check(self, problem: Problem, found: Extraction) -> Score | Question:
        if problem.checker not in CHECKERS:
            unknown = f"{problem.row or problem.id}: unknown checker {problem.checker!r}"
            raise UserError(f"{unknown}; use one of {', '.join(CHECKERS)}")
        if not problem.answer.strip() and problem.checker != "countdown":
            return _score(None, found.answer, "the problem has no gold answer")
        if not found.answer:
            return _score(False, "", "no answer found")
        return CHECKERS[problem.checker](problem, found.answer)


def _conclude(outcomes: Sequence[Decision], extracted: str) -> Score:
    """Return correct if all parts are equal, incorrect if any part is different, and otherwise unscored."""
    nothing = Decision(equal=None, reason="nothing was compared")
    worst = min(outcomes, key=lambda outcome: (False, None, True).index(outcome.equal), default=nothing)
    return _score(worst.equal, extracted, worst.reason, unreadable=worst.unreadable)
