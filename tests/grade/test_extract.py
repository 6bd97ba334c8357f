"""The rules that find an answer, their order, and that none of them costs more than the text is long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.grade.choices import extract_choice
from truestep.grade.extract import extract_answer, scan_boxes


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        (r"so \boxed{12}", "boxed", "12"),
        (r"\fbox{7} it is", "boxed", "7"),
        (r"\boxed{1} was wrong, \boxed{2} is right", "boxed", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", "boxed", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}} and nothing else {", "boxed", r"\{1,2\}"),
        (r"\boxed{cut off \boxed{5}", "boxed", "5"),
        (r"\boxed{5} then I write \boxed{", "boxed", "5"),
        (r"put it into \boxed{} please: \boxed{4}, not \boxed{ }", "boxed", "4"),
        (r"$\boxed{2}$ and $\boxed{3}$", "boxed", "2, 3"),
        (r"$\boxed{2}$, $\boxed{2}$", "boxed", "2"),
        ("worked\n#### 1,234\n", "marker", "1,234"),
        ("#### 1\n#### 2", "marker", "2"),
        ("7+7=14. #### 14", "marker", "14"),
        ("7+7=14 #### 14", "marker", "14"),
        ("7+7=14.####14.\nbye", "marker", "14"),
        ("> **Sum:** #### Answer: 14", "marker", "14"),
        ("- **#### 14**", "marker", "14"),
        ("so #### 14 #### 14", "marker", "14"),
        ("a #### 1\n\nb #### 2", "marker", "2"),
        ("The answer is 13. #### 14", "marker", "14"),
        (r"\boxed{14} #### 15", "boxed", "14"),
        ("it is 1 #### 2 #### 3", "marker", "2 #### 3"),
        ("#### 2 #### 3", "marker", "2 #### 3"),
        ("so #### Step 1", "marker", "Step 1"),
        ("so #### 14 or 15", "marker", "14 or 15"),
        ("so #### 14 million", "marker", "14 million"),
        ("so #### -14", "marker", "-14"),
        ("it is 14 ####", "last_number", "14"),
        ("so #### 14 is wrong, it is 15", "last_number", "15"),
        ("so 3 ##### 5 parts are there", "last_number", "5"),
        ("```\ny = 3  #### 14\n```\nThe answer is 15.", "answer_is", "15"),
        ("```\ny = 3\n```\nso #### 15", "marker", "15"),
        ("I write `#### N`. The answer is 15.", "answer_is", "15"),
        ('"#### 14" is how it ends. The answer is 15.', "answer_is", "15"),
        ("I doubt that it is #### 14\nThe answer is 15.", "answer_is", "15"),
        ("It is not #### 14.\nThe answer is 15.", "answer_is", "15"),
        ("2 * #### 14\nThe answer is 15.", "answer_is", "15"),
        ("see #### the notes of the last of all lessons\nThe answer is 15.", "answer_is", "15"),
        ("<answer> (1+2)*3 </answer> bye", "marker", "(1+2)*3"),
        ("The answer is 42.", "answer_is", "42"),
        ("The final answer is: $x+1$. I hope it is correct.", "answer_is", "x+1"),
        ("**Answer:** 5", "answer_is", "5"),
        ("Answer:\n\\[ 9 \\]", "answer_is", "9"),
        ("The answer is (C).", "answer_is", "C"),
        ("the answer is 42 apples because 6 times 7 makes 42", "answer_is", "42"),
        (r"\frac{10}{9}", "whole", r"\frac{10}{9}"),
        ("**42**.", "whole", "42"),
        ("*x+1*", "whole", "x+1"),
        (r"**$\frac12$**", "whole", r"\frac{1}{2}"),
        ("**2**3**", "whole", "^2^3^"),
        ("**" + "x" * 197 + "** and more", "none", ""),
        ("(3+4)*5 = 35", "whole", "(3+4)*5 = 35"),
        ("Therefore $x > 5$ solves it.", "last_formula", "x > 5"),
        ("He has 3 and gets 4 so there are 7 apples.", "last_number", "7"),
        ("this makes 8-14=-6", "last_number", "-6"),
        ("the difference of them: 10 - 30", "last_number", "30"),
        ("so it costs $1,000.99.", "last_number", "1,000.99"),
        ("nothing to see here, move along please", "none", ""),
        ("", "none", ""),
        (r"the box is open: \boxed{7", "none", ""),
        ("the code is AZYUK2A today", "none", ""),
    ],
)
def test_rules_in_their_order(text: str, how: str, answer: str) -> None:
    found = extract_answer(text)
    assert (found.how, found.answer.lstrip("$")) == (how, answer)


def test_only_what_follows_the_last_thought_counts() -> None:
    assert extract_answer(r"<think>\boxed{1}</think> \boxed{2}").answer == "2"
    assert extract_answer(r"\boxed{1}</think> so 2").answer == "2"
    assert extract_answer(r"<think>\boxed{1}</think> I could not find the number").how == "none"
    assert extract_answer(r"<think> it must be \boxed{1}").how == "none"
    assert extract_answer(r"<think>a</think> \boxed{1} <think> or \boxed{2}").how == "none"
    assert extract_answer(r"thinking aloud without tags: \boxed{1}").answer == "1"


@pytest.mark.parametrize("text", ["it is 7", "7", "so $x=7$"])
def test_strict_takes_no_last_number(text: str) -> None:
    assert extract_answer(text).answer
    assert extract_answer(text, strict=True).how == "none"


@pytest.mark.parametrize("text", [r"\boxed{7}", "#### 7", "the answer is 7"])
def test_strict_takes_what_was_marked(text: str) -> None:
    assert extract_answer(text, strict=True) == extract_answer(text)
    assert extract_answer(text, strict=True).answer == "7"


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("−５", "-5"),
        ("1 234", "1 234"),
        (r"12,\!345", "12,345"),
        (r"12{,}345", "12,345"),
        ("$ 5 $.", "5"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\left( 1 \right)", "( 1 )"),
        ("1\u200b2\u202e", "12"),
        ("\\leq\u200bx", r"\leq x"),
        ("\ud8005", "\ufffd5"),
    ],
)
def test_typography(written: str, plain: str) -> None:
    found = extract_answer(r"\boxed{" + written + "}").answer
    assert found == plain
    found.encode("utf-8")  # can be written to a file


@given(st.text(alphabet=r"\{}boxed $ab1", max_size=60))
@settings(max_examples=200, deadline=None)
def test_boxes_are_balanced_and_apart(text: str) -> None:
    end = 0
    for start, stop, content in scan_boxes(text + r"\boxed{x}")[0]:
        assert start >= end
        assert content.strip()
        assert (text + r"\boxed{x}")[start:stop].endswith(content + "}")
        end = stop


MEGABYTE = 10**6
LONG = {
    "open boxes": r"\boxed{" * 140_000,
    "nested boxes": r"\boxed{" * 70_000 + "}" * 70_000,
    "many boxes": r"\boxed{1}" * 110_000,
    "braces": "{" * MEGABYTE,
    "deep braces": r"\boxed{" + "{" * 400_000 + "}" * 400_000 + "}",
    "digits": "1" * MEGABYTE,
    "commas": "1," * 500_000,
    "thousands": ",000" * 250_000,
    "dollars": "$" * MEGABYTE,
    "dollar digits": "$1" * 500_000,
    "parentheses": r"\(" * 500_000,
    "brackets": r"\[" * 500_000,
    "answers": "answer " * 140_000,
    "answer is": "the answer is " * 70_000,
    "spaces": r"\boxed" + " " * MEGABYTE,
    "newlines": "\n" * MEGABYTE,
    "marks": "#### \n" * 160_000,
    "backslashes": "\\" * MEGABYTE,
    "stars": "*" * MEGABYTE,
    "tags": "<think>" * 70_000 + "</think>" * 70_000,
    "text": r"\boxed{" + r"\text{" * 80_000 + "}" * 80_000 + "}",
    "fractions": r"\boxed{" + r"\frac" * 200_000 + "}",
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_is_answered_in_bounded_time(name: str) -> None:
    begin = time.process_time()
    extract_answer(LONG[name])
    assert time.process_time() - begin < 2.0  # quadratic time would be hours


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct option is **B**.", "B"),
        ("(A) is an oxide, (B) is copper.\nSo option (B) it is, being a metal.", "B"),
        ("Its speed is 5 m/s, so (C).", "C"),
        ("I choose **B. copper**", "B"),
        ("Take (A).\nOn second thoughts (B) rather.", "B"),
        ("One of these is right, so (A) or (B), I would say", ""),
        ("Adding them up one gets the probability P(A) here", ""),
        ("That settles the choice I made at the beginning", ""),
        ("**A short remark** ends this", ""),
        ("Let us end with it then: **(D)**", "D"),
        ("This makes it option I, the last but one", "I"),
        ("The options are (A) (B) (C) (D) as given", ""),
        ("One can see that option B is wrong here", ""),
        ("We see that (B) cannot be what was meant", ""),
        ("we know that a metal is (of course) option Bronze", ""),
        ("<think> it is (B) I am sure of it", ""),
        (r"one then has \boxed{and of the choices (B)", ""),
    ],
)
def test_a_choice_that_is_only_named(text: str, letter: str) -> None:
    found = extract_choice(text)
    assert (found.answer if found.how == "last_choice" else "") == letter
    assert extract_choice(text, strict=True) == extract_answer(text, strict=True)


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from("ABCDEFGHIJ"))
def test_a_marked_answer_goes_before_a_named_choice(marked: str, named: str) -> None:
    for text in (
        rf"\boxed{{{marked}}} rather than option ({named})",
        f"The answer is ({marked}).\nSee **{named}**",
    ):
        assert extract_choice(text) == extract_answer(text)
        assert extract_choice(text).answer == marked
