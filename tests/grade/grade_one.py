"""One text scored against one gold answer."""

from truestep.grade.score import Grader
from truestep.records import Message, Problem, Score


def problem(gold: str) -> Problem:
    return Problem(id="pair", messages=(Message(role="user", content=""),), answer=gold)


def grade_pair(gold: str, text: str, grader: Grader) -> Score:
    return grader.score(problem(gold), text)
