"""The embedded tasks: right by an arithmetic of the test's own, disjoint by construction, and regular."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from truestep.data.problems import load_problems
from truestep.data.procedural import SPLITS, TASKS, make_problem, make_problems, split_of
from truestep.errors import UserError
from truestep.grade.score import Grader
from truestep.records import Problem, Verdict
from truestep.settings import DataSettings

CASES: list[tuple[str, dict[str, int]]] = [
    ("addition", {}),
    ("addition", {"digits": 1}),
    ("addition", {"digits": 7}),
    ("addition", {"digits": 4, "min_digits": 2}),
    ("subtraction", {}),
    ("subtraction", {"digits": 6}),
    ("subtraction", {"digits": 4, "min_digits": 1}),
    ("multiplication", {}),
    ("multiplication", {"digits_a": 2, "digits_b": 3}),
    ("chain", {}),
    ("chain", {"terms": 8, "max_number": 30}),
    ("countdown", {}),
    ("countdown", {"numbers": 5, "max_number": 25}),
]
OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def value(text: str) -> Fraction:
    """The exact value of an arithmetic expression, through Python's own grammar."""

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            assert isinstance(node.op, ast.USub)
            return -walk(node.operand)
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    return walk(ast.parse(text, mode="eval").body)


def text_of(problem: Problem) -> str:
    assert len(problem.messages) == 1
    return problem.messages[0].content


@pytest.mark.parametrize(("task", "options"), CASES)
def test_answers_and_every_line_of_every_trace_are_right(task: str, options: dict[str, int]) -> None:
    for index in range(150):
        problem = make_problem(task, "train", index, options, seed=5)
        *steps, last = problem.solution.split("\n")
        assert last == f"#### {problem.answer}"
        assert steps
        for step in steps:
            claim, *marks = step.split(" ")
            if "=" in claim:
                left, right = claim.split("=")
                assert value(left) == int(right), problem.solution
            for mark in marks:  # the digit written, and the carry or borrow that makes up for it
                assert re.fullmatch(r"w[0-9]|c[0-9]|b[01]", mark)
            if marks:
                written, moved = int(marks[0][1:]), int(marks[1][1:])
                assert int(right) == (written + 10 * moved if marks[1][0] == "c" else written - 10 * moved)
        if task == "countdown":
            left, target = text_of(problem).split("->")
            assert value(problem.answer) == int(target)
            assert sorted(re.findall(r"\d+", problem.answer)) == sorted(left.split(","))
            assert problem.meta["numbers"] == [int(n) for n in left.split(",")]
            assert problem.meta["target"] == int(target)
            assert problem.checker == "countdown"
        else:
            assert value(text_of(problem).removesuffix("=?")) == int(problem.answer)
            assert problem.checker == "integer"


@pytest.mark.parametrize("task", ["addition", "subtraction"])
def test_written_digits_spell_the_answer(task: str) -> None:
    for index in range(100):
        problem = make_problem(task, "train", index, {"digits": 4}, seed=1)
        digits = re.findall(r"w(\d)", problem.solution)[::-1]
        carry = re.findall(r"[cb](\d)", problem.solution)[-1]
        assert int((carry if task == "addition" else "") + "".join(digits)) == int(problem.answer)


def test_carries_are_what_the_next_column_adds() -> None:
    assert make_steps("addition", "586+347=?") == "6+7=13 w3 c1\n8+4+1=13 w3 c1\n5+3+1=9 w9 c0\n#### 933"
    assert make_steps("subtraction", "703-348=?") == "3-8=-5 w5 b1\n0-4-1=-5 w5 b1\n7-3-1=3 w3 b0\n#### 355"
    assert make_steps("multiplication", "47*6=?") == "7*6=42 w2 c4\n4*6+4=28 w8 c2\n#### 282"


def make_steps(task: str, text: str) -> str:
    from truestep.data import procedural_tasks

    a, b = (int(n) for n in re.findall(r"\d+", text))
    steps = {
        "addition": lambda: procedural_tasks.column_steps(a, b, "+"),
        "subtraction": lambda: procedural_tasks.column_steps(a, b, "-"),
        "multiplication": lambda: procedural_tasks.multiplication_steps(a, b),
    }[task]()
    return "\n".join([*steps, f"#### {value(text.removesuffix('=?'))}"])


@pytest.mark.parametrize(("task", "options"), CASES)
def test_splits_of_any_two_seeds_are_disjoint(task: str, options: dict[str, int]) -> None:
    num = 5 if options == {"digits": 1} else 60
    sets = {
        (split, seed): {canonical(p) for p in make_problems(task, split, num, options, seed)}
        for split in SPLITS
        for seed in (0, 1)
    }
    for (split, seed), content in sets.items():
        assert len(content) == num
        for (other_split, other_seed), other in sets.items():
            if split != other_split:
                assert not content & other, (split, seed, other_split, other_seed)
    if options != {"digits": 1}:
        assert sets["train", 0] != sets["train", 1]


def canonical(problem: Problem) -> tuple[Any, ...]:
    """Equal for problems that are the same exercise, whatever the order in which they name their numbers."""
    text = text_of(problem)
    task = problem.meta["task"]
    if task == "chain":
        return (text,)
    return (
        task,
        *sorted(int(n) for n in problem.meta.get("numbers") or re.findall(r"\d+", text)),
        problem.meta.get("target"),
    )


