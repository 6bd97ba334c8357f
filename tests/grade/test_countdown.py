"""The countdown checker against expressions made from the numbers, and against every way to cheat."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.errors import UserError
from truestep.grade.countdown import check_countdown, evaluate
from truestep.grade.score import Grader
from truestep.records import Message, Problem, Verdict


@st.composite
def solved(draw: st.DrawFn) -> tuple[str, list[int], int]:
    """An expression, its numbers, and its whole value: the value is built beside the text, not read from
    it."""
    numbers = draw(st.lists(st.integers(1, 50), min_size=2, max_size=6))
    parts = [(str(n), Fraction(n)) for n in numbers]
    while len(parts) > 1:
        (left, x), (right, y) = (parts.pop(draw(st.integers(0, len(parts) - 1))) for _ in range(2))
        sign = draw(st.sampled_from("+-*/" if y else "+-*"))
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else x}[sign]
        gap = draw(st.sampled_from(["", " "]))
        parts.append((f"({left}{gap}{sign}{gap}{right})", value))
    text, value = parts[0]
    if value.denominator != 1:
        text, value, numbers = (
            f"{text}*{value.denominator}",
            value * value.denominator,
            [*numbers, value.denominator],
        )
    return text, numbers, int(value)


@given(solved())
@settings(max_examples=200, deadline=None)
def test_a_solution_is_accepted_and_its_neighbours_are_not(case: tuple[str, list[int], int]) -> None:
    text, numbers, target = case
    assert check_countdown(text, numbers, target) == ""
    assert check_countdown(f"{text} = {target}", list(reversed(numbers)), target) == ""
    assert "not" in check_countdown(text, numbers, target + 1)
    assert "uses" in check_countdown(text, numbers[1:], target)
    assert "uses" in check_countdown(text, [*numbers, 1], target)
    assert "uses" in check_countdown(f"{text}+0", numbers, target)
    assert "claims" in check_countdown(f"{text} = {target + 1}", numbers, target)


@given(st.text(alphabet="0123456789+-*/() ^.e_=x", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_answered(text: str) -> None:
    assert isinstance(check_countdown(text, [1, 2], 3), str)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "35",
        "3**4",
        "3^4",
        "34+5",
        "3.0+4",
        "(3+4",
        "3+4)",
        "+",
        "3 4",
        "__import__('os')",
        "3+4=",
        "=7",
        "(" * 250 + "3",
        "3+" * 200 + "4",
        "3//4",
        "3!+4",
        "3+4 = 7 = 7",
        "1/0",
        "-" * 250 + "3",
        "3+4\x00",
        "٣+4",
    ],
)
def test_cheats_are_refused(text: str) -> None:
    assert check_countdown(text, [3, 4], 7)


def test_precedence_and_exactness() -> None:
    assert evaluate("2+3*4-6/4")[0] == Fraction(25, 2)
    assert evaluate("8-3-2")[0] == 3
    assert evaluate("8/4/2")[0] == 1
    assert check_countdown("(1/3)*3*5", [1, 3, 3, 5], 5) == ""
    assert check_countdown(r"\left(1+2\right) \times 3 \div 1", [1, 2, 3, 1], 9) == ""


def problem(**meta: object) -> Problem:
    return Problem(
        id="c",
        messages=(Message(role="user", content="?"),),
        answer="(3+4)*5",
        checker="countdown",
        row="f:1",
        meta=meta,
    )


def test_through_the_grader() -> None:
    row = problem(numbers=[3, 4, 5], target=35)
    with Grader() as grader:
        for text in (r"\boxed{5*(4+3)}", "<answer>(3+4)*5</answer>", "#### (3+4)*5 = 35", "so\n(3+4)*5"):
            assert grader.score(row, text).verdict is Verdict.CORRECT, text
        assert grader.score(row, r"\boxed{35}").verdict is Verdict.INCORRECT
        assert grader.check_gold(row).verdict is Verdict.CORRECT
        assert grader.check_gold(problem(numbers=[3, 4, 5], target=36)).verdict is Verdict.INCORRECT
        assert not grader.pool.process_ids


@pytest.mark.parametrize(
    "meta", [{}, {"numbers": [3, 4, 5]}, {"numbers": ["3"], "target": 3}, {"numbers": [3], "target": "3"}]
)
def test_a_row_without_numbers_says_what_to_write(meta: dict[str, object]) -> None:
    with Grader() as grader, pytest.raises(UserError, match=r"f:1.*numbers.*target"):
        grader.score(problem(**meta), r"\boxed{3}")
