"""Verdicts: gold accepted, garbage rejected, hostile answers bounded, dead workers survived, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from grade_one import grade_pair

from truestep.errors import UserError
from truestep.evaluate.pair_rows import read_pairs
from truestep.grade.pairs import grade_pairs
from truestep.grade.score import Grader
from truestep.records import Message, Problem, Verdict, conserve

pytest.importorskip("math_verify")

BOUND = 2.0  # seconds of processor time for any one answer


def problem(answer: str, checker: str = "math") -> Problem:
    return Problem(
        id="p", messages=(Message(role="user", content="?"),), answer=answer, checker=checker, row="file:3"
    )


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as made:
        assert (
            grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", made).verdict is Verdict.CORRECT
        )  # starts the worker outside any timing
        yield made


@pytest.mark.parametrize(
    ("gold", "found", "verdict"),
    [
        ("x+1", r"\boxed{\frac{x^2-1}{x-1}}", "correct"),
        (r"\sqrt{2}+\sqrt{5}", r"\boxed{\sqrt5+\sqrt2}", "correct"),
        ("2**(1/4)", r"\boxed{\sqrt{\sqrt{2}}}", "correct"),
        (r"\frac{3\sqrt{5}}{7}", "(3*sqrt(5))/7", "correct"),
        (
            r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}",
            r"\boxed{\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}}",
            "correct",
        ),
        ("2>x", r"\boxed{x<2}", "correct"),
        (r"(-\infty,1]\cup[10,\infty)", r"\boxed{x \in (-\infty, 1] \cup [10, +\infty)}", "correct"),
        (r"\{1\pm\sqrt{5},-2\}", r"\boxed{-2, 1+\sqrt5, 1-\sqrt{5}}", "correct"),
        ("x+1", r"\boxed{x+2}", "incorrect"),
        ("4", r"\boxed{4\sqrt{2}}", "incorrect"),
        ("x > 5", r"\boxed{x<5}", "incorrect"),
        ("(a+5)(b+2)", r"\boxed{(+5)(b+2)}", "incorrect"),
        ("7", r"\boxed{x}", "incorrect"),
        ("7", r"\boxed{7 @@ 8}", "incorrect"),
        ("7", r"\boxed{7:8}", "incorrect"),
        ("7", r"\boxed{\mathbb{Z}}", "incorrect"),
        ("7", r"\boxed{\garbage{7}}", "incorrect"),
    ],
)
def test_algebra(grader: Grader, gold: str, found: str, verdict: str) -> None:
    assert grade_pair(gold, found, grader).verdict == verdict


GOLDS = [
    "7",
    "-3",
    "0.15",
    r"\frac{3}{4}",
    r"11\sqrt2",
    "6+9i",
    r"\text{(C)}",
    "4343_6",
    r"x \in [-2,7]",
    r"(0,9) \cup (9,36)",
    r"\$32,\!348",
    r"\begin{pmatrix} -18 \\ 96 \end{pmatrix}",
    "16,3,1,1",
    "f(x)=-1,f(x)=x+1",
    r"\text{Evelyn}",
    r"3 \pm 2 \sqrt{2}",
    "8.49e-4",
    r"\frac{log 2}{log 3}",
    r"\left\lfloor\log _{2} n\right\rfloor+1",
    r"y^{\prime}+r y=0",
    "odd $n$",
    "1/2004!",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_gold_is_accepted_and_garbage_is_not(grader: Grader, gold: str) -> None:
    assert grader.check_gold(problem(gold)).verdict is Verdict.CORRECT
    assert grade_pair(gold, rf"Thus \boxed{{{gold}}}.", grader).verdict is Verdict.CORRECT
    for garbage in (
        "",
        " ",
        r"\boxed{}",
        "I do not know.",
        r"\boxed{\text{I do not know the answer to this one}}",
        r"\boxed{-987654321}",
    ):
        score = grade_pair(gold, garbage, grader)
        assert score.verdict is Verdict.INCORRECT, garbage
        assert (score.reason == "no answer found") == (not score.extracted)


HOSTILE = {
    "tower": r"\boxed{9**9**9**9}",
    "latex tower": r"\boxed{9^{9^{9^{9}}}}",
    "bracket tower": r"\boxed{(9^9)^{9^{9}}}",
    "factorials": r"\boxed{((9!)!)!}",
    "factorial": r"\boxed{99999999!}",
    "power": r"\boxed{2^{99999999999}}",
    "exponent": r"\boxed{1e999999999}",
    "binomial": r"\boxed{\binom{1000000}{500000}}",
    "gamma": r"\boxed{\zeta(3)^{\Gamma(10^{8})}}",
    "expansion": r"\boxed{(x+y+z+w)^{400}}",
    "integral": r"\boxed{\int_0^1 x^{x^x} e^{\sin x} dx}",
    "long sum": r"\boxed{" + "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(80)) + "}",
    "sum": r"\boxed{\sum_{n=1}^{10000000} \frac{1}{n^2}}",
    "roots": r"\boxed{" + r"\sqrt{" * 24 + "2" + "}" * 24 + "}",
    "sines": r"\boxed{" + r"\sin(" * 20 + "x" + ")" * 20 + "}",
    "latex nest": r"\boxed{" + r"\frac{1}{" * 10_000 + "1" + "}" * 10_000 + "}",
    "round nest": r"\boxed{" + "(" * 50_000 + "1" + ")" * 50_000 + "}",
    "open braces": r"\boxed{" + "{" * 100_000,
    "never closed": r"\boxed{7",
    "boxes": r"\boxed{" * 100_000,
    "import": r"\boxed{__import__('os').system('touch CANARY')}",
    "bare import": "__import__('os').system('touch CANARY')",
    "eval": r"""\boxed{eval("open('CANARY','w')")}""",
    "write18": r"\boxed{\immediate\write18{touch CANARY}}",
    "input": r"\boxed{\input{/etc/passwd}}",
    "zero byte": "\\boxed{7\x008}",
    "zero bytes": "\x00" * 1000,
    "surrogates": "\\boxed{\ud800\udfff}",
    "emoji": "\\boxed{7️⃣}",
    "other digits": "\\boxed{٨}",
    "direction": "\\boxed{8\u202e7}",
    "megabyte of digits": r"\boxed{" + "1" * 10**6 + "}",
    "megabyte of sum": r"\boxed{" + "x+" * 500_000 + "1}",
    "megabyte of letters": "a" * 10**6,
    "every candidate": r"\boxed{" + ", ".join(map(str, range(1, 51))) + "}",
    "substring": r"\boxed{17}",
    "two answers": r"\boxed{7 \text{ or } 8}",
    "hidden second answer": r"\boxed{7 \text{ or eight}}",
    "false chain": r"\boxed{x=7=8}",
    "carets": r"\boxed{" + "^" * 1500 + "}",
    "json": '\\boxed{"}\n{"id": 0, "equal": true}',
    "division": r"\boxed{7/0}",
    "nan": r"\boxed{nan}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_answered_in_time(
    grader: Grader, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin = time.process_time()
    score = grade_pair("7", HOSTILE[name], grader)
    assert time.process_time() - begin < BOUND
    assert score.verdict is not Verdict.CORRECT
    assert (score.verdict is Verdict.UNSCORED) <= bool(score.reason)
    json.dumps(score.extracted, ensure_ascii=False).encode("utf-8")
    assert not list(tmp_path.iterdir())  # nothing was run: the canary is not there
    assert (
        grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", grader).verdict is Verdict.CORRECT
    )  # and the pool lives
    assert grade_pair(r"\sin x+1", r"\boxed{1-\sin x}", grader).verdict is Verdict.INCORRECT


# The same formula, which takes the algebra long to find out.
HEAVY = "(x+y+z+w)^{30}+1", r"\boxed{\frac{(x+y+z+w)^{60}-1}{(x+y+z+w)^{30}-1}}"


def test_a_comparison_that_runs_out_of_time_is_unscored(grader: Grader) -> None:
    score = grade_pair(*HEAVY, grader)
    assert (score.verdict, score.reason) == (Verdict.UNSCORED, "symbolic comparison timed out")
    assert score.reward is None


def test_a_comparison_that_runs_out_of_memory_is_unscored() -> None:
    with Grader(seconds=20.0, memory_mb=8) as small:
        score = grade_pair(*HEAVY, small)
        assert (score.verdict, score.reason) == (Verdict.UNSCORED, "symbolic comparison ran out of memory")
        assert grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", small).verdict is Verdict.CORRECT


def test_numbers_and_words_start_no_process() -> None:
    with Grader() as fast:
        pairs = [
            (problem("7"), r"\boxed{7.0}"),
            (problem("1/2"), "#### 0.5"),
            (problem("C"), "The answer is (C)."),
        ]
        assert {score.verdict for score in fast.score_many(pairs)} == {Verdict.CORRECT}
        assert fast.score(problem("7", "integer"), r"\boxed{x+7}").verdict is Verdict.INCORRECT
        assert fast.score(problem("x+1", "exact"), r"\boxed{1+x}").verdict is Verdict.INCORRECT
        assert fast.score(problem("x+1", "exact"), r"$\boxed{x + 1}$").verdict is Verdict.CORRECT
        assert fast.score(problem("seven", "integer"), "7").verdict is Verdict.UNSCORED
        assert fast.score(problem(" "), "7").verdict is Verdict.UNSCORED
        assert not fast.pool.process_ids


def test_idle_workers_that_are_killed_are_replaced(grader: Grader) -> None:
    grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", grader)
    for pid in grader.pool.process_ids:
        os.kill(pid, signal.SIGKILL)
    assert grade_pair(r"\sin x+2", r"\boxed{2+\sin x}", grader).verdict is Verdict.CORRECT


def test_a_worker_killed_at_work_loses_nothing() -> None:
    with Grader(seconds=2.0) as slow:
        assert grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", slow).verdict is Verdict.CORRECT
        first = slow.pool.process_ids[0]
        killer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
        killer.start()
        heavy = (problem(HEAVY[0]), HEAVY[1])
        scores = slow.score_many(
            [heavy, (problem(r"\sin x+1"), r"\boxed{1+\sin x}"), (problem(r"\sin x+1"), r"\boxed{2+\sin x}")]
        )
        killer.join()
        assert [score.verdict.value for score in scores] == ["unscored", "correct", "incorrect"]
        assert (
            scores[0].reason == "symbolic comparison timed out"
        )  # on the second worker, which nobody killed
        assert first not in slow.pool.process_ids


def test_order_and_counts_are_kept_over_workers() -> None:
    shapes = [
        (r"\sin x+1", r"\boxed{1+\sin x}"),
        (r"\sin x+1", r"\boxed{2+\sin x}"),
        ("3", r"\boxed{3}"),
        ("3", ""),
        ("3", r"\boxed{9^{9^9}}"),
    ]
    shapes += [("y+1", rf"\boxed{{{i}+y}}") for i in range(4)]
    pairs = [(problem(gold), text) for gold, text in shapes] * 3
    with Grader(workers=2) as two:
        scores = two.score_many(pairs)
        assert len(two.pool.process_ids) <= 3
    verdicts = [score.verdict.value for score in scores]
    expected = [
        "correct",
        "incorrect",
        "correct",
        "incorrect",
        "incorrect",
        "incorrect",
        "correct",
        "incorrect",
        "incorrect",
    ]
    assert verdicts == expected * 3
    assert [score.unreadable for score in scores] == [index % 9 == 4 for index in range(27)]
    counts = conserve(scores)
    assert counts["n"] == len(pairs) == counts["correct"] + counts["incorrect"] + counts["unscored"]


def test_a_file_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sympy", "math_verify", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    with Grader() as fresh:
        assert grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", fresh).verdict is Verdict.CORRECT


def test_the_same_question_is_asked_once(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    compare = grader.pool.compare_many
    monkeypatch.setattr(grader.pool, "compare_many", lambda pairs: asked.extend(pairs) or compare(pairs))
    scores = grader.score_many([(problem(r"\sin x+1"), r"\boxed{1+\sin x}")] * 8)
    assert len(asked) == 1
    assert {score.verdict for score in scores} == {Verdict.CORRECT}


def test_closing_ends_every_process() -> None:
    made = Grader()
    grade_pair(r"\sin x+1", r"\boxed{1+\sin x}", made)
    pids = made.pool.process_ids
    assert pids
    made.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_unknown_checker_says_what_to_write(grader: Grader) -> None:
    with pytest.raises(UserError, match=r"file:3.*'maths'.*math, exact, integer, choice, countdown"):
        grader.score(problem("7", "maths"), "7")


def test_labelled_pairs() -> None:
    """Agreement with labels of many sources; some of them are policies, so it cannot be complete."""
    if not os.environ.get("TRUESTEP_DATA"):
        pytest.skip("set TRUESTEP_DATA to a folder with grader_pairs.jsonl (gold, pred, verdict) to run this")
    path = Path(os.environ["TRUESTEP_DATA"], "grader_pairs.jsonl")
    labels = [bool(json.loads(line)["verdict"]) for line in path.read_text(encoding="utf-8").splitlines()]
    result = grade_pairs(read_pairs(path), workers=2)
    said = [sample["verdict"] == "correct" for sample in result["samples"]]
    agree = sum(a == b for a, b in zip(said, labels, strict=True))
    false_positives = sum(a and not b for a, b in zip(said, labels, strict=True))
    print(f"{agree} of {len(labels)} agree, {false_positives} false positives", result["counts"])
    assert agree / len(labels) >= 0.98
    assert false_positives <= 6
