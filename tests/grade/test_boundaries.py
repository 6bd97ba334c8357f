"""What changes an answer, side by side with what does not: the phrase around a number, the case of letters, the side
of an equation, tiny values, units of formulas, raised digits. The cases are made from tables, both ways round."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import pytest

pytest.importorskip("math_verify")

from grade_one import problem

from truestep.grade.equivalent import decide
from truestep.grade.extract import extract_answer
from truestep.grade.normal import normalise
from truestep.grade.score import Grader
from truestep.records import Verdict

NUMBERS = ("18", "3.5", "1,200")
BEFORE = (
    "at least", "at most", "more than", "less than", "fewer than", "no more than", "up to", "half of", "twice",
    "the square of", "the square root of", "minus", "double", "over", "nearly", "between 2 and",
)  # fmt: skip
AFTER = (
    "million", "hundred", "dozen", "squared", "cubed", "or more", "or fewer", "at least", "over 5", "to 5", "times 2",
    "plus 1", "minus 3", "divided by 7",
)  # fmt: skip
HARMLESS = (
    "{}", "{}.", "{}, because it is more than 7", "{} since half of 36 is {}", "{} dollars", "{} triangles",
    "equal to {}", "{}, which is at least 2",
)  # fmt: skip
NOT_UNITS = ("or more", "below zero", "minus 3", "x", "k", "i", "e", "squared", "of 20")
NOUNS = ("eggs", "red balls", "ways", "dollars", "cm", "m", "students")
SYMBOLS = ("x", "v", "n", "k", "ab", "ax", "kt", "mm", "xyz", r"\delta", r"\sigma", r"\phi", r"\omega")
VALUES = ("2\\sqrt{3}", "12\\pi", r"\frac{\sqrt{2}}{2}")
UNITS = ("cm", "m", "cm}^2{", "dollars", "euros", "inches", "g", "seconds")
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2) as made:
        yield made


def verdicts(grader: Grader, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    scores = grader.score_many([(problem(gold), text) for gold, text in pairs])
    assert not [pair for pair, s in zip(pairs, scores, strict=True) if s.verdict is Verdict.UNSCORED]
    return {pair: s.verdict is Verdict.CORRECT for pair, s in zip(pairs, scores, strict=True)}


def accepted(grader: Grader, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair, equal in verdicts(grader, pairs).items() if equal]


def refused(grader: Grader, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair, equal in verdicts(grader, pairs).items() if not equal]


def boxed(gold: str, answer: str) -> tuple[str, str]:
    return gold, rf"\boxed{{{answer}}}"


def upper(symbols: str) -> str:
    return symbols.upper() if symbols[0] != "\\" else "\\" + symbols[1:].capitalize()


def test_a_phrase_around_a_number_is_not_the_number(grader: Grader) -> None:
    phrases = [f"{word} {n}" for word, n in product(BEFORE, NUMBERS)]
    phrases += [f"{n} {word}" for word, n in product(AFTER, NUMBERS)]
    pairs = [(n, f"The answer is {p}.") for p in phrases for n in NUMBERS if n in p]
    assert len(pairs) >= 90
    assert accepted(grader, pairs) == []


def test_a_phrase_around_the_last_number_is_not_the_number(grader: Grader) -> None:
    phrases = [f"{word} 18" for word in BEFORE if not word.startswith("between")] + [
        f"18 {word}" for word in AFTER
    ]
    assert accepted(grader, [("18", f"So we get {phrase}") for phrase in phrases]) == []
    assert (
        refused(
            grader, [("18", "There are 5 or more steps, so we get 18"), ("18000000", "So we get 18 million.")]
        )
        == []
    )


def test_a_reason_or_a_noun_after_a_number_does_not_change_it(grader: Grader) -> None:
    pairs = [(n, f"The answer is {form.replace('{}', n)}") for form, n in product(HARMLESS, NUMBERS)]
    assert refused(grader, pairs) == []
    words = [("18000000", "18 million"), ("216", "18 dozen"), ("1800", "18 hundred")]
    assert refused(grader, [(gold, f"The answer is {text}.") for gold, text in words]) == []


def test_text_after_a_number_is_a_unit_only_if_it_is_a_noun(grader: Grader) -> None:
    assert accepted(grader, [boxed("18", rf"18\text{{ {word}}}") for word in NOT_UNITS]) == []
    assert refused(grader, [boxed("18", rf"18\text{{ {word}}}") for word in NOUNS]) == []


def test_letters_of_different_case_are_different_symbols(grader: Grader) -> None:
    pairs = [(s, upper(s)) for s in SYMBOLS]
    pairs += [(f"2{s}+1", f"2{upper(s)}+1") for s in SYMBOLS]
    assert accepted(grader, [boxed(*p) for a, b in pairs for p in ((a, b), (b, a))]) == []
    assert refused(grader, [boxed(s, f"{s}+0") for s in SYMBOLS if "\\" in s or len(s) == 1]) == []


def test_words_may_have_any_case(grader: Grader) -> None:
    words = ("yes", "no", "red", "odd", "amy", "infinite", "even")
    assert refused(grader, [boxed(w, f(w)) for w in words for f in (str.upper, str.capitalize)]) == []
    assert accepted(grader, [boxed(a, b) for a, b in combinations(words, 2)]) == []


def test_one_side_of_an_equation_is_not_the_equation(grader: Grader) -> None:
    sides = [
        ("0", "x^2-1"),
        ("6", "3x"),
        ("1", r"\sin x"),
        ("5", "a+b"),
        ("8", "2^x"),
        ("7", "11a+c"),
        ("4", "x^2"),
    ]
    pairs = [(f"{a}={b}", side) for a, b in sides for side in (a, b)]
    pairs += [(f"{b}={a}", side) for a, b in sides for side in (a, b)]
    assert accepted(grader, [boxed(*p) for gold, side in pairs for p in ((gold, side), (side, gold))]) == []
    named = [("x=5", "5"), ("5=x", "5"), ("f(2)=5", "5"), ("y=2x+1", "2x+1"), ("2x+1=y", "2x+1"), ("|AB|=7", "7"),
             ("V_1:V_2=11:21", "11:21"), (r"\frac{NO}{BO}=\frac{1}{\sqrt{6}}", r"\frac{1}{\sqrt{6}}")]  # fmt: skip
    assert refused(grader, [boxed(*p) for gold, side in named for p in ((gold, side), (side, gold))]) == []
    assert accepted(grader, [boxed("3=x", "x"), boxed("x=5", "x")]) == []
    chain = ("293", "The answer is m+n = 256+37 = 293")
    assert refused(grader, [chain, boxed("14", "9+5=14")]) == []


@pytest.mark.timeout(20)
def test_long_names_and_units_are_read_in_linear_time() -> None:
    """A pattern that could split a name in several ways would not end within a lifetime."""
    long = (
        "A" * 900,
        "A_B" * 400,
        "A_{B}" * 300,
        "A'" * 500,
        "|A|" * 400,
        "A_1B_" * 300,
        " " * 900,
        "1 + " * 300,
    )
    for name in (*long, "x " * 700, "V:" * 400):
        for text in (f"{name}! = 5", rf"{name}\text{{ cm}}!", rf"2\sqrt{{3}}{name}\text{{ cm}}"):
            for gold in ("5", "x+y", r"2\sqrt{3}\text{ cm}"):
                assert decide(normalise(gold), normalise(text)).equal is not True or name.isspace()
        extract_answer("The answer is " + name + " or so 5" + "</s>" * 900 + "!")


def test_tiny_and_close_values_are_told_apart(grader: Grader) -> None:
    tiny = [rf"\frac{{1}}{{2^{{{k}}}}}" for k in (54, 55, 59, 60, 98, 99, 300)]
    tiny += [rf"\frac{{1}}{{{k}!}}" for k in (19, 20, 30, 31)] + [
        r"\frac{\pi}{2^{70}}",
        r"\frac{\sqrt{2}}{3^{60}}",
    ]
    close = [rf"1-\frac{{1}}{{2^{{{k}}}}}" for k in (69, 70, 90)] + [
        "100!",
        "100!+1",
        r"\sqrt{10^{20}+1}",
        "10^{10}",
    ]
    close += [r"\pi", r"\frac{103993}{33102}", r"\frac{3141593}{1000000}", r"\sqrt{2}", r"\frac{99}{70}"]
    assert (
        accepted(grader, [boxed(a, b) for values in (tiny, close) for a, b in combinations(values, 2)]) == []
    )
    same = [(r"\frac{1}{2^{55}}", r"2^{-55}"), (r"\frac{\pi}{2^{70}}", r"\frac{2\pi}{2^{71}}"), ("i^4", "1"),
            (r"\sqrt{2}e^{i\pi/4}", "1+i"), ("x+1", "x-i^2"), ("2x^2+2", "2(x+i)(x-i)"),
            (r"\frac{25}{3-4i}", "3+4i"), (r"\frac{20!}{18!}", "380")]  # fmt: skip
    assert refused(grader, [boxed(*p) for a, b in same for p in ((a, b), (b, a))]) == []


def test_a_decimal_needs_six_correct_digits(grader: Grader) -> None:
    right = [(r"100\sqrt{2}", "141.421"), (r"9\pi", "28.27433"), (r"\sqrt{1000}", "31.6228"), (r"\pi", "3.1415926"),
             (r"-\sqrt{1000}", "-31.6228"), (r"\frac{\pi}{1000}", "0.00314159")]  # fmt: skip
    wrong = [(r"\sqrt{1000}", "31.623"), (r"\sqrt{2}", "1.41422"), (r"\pi", "3.14160"), (r"\sqrt{1000}", "-31.6228"),
             (r"\frac{\pi}{1000}", "0.003142"), (r"\sqrt{2}", "1.41420")]  # fmt: skip
    assert refused(grader, [boxed(*pair) for pair in right]) == []
    assert accepted(grader, [boxed(*pair) for pair in wrong]) == []


def test_units_beside_formulas_count(grader: Grader) -> None:
    with_unit = {(v, u): rf"{v}\text{{ {u}}}".replace("{}", "") for v, u in product(VALUES, UNITS)}
    wrong = [(with_unit[v, a], with_unit[v, b]) for v in VALUES for a, b in combinations(UNITS, 2)]
    assert accepted(grader, [boxed(*p) for a, b in wrong for p in ((a, b), (b, a))]) == []
    assert refused(grader, [boxed(v, text) for (v, _), text in with_unit.items()]) == []
    assert refused(grader, [boxed(text, v) for (v, _), text in with_unit.items()]) == []
    right = [(r"2\sqrt{3}\text{ m}", r"200\sqrt{3}\text{ cm}"), (r"\frac{\pi}{2}\text{ ft}", r"6\pi\text{ inches}"),
             (r"3\pi\text{ m}^2", r"30000\pi\text{ cm}^2")]  # fmt: skip
    assert refused(grader, [boxed(*p) for a, b in right for p in ((a, b), (b, a))]) == []
    assert (
        accepted(
            grader,
            [boxed("30^{\\circ}\\text{C}", "30^{\\circ}"), boxed("30^{\\circ}", "30^{\\circ}\\text{C}")],
        )
        == []
    )


def test_strict_wants_the_unit_of_a_formula(grader: Grader) -> None:
    for gold, answer, verdict in (
        (r"12\pi\text{ cm}", r"12\pi", Verdict.INCORRECT),
        (r"12\pi\text{ cm}", r"12\pi\text{ cm}", Verdict.CORRECT),
    ):
        judged = grader.judge(problem(gold), rf"\boxed{{{answer}}}")
        assert judged.score.verdict is Verdict.CORRECT
        assert judged.strict is verdict


def test_adjacent_raised_digits_are_one_exponent(grader: Grader) -> None:
    pairs = [(base, str(k)) for base in ("2", "x", "10") for k in (6, 12, 23, 32, 105)]
    assert refused(grader, [boxed(f"{b}^{{{k}}}", b + k.translate(RAISED)) for b, k in pairs]) == []
    assert (
        refused(grader, [boxed("10^{-4}", "10⁻⁴"), boxed("a_1+a_2", "a₁+a₂"), boxed("x_{12}", "x₁₂")]) == []
    )
    wrong = [("x^{6}", "x²³"), ("512", "2³²"), ("256", "2²³"), ("10^{8}", "10²³"), ("x_1 2", "x₁₂")]
    assert accepted(grader, [boxed(*pair) for pair in wrong]) == []


def test_lenient_accepts_neither_a_percent_for_a_fraction_nor_a_row_for_a_column(grader: Grader) -> None:
    row, column = r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    for gold, answer in ((r"0.25\%", "0.25"), ("0.25", r"0.25\%"), (row, column), (column, row)):
        assert grader.judge(problem(gold), rf"\boxed{{{answer}}}").lenient is Verdict.INCORRECT, (
            gold,
            answer,
        )
    assert grader.judge(problem(r"\frac{1}{3}"), r"\boxed{0.333}").lenient is Verdict.CORRECT


HEDGES = (
    "about {}",
    "approximately {}",
    "approx. {}",
    r"\approx {}",
    "≈ {}",
    r"\text{approximately } {}",
    "exactly {}",
    "={}",
)
TOKENS = (
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<eos>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>\n<|endoftext|>",
)
ZEROS = {"Arabic-Indic": "٠", "Persian": "۰", "Devanagari": "०", "full-width": "０", "bold": "𝟎"}


def test_a_word_of_approximation_leaves_the_number_and_no_other(grader: Grader) -> None:
    numbers = {"18": "19", "-5": "5", r"\frac{1}{2}": r"\frac{1}{3}"}
    pairs = [(n, other, form) for n, other in numbers.items() for form in HEDGES]
    assert refused(grader, [boxed(n, form.replace("{}", n)) for n, _, form in pairs]) == []
    assert accepted(grader, [boxed(n, form.replace("{}", other)) for n, other, form in pairs]) == []


def test_the_text_of_the_gold_answer_is_correct(grader: Grader) -> None:
    golds = (
        "12 widgets per box",
        "5 kPa",
        "Gate 7",
        "12 or more people",
        "f(x)=x for all x>0",
        "March 6",
        "The set is open.",
    )
    assert refused(grader, [(gold, gold) for gold in golds]) == []
    assert accepted(grader, list(combinations(golds, 2))) == []


def test_a_marked_gold_answer_is_read_from_a_text_of_any_length(grader: Grader) -> None:
    golds = (
        "#### 7",
        "3 + 4 = <<3+4=7>>7\n#### 7",
        "She has 7.\n#### 7",
        "<answer>7</answer>",
        "So <answer> 7 </answer>",
    )
    assert refused(grader, [boxed(gold, "7") for gold in golds]) == []
    assert accepted(grader, [boxed(gold, other) for gold in golds for other in ("3", "4", "77")]) == []


def test_control_tokens_after_an_answer_are_not_part_of_it(grader: Grader) -> None:
    answers = (("5", "The answer is 5."), ("Yes", "Yes"), ("5", "#### 5"), ("5", "5"), ("5", r"\boxed{5}"))
    pairs = [(gold, text + token) for gold, text in answers for token in TOKENS]
    assert refused(grader, pairs) == []
    assert accepted(grader, [("6" if gold == "5" else "No", text) for gold, text in pairs]) == []


def test_digits_of_other_scripts_are_digits(grader: Grader) -> None:
    pairs = {
        (str(n), "".join(chr(ord(zero) + int(d)) for d in str(n)))
        for n in (5, 12, 1907)
        for zero in ZEROS.values()
    }
    assert refused(grader, [boxed(*pair) for pair in pairs]) == []
    assert accepted(grader, [boxed(str(int(n) + 1), text) for n, text in pairs]) == []
    more = [
        ("1234567.89", "١٢٣٤٥٦٧٫٨٩"),
        ("1234567.89", "١٬٢٣٤٬٥٦٧٫٨٩"),
        (r"\frac{1}{3}", "⅓"),
        ("3:4", "3∶4"),
        ("6", "2✕3"),
    ]
    assert refused(grader, [boxed(*pair) for pair in more]) == []


def test_separators_of_thousands_in_prose(grader: Grader) -> None:
    forms = ("70,000", "70{,}000", r"70\,000", "70 000", r"\$70{,}000", r"**\$70{,}000**", r"70,\!000")
    assert refused(grader, [("70000", f"So the profit was {form}.") for form in forms]) == []
    assert accepted(grader, [("0", f"So the profit was {form}.") for form in forms]) == []
    assert refused(grader, [("205", "We add 1000 205"), ("1234567", r"It is 1\,234\,567.")]) == []


def test_a_noun_after_a_number_is_its_unit_and_a_variable_is_not(grader: Grader) -> None:
    nouns = ("eggs", "red balls", "ways", "trees", "kPa", "MB", "N", "h", "kWh", "ppm", "solutions")
    assert refused(grader, [boxed("18", f"18 {noun}") for noun in nouns]) == []
    assert refused(grader, [("18", f"#### 18 {noun}") for noun in nouns]) == []
    not_nouns = (
        "x",
        "xyz",
        "sin x",
        "or more",
        "point five",
        "factorial",
        "choose two",
        "t",
        "abc",
        "squared",
        "million",
    )
    assert accepted(grader, [boxed("18", f"18 {word}") for word in not_nouns]) == []
    assert (
        accepted(
            grader, [boxed(f"18 {a}", f"18 {b}") for a, b in combinations(("eggs", "trees", "kPa", "MB"), 2)]
        )
        == []
    )
