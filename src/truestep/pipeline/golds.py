"""Grades gold answers in the form in which a model writes them, before anything is trained or evaluated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truestep.data.row_schema import LETTERS
from truestep.errors import count, verb
from truestep.grade.choices import choice_letters
from truestep.grade.extract import Extraction, gold_answer
from truestep.grade.normal import plain
from truestep.grade.numeric import parse_number
from truestep.grade.phrase import num_words
from truestep.grade.words import spelled_number
from truestep.records import Problem, Score, Verdict, judged

if TYPE_CHECKING:
    from truestep.errors import Faults
    from truestep.grade.score import Grader
    from truestep.pipeline.prepare import Prepared

_OTHER = Extraction(answer="7919", how="boxed")  # an answer that differs from the gold answer in its text


@dataclass(frozen=True, kw_only=True)
class Gold:
    r"""A gold answer with its score as \boxed{…}. If it is not correct, no completion can be. ``text_only``
    says that the grader cannot read the gold answer, so that only the same text is correct."""

    problem: Problem
    score: Score
    text_only: bool


def grade_golds(grader: Grader, problems: Sequence[Problem]) -> list[Gold]:
    """Grade the gold answer of every problem that has one, in order."""
    answered = [p for p in problems if p.answer]
    boxed = [(p, rf"\boxed{{{gold_answer(p.answer)}}}") for p in answered]
    scores = grader.score_many(boxed)
    for i, problem in enumerate(answered):
        if problem.checker == "countdown":  # the answer may be the target, without a solution
            scores[i] = grader.check_gold(problem)
        elif problem.meta.get("choices") and not _names_a_choice(grader, problem):
            num = len(problem.meta["choices"])
            reason = f"names none of the {num} choices; write its letter, A to {LETTERS[:num][-1]}"
            scores[i] = judged(Verdict.INCORRECT, reason=reason)
    asked = {p.answer: p for p in answered if p.checker == "math" and not _is_plain(p.answer)}
    read = dict.fromkeys(asked, True)
    others = grader.score_answers([(problem, _OTHER) for problem in asked.values()])
    for answer, score in zip(asked, others, strict=True):
        text = plain(gold_answer(answer))
        is_formula = re.search(r"[\w\\∞]", text) and not re.fullmatch("n/a", text, re.IGNORECASE)
        read[answer] = bool(is_formula) and not num_words(text) and _was_read(score)
    return [
        Gold(problem=p, score=s, text_only=p.checker == "math" and not read.get(p.answer, True))
        for p, s in zip(answered, scores, strict=True)
    ]


def _names_a_choice(grader: Grader, problem: Problem) -> bool:
    """Return whether the letter of a choice is correct, or the gold answer consists of letters of choices."""
    letters = LETTERS[: len(problem.meta["choices"])]
    if several := choice_letters(gold_answer(problem.answer)):
        return set(several) <= set(letters)
    asked = [(problem, Extraction(answer=letter, how="boxed")) for letter in letters]
    return any(score.verdict is Verdict.CORRECT for score in grader.score_answers(asked))


def said_of(unread: Sequence[Gold], num_unread: int, num: int) -> str:
    """Return a sentence about the gold answers that only the same text can match."""
    first = unread[0].problem
    example = f"e.g. {first.row or first.id}: {first.answer[:60]!r}"
    amount = f"{count(num_unread, 'gold answer', num)} {verb(num_unread, 'are')}"
    what = "not a number, formula, unit or choice that the grader reads, so only the same text is correct"
    remedy = (
        "have models end with just this text, add choices, or score samples with your own reward or scorer"
    )
    return f"{amount} {what} ({example}); {remedy}"


def _is_plain(answer: str) -> bool:
    gold = gold_answer(answer)
    text = plain(gold)
    is_choice = re.fullmatch(r"\([A-Z]\)|[A-Z]", text)
    is_word = bool(re.match("[A-Za-z]", text)) and spelled_number(text) is not None
    return bool(is_choice or parse_number(gold)) or is_word


def _was_read(score: Score) -> bool:
    if "needs math-verify" in score.reason:
        return True  # unknown
    compared_as_text = ("gold answer is not a readable formula", "compared as text")
    return score.verdict is not Verdict.UNSCORED and not any(
        words in score.reason for words in compared_as_text
    )


def check_golds(prepared: Prepared, names: Sequence[str], faults: Faults) -> None:
    """Find the first gold answer of each set that its checker refuses, since it could not accept a completion."""
    from truestep.grade.score import Grader

    with Grader() as grader:
        for name in names:
            golds = grade_golds(grader, prepared.problems[name])
            for problem, score in ((gold.problem, gold.score) for gold in golds):
                if score.verdict is not Verdict.CORRECT:
                    faults.add(
                        f"{problem.row or problem.id}: answer: the checker {problem.checker!r} does not accept the gold answer "
                        f"{problem.answer[:60]!r} ({score.reason or score.label}); correct or remove the row"
                    )
                    break
            if unread := [gold for gold in golds if gold.text_only]:
                prepared.notes.append(f"data.{name}: {said_of(unread, len(unread), len(golds))}")
