"""One text scored against one gold answer."""

from truestep.grade.score import Grader
from truestep.records import Message, Problem, Score


def grade_pair(gold: str, text: str, grader: Grader) -> Score:
    message = Message(role="user", content="")
    return grader.score(Problem(id="pair", messages=(message,), answer=gold), text)