@pytest.mark.parametrize(("task", "options"), CASES)
def test_every_trace_satisfies_its_own_checker(task: str, options: dict[str, int]) -> None:
    with Grader() as grader:
        for problem in (make_problem(task, "test", i, options, seed=9) for i in range(20)):
            assert grader.score(problem, problem.solution).verdict is Verdict.CORRECT
            assert grader.check_gold(problem).verdict is Verdict.CORRECT
            wrong = problem.solution.rsplit("\n", 1)[0] + "\n#### 100000000000000"
            assert grader.score(problem, wrong).verdict is Verdict.INCORRECT


def test_no_product_of_a_chain_has_three_factors() -> None:
    texts = [text_of(make_problem("chain", "train", i, {"terms": 8}, 0)) for i in range(100)]
    assert any("*" in text for text in texts)
    assert not any(re.search(r"\*\d+\*", text) for text in texts)


def test_shares_of_the_splits() -> None:
    counts = Counter(split_of(f"{a}+{b}") for a in range(100) for b in range(100))
    assert counts["train"] / 10_000 == pytest.approx(0.7, abs=0.02)
    assert counts["test"] / 10_000 == pytest.approx(0.2, abs=0.02)
    assert set(counts) == set(SPLITS) == {"train", "dev", "test"}


def test_a_problem_is_a_function_of_its_coordinates() -> None:
    def make(index: int, seed: int) -> Problem:
        return make_problem("addition", "test", index, {"digits": 9}, seed)

    assert make(4, 2) == make(4, 2)
    assert len({text_of(make(i, s)) for i in range(5) for s in range(5)}) == 25
    assert make_problems("chain", "dev", 30, {}, 7)[:10] == make_problems("chain", "dev", 10, {}, 7)


def test_a_space_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"about \d+ different train problems .* 1000 were requested"):
        make_problems("addition", "train", 1000, {"digits": 1}, 0)
    pairs = {(a, b) for a in range(10) for b in range(a, 10) if split_of(f"{a}+{b}") == "train"}
    assert len(make_problems("addition", "train", len(pairs), {"digits": 1}, 0)) == len(pairs)


def test_character_set_is_exactly_what_the_tasks_write() -> None:
    seen: set[str] = set()
    for task, options in [*CASES, ("letters", {})]:
        for split in SPLITS:
            for index in range(40):
                problem = make_problem(task, split, index, options, seed=0)
                seen |= set(text_of(problem) + problem.solution + problem.answer)
    assert "".join(sorted(seen)) == "".join(sorted("0123456789+-*/=?(), >#abcdefghijorstw\n"))


def test_traces_of_the_defaults_are_short() -> None:
    longest = {
        task: max(len(make_problem(task, "train", i, {}, 0).solution) for i in range(200)) for task in TASKS
    }
    assert longest["addition"] < 60
    assert max(longest.values()) < 80


def test_wrong_names_and_values_are_named() -> None:
    def refused(match: str, task: str = "addition", split: str = "train", **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            make_problem(task, split, 0, options, 0)

    refused(r'no procedural task is called "additon"; .*did you mean "addition"', task="additon")
    refused(r'no split is called "tset"; .*did you mean "test"', split="tset")
    refused(
        r'options\.digit: no option of procedural:addition is called "digit"; .*did you mean "digits"',
        digit=3,
    )
    for wrong in (0, 13, 2.0, "3", True, [3]):
        refused(r"options\.digits: expected a whole number from 1 to 12, got ", digits=wrong)


def test_through_the_settings() -> None:
    def load(**settings: Any) -> list[Problem]:
        data = DataSettings(source="procedural:addition", **settings)
        return load_problems("d", data, seed=1, base_dir=Path(), needs=("answer", "solution"))

    assert load(limit=5, skip=3) == load(limit=8)[3:]
    with pytest.raises(UserError, match=r"data\.d\.limit: .* set limit = N"):
        load()
    with pytest.raises(UserError, match=r"data\.d\.checker: "):
        load(limit=5, checker="math")
    with pytest.raises(UserError, match=r"^data\.d: options\.digits: "):
        load(limit=5, options={"digits": 99})


@pytest.mark.parametrize("task", TASKS)
def test_the_defaults_of_every_task_are_in_range(task: str) -> None:
    assert all(low <= default <= high for default, low, high in TASKS[task].options.values())


def test_letters_are_put_in_order_one_by_one() -> None:
    for index in range(60):
        problem = make_problem("letters", "train", index, {"length": 7}, seed=1)
        word = text_of(problem).removeprefix("sort ").removesuffix("=?")
        *steps, last = problem.solution.split("\n")
        assert last == f"#### {''.join(sorted(word))}" == f"#### {problem.answer}"
        left = word
        for step in steps:
            before, _, rest = step.partition(">")
            taken, _, after = rest.partition(" ")
            assert before == left
            assert taken == min(left)
            assert sorted(taken + after) == sorted(left)
            left = after
        assert left == ""
    sets = [{text_of(p) for p in make_problems("letters", split, 60, {}, 0)} for split in SPLITS]
    assert not set.union(*(a & b for i, a in enumerate(sets) for b in sets[i + 1 :]))


def test_operands_of_uneven_length() -> None:
    lengths = {len(n) for i in range(200) for n in re.findall(r"\d+", text_of(
        make_problem("addition", "train", i, {"digits": 4, "min_digits": 2}, 0)))}  # fmt: skip
    assert lengths == {2, 3, 4}
