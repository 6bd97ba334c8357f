"""Overlap of constructed sets, and the description of a set."""

from __future__ import annotations

import json

import pytest

from truestep.data.describe import describe
from truestep.data.overlap import NGRAM_WORDS, ngram_hashes, overlap_report, trained_on_too
from truestep.records import Message, Problem


def problems(prefix: str, *texts: str) -> list[Problem]:
    return [
        Problem(
            id=f"{prefix}{i}",
            messages=(Message(role="user", content=t),),
            answer=str(i),
            row=f"{prefix}:{i + 1}",
        )
        for i, t in enumerate(texts)
    ]


def words(first: int, num: int) -> str:
    return " ".join(f"word{i}" for i in range(first, first + num))


def test_equal_texts_are_found_whatever_their_case_and_spaces() -> None:
    train = problems("t", "What is 1+1?", "What is  2+2?\n", "what IS 3+3?")
    judged = problems("e", " what is\t2+2?", "What is 3+3?", "What is 4+4?")
    report = overlap_report({"train": train}, {"test": judged})
    (pair,) = report["pairs"]
    assert pair["exact"]["num_evaluation"] == 2
    assert pair["exact"]["examples"] == [
        {"evaluation": "e0", "train": "t1"},
        {"evaluation": "e1", "train": "t2"},
    ]
    assert pair["ngram"] == {"num_evaluation": 0, "num_train": 0, "num_short": 3, "examples": []}
    assert json.loads(json.dumps(report)) == report


SPELLINGS = [
    r"Is $x+1 \leq \frac{1}{2}$ for “all” $x$, or not – say why?",
    r'Is \(x+1 \le \dfrac{1}{2}\) for "all" \(x\), or not - say why?',
    r"is $ x + 1\,\leq\,\tfrac{1}{2} $ for ＂all＂ $ x $, or not — say why ?",
    "Is\u00a0$\\displaystyle x+1 \\leq \\frac{1}{2}$ for “all”\u200b $x$, or not \u2212 say why?",
    r"Is \[x+1 \leq \frac{1}{2}\] for „all” $x$, or not ‑ say why?",
]
OTHERS = [
    r"Is $x-1 \leq \frac{1}{2}$ for “all” $x$, or not – say why?",
    r"Is $x+1 \geq \frac{1}{2}$ for “all” $x$, or not – say why?",
    r"Is $x+1 \leq \frac{1}{2}$ for “all” $y$, or not – say why?",
    r"Is $x+1 \leq \frac{1}{2}$ for “all” $x 1$, or not – say why?",
    r"Is $x+1 \leq \frac{12}{}$ for “all” $x$, or not – say why?",
]


def test_one_text_in_several_spellings_is_the_same_text() -> None:
    for spelling in SPELLINGS:
        (pair,) = overlap_report({"t": problems("t", spelling)}, {"e": problems("e", *SPELLINGS, *OTHERS)})[
            "pairs"
        ]
        assert pair["exact"]["num_evaluation"] == len(SPELLINGS), spelling
    assert describe(problems("d", *SPELLINGS, *OTHERS))["num_duplicate_texts"] == len(SPELLINGS) - 1


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("\u00c9valuate 3", "E\u0301valuate 3", "Evaluate 3"),
        (r"Is $3 \times 4$ it?", r"is $3\times4$ it?", r"is $3 \times 5$ it?"),
        (r"$\alpha \beta$", r"$\alpha\beta$", r"$\alpha b$"),
        (r"$\sin x$", r"$\sin  x$", r"$\sinx$"),
        ("Find x_{1}^{2}.", "find x_1^2.", "find x_{12}."),
        ("x^{10}", "x^{10}", "x^10"),
    ],
)
def test_spellings_of_letters_and_of_formulas(one: str, same: str, other: str) -> None:
    (pair,) = overlap_report({"t": problems("t", one)}, {"e": problems("e", same, other)})["pairs"]
    assert [found["evaluation"] for found in pair["exact"]["examples"]] == ["e0"]


def test_thirteen_words_are_found_beside_other_delimiters() -> None:
    text = r"let $a$ be the sum of all numbers $n$ such that $n^2$ is less than $k$"
    other = "first, " + text.replace("$a$", r"\(a\)").replace("$n$", r"\(n\)").replace("$n^2$", r"\(n^2\)")
    (pair,) = overlap_report({"t": problems("t", other)}, {"e": problems("e", text)})["pairs"]
    assert (pair["exact"]["num_evaluation"], pair["ngram"]["num_evaluation"]) == (0, 1)


def test_a_training_set_may_be_an_iterator() -> None:
    judged = problems("e", words(0, 20), "short", words(90, 20))
    train = problems("t", words(50, 20), "Short", words(0, 30), "", words(5, 14))
    report = overlap_report({"t": train}, {"e": judged, "f": judged[1:]})
    assert overlap_report({"t": iter(train)}, {"e": judged, "f": judged[1:]}) == report
    assert [pair["num_train"] for pair in report["pairs"]] == [5, 5]
    assert report["pairs"][0]["ngram"]["num_train"] == 2


def test_thirteen_words_in_a_row_are_the_threshold() -> None:
    judged = problems("e", words(0, 40), words(100, 40), words(200, 12))
    train = problems(
        "t",
        "other start " + words(10, NGRAM_WORDS) + " other end",
        "other start " + words(100, NGRAM_WORDS - 1) + " other end",
        words(20, NGRAM_WORDS).upper(),
        words(200, 12),
    )
    (pair,) = overlap_report({"train": train}, {"test": judged})["pairs"]
    assert pair["ngram"]["num_evaluation"] == 1
    assert pair["ngram"]["num_train"] == 2
    assert pair["ngram"]["num_short"] == 1
    assert pair["ngram"]["examples"] == [{"evaluation": "e0", "train": "t0"}]
    assert pair["exact"]["examples"] == [{"evaluation": "e2", "train": "t3"}]


def test_every_pair_of_sets_is_judged_by_itself() -> None:
    shared, own = words(0, 20), words(50, 20)
    report = overlap_report(
        {"a": problems("a", shared), "b": problems("b", own)},
        {"a": problems("x", shared, own), "c": problems("c", words(80, 20))},
    )
    found = {
        (p["train"], p["evaluation"]): (p["exact"]["num_evaluation"], p["ngram"]["num_train"])
        for p in report["pairs"]
    }
    assert found == {("a", "a"): (1, 1), ("a", "c"): (0, 0), ("b", "a"): (1, 1), ("b", "c"): (0, 0)}


def test_only_the_users_words_count() -> None:
    def answered(prefix: str, user: str) -> Problem:
        turns = (Message(role="system", content=words(0, 30)), Message(role="user", content=user))
        return Problem(id=prefix, messages=turns, answer="1")

    (pair,) = overlap_report({"t": [answered("t", "one")]}, {"e": [answered("e", "two")]})["pairs"]
    assert (pair["exact"]["num_evaluation"], pair["ngram"]["num_evaluation"]) == (0, 0)


def test_ngrams_are_a_function_of_the_text() -> None:
    text = words(0, 30)
    assert len(ngram_hashes(text)) == 30 - NGRAM_WORDS + 1
    assert ngram_hashes(text) == ngram_hashes(text)
    assert ngram_hashes(words(0, 12)) == set()
    assert ngram_hashes(words(0, 13)).pop() in ngram_hashes(text)


def test_description_counts_duplicates_and_contradictions() -> None:
    same = problems("p", "Same text", "same  TEXT", "another", "fourth")
    agreeing = [*problems("q", "fourth", "fourth", "x", "fourth")[3:]]  # answer 3, as p3
    described = describe([*same, *agreeing])
    assert described["num_problems"] == described["num_answers"] == 5
    assert described["num_solutions"] == 0
    assert described["solution_characters"] == {}
    assert described["num_duplicate_texts"] == 2
    assert described["num_contradictory_texts"] == 1
    assert described["duplicate_examples"] == [["p:1", "p:2"]]
    assert described["problem_characters"] == {"min": 6, "median": 7, "mean": 7.6, "max": 10}
    assert described["checkers"] == {"math": 5}


def test_shared_problems_are_a_warning_with_both_rows() -> None:
    train, judged = problems("t", "one", "two"), problems("e", "three", "two")
    (said,) = trained_on_too({"t": train}, {"e": judged, "t": train, "f": judged[:1]})
    assert said.startswith("warning: data.e: 1 of 2 problems is also in data.t")
    assert said.endswith("(the first: e:2 is t:2); remove them from one of the two")
